"""Job files for Slurm and Kubernetes: what each starts is started here, and its promises are looked at.

Neither system is here. What they do to a job is done by small stand-ins: Slurm's two commands as scripts, and
the pods as processes with the variables that Kubernetes sets.
"""

from __future__ import annotations

import inspect
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

import cloudckpt
from support.places import Place, new_place
from support.recipes import (
    BEYOND,
    ENDLESS,
    RECIPES,
    ROOT,
    Recipe,
    assert_went_on,
    environment_at,
    family_of,
    finished,
    kill_once_committed,
    killed_at_the_end,
    newest,
    started,
    wait_for_commit,
)
from support.servers import S3Server, unused_port

GRACE = inspect.signature(cloudckpt.Checkpointer).parameters["preemption_grace"].default
UNDISTURBED = Recipe("ddp.py", ranks=2)
PATIENCE = 120.0
"""Seconds that a job may take to end on a busy machine."""
JOB_ID = "4711"
SRUN = """#!/bin/bash
# Starts every task on this machine, and ends with the highest status. Where one fails it leaves the others.
[[ $1 == --kill-on-bad-exit=1 ]] && shift
for ((task = 0; task < SLURM_NTASKS; task++)); do
    SLURM_PROCID=$task SLURM_LOCALID=0 "$@" &
    tasks+=($!)
done
highest=0
for task in "${tasks[@]}"; do
    wait "$task"
    status=$?
    ((highest = status > highest ? status : highest))
done
exit "$highest"
"""
SCONTROL = """#!/bin/bash
case $1 in
    show) printf '127.0.0.1\\nanother-node\\n' ;;
    requeue) echo "$2" >>"$REQUEUED" ;;
esac
"""


@dataclass(frozen=True, slots=True)
class Slurm:
    """What a node of a cluster has."""

    folder: Path

    def __post_init__(self) -> None:
        self._install("srun", SRUN)
        self._install("scontrol", SCONTROL)
        self._install("python", f'#!/bin/bash\nexec {sys.executable} "$@"\n')

    def replace_python(self, script: str) -> None:
        self._install("python", f"#!/bin/bash\n{script}\n")

    @property
    def requeued(self) -> list[str]:
        """Jobs that were put into the queue again."""
        queue = self.folder / "requeued"
        return queue.read_text().split() if queue.exists() else []

    def start(self, place: Place, steps: int) -> subprocess.Popen[str]:
        environment = {
            **environment_at(place),
            "PATH": f"{self.folder}:{os.environ['PATH']}",
            "REQUEUED": str(self.folder / "requeued"),
            "MASTER_PORT": str(unused_port()),
            "SLURM_JOB_ID": JOB_ID,
            "SLURM_JOB_NODELIST": "node-[1-2]",
            "SLURM_NTASKS": "2",
        }
        return started(["bash", str(RECIPES / "slurm.sbatch"), "--steps", str(steps)], environment)

    def _install(self, name: str, script: str) -> None:
        path = self.folder / name
        path.write_text(script)
        path.chmod(0o755)


@pytest.fixture
def slurm(tmp_path: Path) -> Slurm:
    (tmp_path / "bin").mkdir()
    return Slurm(tmp_path / "bin")


@pytest.mark.soak
def test_a_slurm_job_that_is_killed_goes_on(slurm: Slurm, tmp_path: Path) -> None:
    place = Place.in_folder(tmp_path)
    run = place.child("run")
    kill_once_committed([slurm.start(run, ENDLESS)], run)
    start = newest(run)
    assert start is not None
    undisturbed = UNDISTURBED.start(place.child("undisturbed"), start + BEYOND)
    resumed = finished(slurm.start(run, start + BEYOND))
    assert_went_on(start, resumed, finished(undisturbed))
    assert slurm.requeued == []


def test_a_slurm_job_whose_time_is_up_saves_a_last_step_and_is_requeued(slurm: Slurm, tmp_path: Path) -> None:
    run = Place.in_folder(tmp_path / "run")
    job = slurm.start(run, ENDLESS)
    with killed_at_the_end([job]):
        wait_for_commit(job, run)
        for process in family_of(job):  # every process of every task: the shells are the job's and srun's
            if process.name() not in ("bash", "srun"):
                process.send_signal(signal.SIGUSR1)
        out, _ = job.communicate(timeout=PATIENCE)
    assert job.returncode == 128 + signal.SIGUSR1
    assert slurm.requeued == [JOB_ID]
    assert re.findall(r"the last step, (\d+), is committed", out) == [str(newest(run))] * 2


@pytest.mark.parametrize(
    ("status", "again"), [(0, False), (1, False), (137, False), (138, True), (143, True)]
)
def test_a_slurm_job_is_requeued_when_it_was_told_to_end_and_otherwise_not(
    slurm: Slurm, tmp_path: Path, status: int, again: bool
) -> None:
    slurm.replace_python(f"exit {status}")
    job = slurm.start(Place.in_folder(tmp_path / "run"), 1)
    job.communicate(timeout=PATIENCE)
    assert job.returncode == status
    assert slurm.requeued == ([JOB_ID] if again else [])


def test_a_slurm_job_that_is_cancelled_is_not_requeued(slurm: Slurm, tmp_path: Path) -> None:
    slurm.replace_python("echo begun; exec sleep 1000")
    job = slurm.start(Place.in_folder(tmp_path / "run"), 1)
    with killed_at_the_end([job]):
        assert job.stdout is not None
        assert [job.stdout.readline() for _ in range(2)] == ["begun\n"] * 2
        for process in reversed(family_of(job)):  # tasks would still save when the shell is gone
            process.terminate()
        assert job.wait(PATIENCE) == -signal.SIGTERM
    assert slurm.requeued == []


def test_slurm_tells_every_task_in_time() -> None:
    options = re.findall(
        r"^#SBATCH --([\w-]+)(?:=(\S+))?$", (RECIPES / "slurm.sbatch").read_text(), re.MULTILINE
    )
    told = re.fullmatch(r"USR1@(\d+)", dict(options)["signal"])  # no `B:`, which tells the job's shell alone
    assert told is not None and int(told[1]) > GRACE
    assert "requeue" in dict(options)


def of_kind(kind: str) -> dict[str, Any]:
    """An object of the file for Kubernetes."""
    (found,) = (
        one for one in yaml.safe_load_all((RECIPES / "kubernetes.yaml").read_text()) if one["kind"] == kind
    )
    return dict(found)


def container() -> dict[str, Any]:
    (only,) = of_kind("Job")["spec"]["template"]["spec"]["containers"]
    return dict(only)


def start_pods(place: Place, steps: int) -> list[subprocess.Popen[str]]:
    """Start the job's pods as processes, rank 0 in the first. There is no DNS: they meet on this machine."""
    port = str(unused_port())
    pods: list[subprocess.Popen[str]] = []
    for index in range(of_kind("Job")["spec"]["completions"]):
        environment = {
            **{one["name"]: one["value"] for one in container()["env"]},
            **environment_at(place),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "JOB_COMPLETION_INDEX": str(index),
        }
        command = [expanded(word, environment) for word in container()["command"]]
        path = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        pods.append(started([*command, f"--steps={steps}"], {**environment, **path}))
    return pods


def expanded(word: str, environment: Mapping[str, str]) -> str:
    return re.sub(r"\$\((\w+)\)", lambda name: environment[name[1]], word)


@pytest.fixture
def bucket(tmp_path: Path, s3_server_named: Callable[[str], S3Server]) -> Place:
    return new_place("moto", tmp_path, s3_server_named)


@pytest.mark.soak
def test_a_kubernetes_job_that_is_killed_goes_on(bucket: Place) -> None:
    run = bucket.child("run")
    kill_once_committed(start_pods(run, ENDLESS), run)
    start = newest(run)
    assert start is not None
    undisturbed = UNDISTURBED.start(bucket.child("undisturbed"), start + BEYOND)
    first, second = start_pods(run, start + BEYOND)
    resumed = finished(first)
    second.communicate(timeout=PATIENCE)
    assert second.returncode == 0
    assert_went_on(start, resumed, finished(undisturbed))


@pytest.mark.soak
def test_a_kubernetes_job_of_which_one_pod_is_preempted_saves_a_last_step_and_ends(bucket: Place) -> None:
    pods = start_pods(bucket, ENDLESS)
    with killed_at_the_end(pods):
        wait_for_commit(pods[0], bucket)
        pods[1].terminate()
        outs = [pod.communicate(timeout=PATIENCE)[0] for pod in pods]
    assert [pod.returncode for pod in pods] == [1, 1]  # torchrun's, which backoffLimit has to bear
    assert [re.findall(r"the last step, (\d+), is committed", out) for out in outs] == [
        [str(newest(bucket))]
    ] * 2


def test_kubernetes_leaves_time_for_a_last_step_and_forgives_preemption() -> None:
    job = of_kind("Job")["spec"]
    pod = job["template"]["spec"]
    torchrun_waits = 30
    assert pod["terminationGracePeriodSeconds"] > torchrun_waits > GRACE
    assert pod["restartPolicy"] == "Never"
    assert job["podFailurePolicy"]["rules"] == [
        {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget"}]}
    ]
    assert job["completions"] == job["parallelism"] == 2
    assert f"--nnodes={job['completions']}" in container()["command"]


def test_kubernetes_pods_find_each_other() -> None:
    job, service = of_kind("Job"), of_kind("Service")
    pod = job["spec"]["template"]["spec"]
    assert (job["spec"]["completionMode"], service["spec"]["clusterIP"]) == ("Indexed", "None")
    assert pod["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    (address,) = (one["value"] for one in container()["env"] if one["name"] == "MASTER_ADDR")
    assert address == f"{job['metadata']['name']}-0.{service['metadata']['name']}"


def test_kubernetes_pods_have_memory_for_workers_and_know_where_their_checkpoints_go() -> None:
    pod = of_kind("Job")["spec"]["template"]["spec"]
    (mount,) = container()["volumeMounts"]
    (volume,) = pod["volumes"]
    assert mount == {"name": volume["name"], "mountPath": "/dev/shm"}  # noqa: S108 - a path in a pod
    assert volume["emptyDir"]["medium"] == "Memory"
    assert "memory" in container()["resources"]["limits"]
    assert "CHECKPOINT_URI" in {one["name"] for one in container()["env"]}


def test_the_service_account_is_the_one_that_terraform_gives_the_role_of_a_trainer() -> None:
    account = of_kind("ServiceAccount")["metadata"]
    assert of_kind("Job")["spec"]["template"]["spec"]["serviceAccountName"] == account["name"]
    for example in ("aws/examples/eks", "gcp/examples/gke"):
        trainer = re.search(
            r'\{ role = "trainer",.*\}', (ROOT / "terraform" / example / "main.tf").read_text()
        )
        assert trainer is not None
        assert f'namespace = "{account["namespace"]}", name = "{account["name"]}"' in trainer[0]
