"""``cloudckpt doctor`` of a place that is well, of a folder, of a machine; and whatever happens meanwhile."""

from __future__ import annotations

import re
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest

from cloudckpt import collect_garbage
from cloudckpt.backends.config.target import Target
from cloudckpt.backends.manage.probe_objects import ProbeObjects
from cloudckpt.backends.stores import open_store
from cloudckpt.backends.stores.base import Overwrite
from cloudckpt.backends.stores.local.exam import file_system_of
from cloudckpt.doctor import Finding, examine
from cloudckpt.doctor.machine import memory, shared_memory, standard_streams, threads, working_directory
from cloudckpt.executor.snapshot import memory_limits
from support.commands import COLUMNS, Ran, in_a_pipe, on_a_terminal, options_of
from support.findings import ABORTED, assert_only, by_check, doctor, failed, ruled
from support.gcs import GCSServer
from support.mounts import SHM_MIB, SMALL_SHM, private_mounts
from support.places import Place
from support.servers import S3Server, unused_port

ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
TRIED = {
    "put",
    "get",
    "list",
    "conditions",
    "multipart",
    "checksum",
    "pending",
    "abort",
    "delete",
    "clean-up",
}


def test_a_place_that_is_as_it_should_be(place: Place) -> None:
    if isinstance(place.server, S3Server):
        ruled(place, ABORTED | {"Filter": {"Prefix": ""}})
    status, found = doctor(place)
    assert status == 0
    assert {found[check]["state"] for check in TRIED} == {"ok"}
    assert not failed(found)
    if isinstance(place.server, S3Server):
        assert found["lifecycle"]["state"] == found["clock"]["state"] == found["region"]["state"] == "ok"
    assert place.visible() == place.pending() == set()


def test_a_folder_that_was_not_there_is_not_there_afterwards(folder: Place) -> None:
    assert doctor(folder)[0] == 0
    assert not Path(folder.uri.removeprefix("file://")).exists()


def test_stores_that_nothing_more_is_known_of(tmp_path: Path) -> None:
    status, found = doctor(Place("memory", "memory://doctor/run"))
    assert status == 0 and found["place"]["state"] == "warning"
    assert all(found[check]["state"] == "ok" for check in TRIED)
    generic = {"storage_options": {"path": str(tmp_path), "target_protocol": "file"}}
    status, found = doctor(Place("generic", "dir://run", options=generic))
    assert status == 0
    assert {found[check]["state"] for check in TRIED - {"conditions"}} == {"ok"}
    assert found["conditions"]["state"] == "warning"
    assert not any(path.is_file() for path in tmp_path.rglob("*"))


def test_a_folder_that_can_not_be(folder: Place) -> None:
    path = Path(folder.uri.removeprefix("file://"))
    path.write_text("a file")
    status, found = doctor(folder.child("run"))
    assert status == 1
    assert_only(found, "place")
    assert str(path) in found["place"]["what"]
    status, found = doctor(Place("folder", "file:///proc/cloudckpt"))
    assert status == 1
    assert "put" in failed(found)


COMMAND = [sys.executable, "-m", "cloudckpt.cli", "doctor", "--json"]


def test_a_small_dev_shm(folder: Place) -> None:
    mounts = private_mounts()
    if mounts is None:
        pytest.skip("needs to mount a small /dev/shm, which this user may not")
    command = [*mounts, "sh", "-c", SMALL_SHM, "sh", *COMMAND, folder.uri]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    found = by_check(Ran(0, ran.stdout))["shared memory"]
    assert found["state"] == "warning" and f"shm has {SHM_MIB} MiB" in found["what"]
    assert "--shm-size" in found["advice"]


@pytest.mark.parametrize(("limit", "status", "state"), [(40, 1, "failed"), (256, 0, "warning")])
def test_a_low_limit_on_open_files(folder: Place, limit: int, status: int, state: str) -> None:
    command = ["sh", "-c", f'ulimit -n {limit} && exec "$@"', "sh", *COMMAND, folder.uri]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stderr) == (status, "")
    found = by_check(Ran(0, ran.stdout))["descriptors"]
    assert found["state"] == state and f"{limit} files open" in found["what"]
    assert "ulimit -n 65536" in found["advice"]


def test_a_state_that_memory_is_too_small_for(folder: Place) -> None:
    status, found = doctor(folder, "--state-size", "1TiB", "--ranks-per-host", "8")
    assert status == 1
    assert_only(found, "memory")
    assert "8,196.0 GiB" in found["memory"]["what"]
    assert doctor(folder, "--state-size", "1MiB")[0] == 0


def test_a_limit_on_processes_below_what_saves_start() -> None:
    found = threads(4096, (3, "/sys/fs/cgroup/pids.max"), 88)
    assert found.state == "failed" and "/sys/fs/cgroup/pids.max" in found.what and "ulimit -u" in found.advice
    assert threads(10, None, 88).state == "failed"
    assert threads(None, (88, "pids.max"), 88).state == threads(None, None, 88).state == "ok"


def test_closed_standard_streams_and_a_deleted_working_directory_are_warned_of(folder: Place) -> None:
    assert standard_streams([]).state == working_directory("/").state == "ok"
    assert working_directory(None).state == "warning"
    command = ["sh", "-c", 'exec "$@" <&- 2>&-', "sh", *COMMAND, folder.uri]
    ran = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found = by_check(Ran(0, ran.stdout))["standard streams"]
    assert found["state"] == "warning" and found["what"].startswith("closed: ")


def test_where_there_are_no_memory_files_a_snapshot_has_to_fit_dev_shm() -> None:
    found = shared_memory(64 << 20, 60 << 20, snapshot=None, memfd=False)
    assert found.state == "failed" and "64 MiB" in found.what and "emptyDir" in found.advice
    assert shared_memory(8 << 30, 8 << 30, snapshot=9 << 30, memfd=False).state == "failed"
    assert shared_memory(8 << 30, 8 << 30, snapshot=7 << 30, memfd=False).state == "ok"
    assert shared_memory(None, 0, snapshot=9 << 30, memfd=True).state == "ok"


def test_a_system_that_tells_nothing_is_not_judged(tmp_path: Path) -> None:
    assert memory_limits.least_room(tmp_path, tmp_path) is None
    assert memory(None, 1).state == "unknown"
    assert file_system_of(tmp_path, tmp_path / "mountinfo") == ""


def test_the_file_system_is_that_of_the_nearest_mount(tmp_path: Path) -> None:
    mounts = tmp_path / "mountinfo"
    (tmp_path / "a b" / "c").mkdir(parents=True)
    spelt = str(tmp_path / "a b").replace(" ", "\\040")
    mounts.write_text(
        "1 0 0:1 / / rw - overlay overlay rw\n"
        f"2 1 0:2 / {spelt} rw shared:1 - nfs4 server:/x rw\n"
        f"3 1 0:3 / {tmp_path}/a rw - tmpfs tmpfs rw\n"
    )
    assert file_system_of(tmp_path / "a b" / "c", mounts) == "nfs4"
    assert file_system_of(tmp_path, mounts) == "overlay"


@pytest.fixture
def on_moto(moto: S3Server) -> Place:
    """A place whose bucket has a lifecycle rule, as it should."""
    return ruled(Place.on_server(moto, moto.new_bucket()).child("run"), ABORTED)


@pytest.mark.parametrize("at", ["put", "conditions", "multipart", "pending", "abort", "delete"])
def test_an_examination_that_is_interrupted_leaves_nothing(on_moto: Place, at: str) -> None:
    def interrupt(finding: Finding) -> None:
        if finding.check == at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        examine(Target.parse(on_moto.uri, **on_moto.options), found=interrupt)
    assert on_moto.visible() == on_moto.pending() == set()


def test_what_is_left_all_the_same_is_known_to_gc(place: Place) -> None:
    target = Target.parse(place.uri, **place.options)
    with open_store(target) as store:
        probe_objects = ProbeObjects(store)
        store.begin_upload(probe_objects.name())
        store.put(probe_objects.name(), b"x", Overwrite())
    collect_garbage(target, older_than=timedelta(days=-1), silent_for=timedelta(days=-1))
    assert place.visible() == set()
    if not isinstance(place.server, GCSServer):  # which forgets them in a week
        assert place.pending() == set()


def test_a_terminal_of_80_columns_and_a_pipe(on_moto: Place) -> None:
    on_moto.options["endpoint_url"] = f"http://127.0.0.1:{unused_port()}"
    shown = on_a_terminal("doctor", on_moto.uri, *options_of(on_moto))
    piped = in_a_pipe("doctor", on_moto.uri, *options_of(on_moto))
    assert (shown.status, piped.status, piped.err) == (1, 1, "")
    assert max(map(len, ESCAPES.sub("", shown.out).splitlines())) <= COLUMNS
    assert "\x1b" not in piped.out and piped.out.startswith(f"{on_moto.uri}\n")
    lines = piped.out.splitlines()
    assert not any(line.endswith(" ") for line in lines)
    assert lines[-1] == "a job can't checkpoint here as it should: 1 check failed"
    assert "testtest" not in shown.out + piped.out  # the secret
