"""The local store keeps every store's promises, and those of a file system."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from cloudckpt.backends.config.target import Target
from cloudckpt.backends.errors import (
    AccessDeniedError,
    ConfigurationError,
    IntegrityError,
    ObjectNotFoundError,
    PreconditionFailedError,
    StorageError,
)
from cloudckpt.backends.stores import open_store
from cloudckpt.backends.stores.base import Create, ObjectStore, Overwrite, Update, Upload
from cloudckpt.backends.stores.local import durable_io
from support.conformance import StoreConformance
from support.jobs import count_to, try_to_create, write_beyond_the_limit


class TestLocalStore(StoreConformance):
    @pytest.fixture
    def store(self, tmp_path: Path) -> ObjectStore:
        return _open(tmp_path / "run with space")

    def beside(self, store: ObjectStore) -> ObjectStore:
        return _open(Path(store.uri.removeprefix("file://").replace("%20", " ")).with_name("beside"))

    def raw_read(self, store: ObjectStore, name: str) -> bytes | None:
        path = self._path(store, name)
        return path.read_bytes() if path.is_file() else None

    def raw_write(self, store: ObjectStore, name: str, data: bytes) -> None:
        path = self._path(store, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)

    def _path(self, store: ObjectStore, name: str) -> Path:
        return Path(store.uri.removeprefix("file://")) / name


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.fixture
def store(root: Path) -> ObjectStore:
    return _open(root)


@pytest.fixture(scope="module")
def processes() -> Iterator[ProcessPoolExecutor]:
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield pool


# What is left behind


def test_nothing_but_the_objects_is_left_in_the_folder(store: ObjectStore, root: Path) -> None:
    version = store.put("a/one", b"1", Create()).version
    assert version is not None
    store.put("a/one", b"2", Overwrite())
    with pytest.raises(PreconditionFailedError):
        store.put("a/one", b"3", Create())
    with pytest.raises(PreconditionFailedError):
        store.put("a/one", b"3", Update(version))
    _complete(store, "a/two", b"data")
    store.abort_upload(store.begin_upload("a/three"))
    assert _files(root) == ["a/one", "a/two"]


def test_the_last_abort_leaves_no_folder_that_the_store_made(store: ObjectStore, root: Path) -> None:
    uploads = [store.begin_upload(name) for name in ("a/b/one", "a/two")]
    for upload in uploads:
        assert root.exists()
        store.abort_upload(upload)
    assert not root.exists()
    assert root.parent.exists()


def test_a_root_that_was_there_stays(store: ObjectStore, root: Path) -> None:
    root.mkdir()
    store.abort_upload(store.begin_upload("a/b/one"))
    assert list(root.iterdir()) == []


def test_deleting_the_last_object_of_a_folder_deletes_the_folder(store: ObjectStore, root: Path) -> None:
    for name in ("a/one", "a/b/two", "c/three"):
        store.put(name, b"", Overwrite())
    (root / "c/of the user").touch()
    store.delete(["a/one", "a/b/two", "c/three"])
    assert sorted(path.name for path in root.iterdir()) == ["c"]


def test_an_empty_folder_is_not_listed(store: ObjectStore, root: Path) -> None:
    (root / "empty/deeper").mkdir(parents=True)
    store.begin_upload("pending/name")
    store.put("full/deeper/name", b"", Overwrite())
    assert store.list("", delimiter=True).prefixes == ("full/",)


def test_folders_that_come_and_go_never_fail_a_writer(store: ObjectStore) -> None:
    """One deletes the folder as it becomes empty, the other needs it at the same moment."""

    def churn(name: str) -> None:
        for _ in range(150):
            store.put(name, b"x", Overwrite())
            store.delete([name])

    _side_by_side([lambda: churn("folder/deep/one"), lambda: churn("folder/deep/two")])
    assert store.list().objects == ()


# Processes that die


def test_a_writer_killed_in_a_put_leaves_nothing_visible(store: ObjectStore, root: Path) -> None:
    """The hidden file that it leaves is found as a pending upload, and goes when that is aborted."""
    code = """
import os, signal, sys
from cloudckpt.backends.stores import open_store
from cloudckpt.backends.stores.base import Create
from cloudckpt.backends.stores.local import durable_io
from cloudckpt.backends.config.target import Target
os.fsync = lambda fd: os.kill(os.getpid(), signal.SIGKILL)
durable_io.sync_folder = lambda folder: None
open_store(Target.parse(sys.argv[1])).put("name", b"data", Create())
"""
    killed = subprocess.run([sys.executable, "-c", code, str(root)], check=False)
    assert killed.returncode == -9
    assert store.list().objects == ()
    (pending,) = store.pending_uploads()
    assert pending.upload.name == "name"
    store.abort_upload(pending.upload)
    assert _files(root) == []


def test_a_completion_cut_off_after_the_object_was_visible_can_be_repeated(
    store: ObjectStore, root: Path
) -> None:
    upload = store.begin_upload("name")
    part = store.upload_part(upload, 1, 0, [memoryview(b"data")])
    (hidden,) = root.iterdir()
    (root / "name").hardlink_to(hidden)
    with pytest.raises(StorageError):  # nobody changes a visible object through its upload
        store.upload_part(upload, 1, 0, [memoryview(b"late")])
    assert store.complete_upload(upload, [part]).size == 4
    assert _files(root) == ["name"]
    assert store.get("name")[0] == b"data"


# Integrity


def test_a_completion_replaces_no_object(store: ObjectStore) -> None:
    upload = store.begin_upload("name")
    part = store.upload_part(upload, 1, 0, [memoryview(b"late")])
    store.put("name", b"first", Overwrite())
    with pytest.raises(PreconditionFailedError):
        store.complete_upload(upload, [part])
    assert store.get("name")[0] == b"first"


@pytest.mark.parametrize(
    ("sent", "handed_over"),
    [
        ([(1, 0, 4), (2, 4, 4)], [1]),  # more is held than handed over
        ([(1, 0, 4), (2, 8, 4)], [1, 2]),  # a hole
        ([(1, 0, 4), (2, 2, 4)], [1, 2]),  # an overlap
        ([(1, 0, 4), (3, 4, 4)], [1, 3]),  # a number left out
        ([(1, 4, 4), (2, 0, 4)], [1, 2]),  # numbers out of the order of the bytes
        ([(1, 0, 4)], []),
    ],
)
def test_parts_that_do_not_cover_the_object_are_not_completed(
    store: ObjectStore, sent: list[tuple[int, int, int]], handed_over: list[int]
) -> None:
    upload = store.begin_upload("name")
    parts = {
        number: store.upload_part(upload, number, offset, [memoryview(bytes(size))])
        for number, offset, size in sent
    }
    with pytest.raises(IntegrityError):
        store.complete_upload(upload, [parts[number] for number in handed_over])
    assert store.list().objects == ()


def test_a_part_that_was_lost_from_the_file_is_noticed(store: ObjectStore, root: Path) -> None:
    upload = store.begin_upload("name")
    part = store.upload_part(upload, 1, 0, [memoryview(b"data")])
    (hidden,) = root.iterdir()
    os.truncate(hidden, 3)
    with pytest.raises(IntegrityError):
        store.complete_upload(upload, [part])
    assert store.list().objects == ()


def test_short_reads_and_writes_are_carried_on(tmp_path: Path) -> None:
    """A pipe-sized kernel answer is given by hand, for a disk gives one only when it is full."""
    data = bytes(range(256)) * 16
    views = [memoryview(data)[start : start + 37] for start in range(0, len(data), 37)]
    with (
        durable_io.opened(tmp_path / "file", os.O_RDWR | os.O_CREAT) as fd,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(os, "pwritev", lambda fd, batch, offset: os.pwrite(fd, batch[0][:29], offset))
        assert durable_io.write_fully(fd, 5, views) == len(data)
        patch.setattr(os, "preadv", _preadv_at_most(31))
        memory = bytearray(len(data))
        assert durable_io.read_fully(fd, 5, [memoryview(memory)[:1000], memoryview(memory)[1000:]]) == len(
            data
        )
    assert memory == data


def test_a_write_that_takes_nothing_does_not_go_on_for_ever(tmp_path: Path) -> None:
    with (
        durable_io.opened(tmp_path / "file", os.O_RDWR | os.O_CREAT) as fd,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(os, "pwritev", lambda *_: 0)
        with pytest.raises(OSError, match="took no bytes"):
            durable_io.write_fully(fd, 0, [memoryview(b"data")])


# A file system that refuses


def test_a_file_that_may_not_grow_fails_the_write_that_needs_it(
    root: Path, processes: ProcessPoolExecutor
) -> None:
    """The kernel writes up to the limit (a short write) and refuses the rest."""
    errors = processes.submit(write_beyond_the_limit, str(root)).result()
    assert len(errors) == 2
    for error in errors:
        assert (error.uri, error.object_name) == (f"file://{root}", "name")
        assert error.hint is not None
    assert not root.exists()


def test_a_full_disk_fails_the_write_and_says_so(tmp_path: Path) -> None:
    mount = tmp_path / "small"
    mount.mkdir()
    code = """
import sys
from cloudckpt.backends.errors import StorageError
from cloudckpt.backends.stores.base import Create
from cloudckpt.backends.stores import open_store
from cloudckpt.backends.config.target import Target
store = open_store(Target.parse(sys.argv[1] + "/run"))
for operation in ("put", "part"):
    try:
        if operation == "put":
            store.put("name", bytes(4 << 20), Create())
        else:
            upload = store.begin_upload("name")
            store.upload_part(upload, 1, 0, [memoryview(bytes(1000))] * 4000)
    except StorageError as error:
        print(error)
store.abort_upload(upload)
print("left", [*store.pending_uploads(), *store.list().objects])
"""
    script = f'mount -t tmpfs -o size=1m none "{mount}" && exec "$@"'
    unshare = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script, "sh"]
    if subprocess.run([*unshare, "true"], check=False, capture_output=True).returncode:
        pytest.skip("this user may not mount a small file system")
    done = subprocess.run(
        [*unshare, sys.executable, "-c", code, str(mount)], check=True, capture_output=True, text=True
    )
    assert done.stdout.count("No space left on device") == 2
    assert done.stdout.count("Make room on the file system") == 2
    assert done.stdout.endswith("left []\n")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may do everything")
def test_a_folder_without_permission_is_an_access_error(store: ObjectStore, root: Path) -> None:
    root.mkdir(mode=0o500)
    with pytest.raises(AccessDeniedError, match="Give this user the right"):
        store.put("name", b"data", Create())
    root.chmod(0o000)
    with pytest.raises(AccessDeniedError):
        store.list()
    root.chmod(0o700)


def test_a_file_in_the_way_of_a_folder_is_named(store: ObjectStore) -> None:
    store.put("a", b"data", Overwrite())
    for write in (lambda: store.put("a/b", b"data", Create()), lambda: store.begin_upload("a/b")):
        with pytest.raises(StorageError, match="A file stands where a folder is needed"):
            write()
    assert [info.name for info in store.list().objects] == ["a"]


def test_a_folder_in_the_way_of_an_object_is_named(store: ObjectStore, root: Path) -> None:
    store.put("a/b", b"data", Overwrite())
    with pytest.raises(StorageError, match="A folder stands where an object is wanted"):
        store.put("a", b"data", Overwrite())
    with pytest.raises(PreconditionFailedError):
        store.put("a", b"data", Create())
    assert _files(root) == ["a/b"]


def test_a_name_too_long_for_the_file_system_is_said(store: ObjectStore) -> None:
    with pytest.raises(StorageError, match="Shorten the name"):
        store.put("n" * 250, b"data", Create())


def test_a_fifo_is_no_object_and_nobody_waits_for_its_writer(store: ObjectStore, root: Path) -> None:
    root.mkdir()
    os.mkfifo(root / "fifo")
    with pytest.raises(ObjectNotFoundError):
        store.get("fifo")
    assert store.list().objects == ()


# Names


@pytest.mark.parametrize(
    "name",
    ["", "/", "/etc/passwd", "a//b", "../a", "a/../../b", "./a", "a/", "a\0b", f".a.{'0' * 32}.partial"],
)
def test_a_name_that_is_no_path_below_the_root_is_refused(store: ObjectStore, name: str) -> None:
    with pytest.raises(ConfigurationError):
        store.put(name, b"data", Overwrite())
    with pytest.raises(ConfigurationError):
        store.get(name)
    with pytest.raises(ConfigurationError):
        store.delete([name])


@pytest.mark.parametrize("upload_id", ["", "x", "../" * 10 + "0" * 2, "0" * 31 + "/"])
def test_an_upload_id_that_is_no_id_is_refused(store: ObjectStore, upload_id: str) -> None:
    with pytest.raises(ConfigurationError):
        store.upload_part(Upload("name", upload_id), 1, 0, [memoryview(b"data")])


@pytest.mark.parametrize("prefix", ["/", "//", "/etc/", "../", "a/../../", "..", "out/"])
def test_no_listing_leads_out_of_the_root(store: ObjectStore, root: Path, prefix: str) -> None:
    (root.parent / "outside").mkdir()
    (root.parent / "outside/secret").write_bytes(b"secret")
    root.mkdir()
    (root / "out").symlink_to(root.parent / "outside")
    for delimiter in (False, True):
        listing = store.list(prefix, delimiter=delimiter)
        assert (listing.objects, listing.prefixes) == ((), ())
    assert list(store.pending_uploads(prefix)) == []


def test_a_symbolic_link_out_of_the_root_is_not_followed(store: ObjectStore, root: Path) -> None:
    (root.parent / "outside").mkdir()
    (root.parent / "outside/secret").write_bytes(b"secret")
    root.mkdir()
    (root / "out").symlink_to(root.parent / "outside")
    (root / "file").symlink_to(root.parent / "outside/secret")
    for name in ("out/secret", "file"):
        with pytest.raises(ConfigurationError, match="symbolic link"):
            store.get(name)
        with pytest.raises(ConfigurationError, match="symbolic link"):
            store.put(name, b"data", Overwrite())
        with pytest.raises(ConfigurationError, match="symbolic link"):
            store.delete([name])
    assert (root.parent / "outside/secret").read_bytes() == b"secret"


def test_the_root_itself_may_be_a_symbolic_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    store = _open(tmp_path / "link")
    store.put("a/name", b"data", Create())
    assert (tmp_path / "real/a/name").read_bytes() == b"data"
    assert [info.name for info in store.list("a/").objects] == ["a/name"]


# Several processes


def test_of_racing_processes_one_creates(store: ObjectStore, processes: ProcessPoolExecutor) -> None:
    for round_ in range(10):
        name = f"name{round_}"
        won = list(processes.map(try_to_create, [store] * 2, [name] * 2, [b"one", b"two"]))
        assert sum(won) == 1
        assert store.get(name)[0] == (b"one", b"two")[won.index(True)]


def test_no_update_of_racing_processes_is_lost(store: ObjectStore, processes: ProcessPoolExecutor) -> None:
    store.put("counter", b"0", Create())
    list(processes.map(count_to, [store] * 2, [40] * 2))
    assert store.get("counter")[0] == b"80"


def _open(root: Path) -> ObjectStore:
    return open_store(Target.parse(root))


def _complete(store: ObjectStore, name: str, data: bytes) -> None:
    upload = store.begin_upload(name)
    store.complete_upload(upload, [store.upload_part(upload, 1, 0, [memoryview(data)])])


def _files(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if not path.is_dir())


def _side_by_side(jobs: Sequence[Callable[[], None]]) -> None:
    errors: list[BaseException] = []

    def run(job: Callable[[], None]) -> None:
        try:
            job()
        except BaseException as error:  # noqa: BLE001 - raised below, in the thread of the test
            errors.append(error)

    threads = [threading.Thread(target=run, args=(job,)) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def _preadv_at_most(limit: int) -> Callable[[int, list[memoryview], int], int]:
    def preadv(fd: int, batch: list[memoryview], offset: int) -> int:
        got = os.pread(fd, min(limit, len(batch[0])), offset)
        batch[0][: len(got)] = got
        return len(got)

    return preadv
