"""A run tells its story in one line a save and a load, once, and nothing else."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import re
import signal
import subprocess
import sys
import sysconfig
import textwrap
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from cloudckpt import Checkpointer
from cloudckpt.backends.config import units
from cloudckpt.backends.system import background_log
from cloudckpt.executor import ProcessExecutor
from cloudckpt.story import is_configured
from support.servers import unused_port

ROOT = Path(__file__).resolve().parent.parent
JOB = ROOT / "tests" / "support" / "story_job.py"
STATE = {"t": torch.ones(1000)}
_SIZE = r"\d+\.\d [KM]iB"
_TIME = r"(?:\d+ ms|\d+\.\d s)"


@pytest.mark.parametrize(
    ("length", "text"),
    [
        (0.0, "0 ms"),
        (0.0414, "41 ms"),
        (0.9996, "1.0 s"),
        (2.13, "2.1 s"),
        (59.96, "1 min 0 s"),
        (200, "3 min 20 s"),
        (3599.7, "1 h 0 min"),
        (7500, "2 h 5 min"),
    ],
)
def test_lengths_of_time_are_short(length: float, text: str) -> None:
    assert units.seconds(length) == text


@contextlib.contextmanager
def unconfigured() -> Iterator[None]:
    """Logging as a program finds it that has not configured any: pytest has handlers at the root."""
    root, ours = logging.getLogger(), logging.getLogger("cloudckpt")
    kept, level, own = list(root.handlers), root.level, ours.level
    root.handlers.clear()
    root.setLevel(logging.WARNING)
    ours.setLevel(logging.NOTSET)
    try:
        yield
    finally:
        background_log.flush(10)
        root.handlers[:] = kept
        root.setLevel(level)
        ours.setLevel(own)


@pytest.fixture
def lines(capfd: pytest.CaptureFixture[str]) -> Callable[[], list[str]]:
    """Return what was written to standard error since the last call."""

    def read() -> list[str]:
        background_log.flush(10)
        said = capfd.readouterr().err.splitlines()
        # A process that has imported torchao, for another test, has its checkpoint process import it as well.
        return [line for line in said if "torchao" not in line and "torch/utils/_pytree.py" not in line]

    return read


def story(run: str, ranks: str = "1 rank", rules: str = "all steps are kept") -> str:
    return f"checkpoints go to {re.escape(run)} \\({ranks}, {rules}\\)"


def committed(step: int) -> str:
    return f"step {step} committed: {_SIZE} in {_TIME}, training blocked for {_TIME}"


def assert_lines(said: list[str], *patterns: str, start: str = "cloudckpt: ") -> None:
    assert len(said) == len(patterns), said
    for line, pattern in zip(said, patterns, strict=True):
        assert re.fullmatch(start + pattern, line), (pattern, line)


def test_saves_and_loads_are_told_where_logging_is_not_configured(
    tmp_path: Path, lines: Callable[[], list[str]]
) -> None:
    run = f"file://{tmp_path}/run"
    with unconfigured(), Checkpointer(run) as checkpointer:
        checkpointer.async_save(1, STATE)  # nobody asks its handle
        checkpointer.wait()
        checkpointer.save(2, STATE)
        checkpointer.load(STATE, step=1)
    resumed = rf"resumed from step 1 \({_SIZE} in {_TIME}\)"
    assert_lines(lines(), story(run), committed(1), committed(2), resumed)
    with unconfigured(), Checkpointer(run, keep_last=3, keep_every=100, progress=False) as checkpointer:
        checkpointer.save(3, STATE)
    assert lines() == []


def test_a_load_that_fell_back_names_the_newest_step(tmp_path: Path, lines: Callable[[], list[str]]) -> None:
    with Checkpointer(f"file://{tmp_path}/run") as checkpointer:
        for step in (1, 2):
            checkpointer.save(step, STATE)
        (data,) = (tmp_path / "run" / "step-0000000002").glob("*.distcp")
        content = bytearray(data.read_bytes())
        content[len(content) // 2] ^= 255
        data.write_bytes(content)
        lines()
        with unconfigured():
            assert checkpointer.load(STATE, fallback=True) == 1
    *_, last = lines()
    assert_lines([last], rf"resumed from step 1 \({_SIZE} in {_TIME}\), instead of step 2")


def test_save_blocks_training_until_the_commit(tmp_path: Path, lines: Callable[[], list[str]]) -> None:
    with unconfigured(), Checkpointer(f"file://{tmp_path}/run", keep_last=3) as checkpointer:
        checkpointer.save(2, STATE)
    _, said = lines()
    took = re.search(rf"in ({_TIME}), training blocked for ({_TIME})$", said)
    assert took is not None and took[1] == took[2]


@pytest.mark.parametrize("late", [False, True])
def test_a_program_that_logs_gets_each_line_once(
    tmp_path: Path, lines: Callable[[], list[str]], late: bool
) -> None:
    run = f"file://{tmp_path}/run"
    with unconfigured():
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(levelname)s %(name)s %(message)s"))

        def configure() -> None:
            logging.getLogger().addHandler(handler)
            logging.getLogger().setLevel(logging.INFO)

        if not late:
            configure()
        with Checkpointer(run, progress=late) as checkpointer:
            checkpointer.save(1, STATE)
            first = lines()
            configure()
            checkpointer.save(2, STATE)
    told = [*first, *(line for line in lines() if line.startswith("INFO cloudckpt "))]
    start = "cloudckpt: " if late else "INFO cloudckpt "
    assert_lines(
        [line for line in told if line in first and line.startswith(start)],
        story(run),
        committed(1),
        start=start,
    )
    assert_lines([line for line in told if line not in first], committed(2), start="INFO cloudckpt ")


@pytest.mark.parametrize("how", ["root at ERROR", "own at WARNING", "a handler", "disabled"])
def test_a_program_that_wants_no_such_lines_gets_none(how: str) -> None:
    with unconfigured():
        assert not is_configured()
        if how == "root at ERROR":
            logging.getLogger().setLevel(logging.ERROR)
        elif how == "own at WARNING":
            logging.getLogger("cloudckpt").setLevel(logging.WARNING)
        elif how == "a handler":
            logging.getLogger().addHandler(logging.NullHandler())
        else:
            logging.disable(logging.INFO)
        try:
            assert is_configured()
        finally:
            logging.disable(logging.NOTSET)


def test_a_call_that_waited_for_the_save_before_warns_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with Checkpointer(f"file://{tmp_path}/run") as checkpointer:
        checkpointer.warmup(STATE)
        process = checkpointer._executor.pid
        assert process is not None
        os.kill(process, signal.SIGSTOP)
        threading.Timer(1.5, os.kill, (process, signal.SIGCONT)).start()
        for step in (1, 2, 3):
            checkpointer.async_save(step, STATE)
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert_lines(
        said,
        rf"the save of step 2 of .* was blocked for {_TIME}, because the save before was still running. "
        r"Give snapshots=2, .* or on_busy='skip', or save less often",
        start="",
    )


def torchrun(run: str, steps: int) -> list[str]:
    """Run the job on two ranks with default settings, and return all that it printed."""
    command = [
        f"{sysconfig.get_path('scripts')}/torchrun",
        "--nproc-per-node",
        "2",
        str(JOB),
        run,
        str(steps),
    ]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    ran = subprocess.run(
        command,
        env={**environment, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout
    return ran.stdout.splitlines()


def test_two_ranks_print_a_handful_of_lines_as_the_docs_show(tmp_path: Path) -> None:
    run = f"file://{tmp_path}/run"
    where = story(run, "2 ranks", "keep_last=3")
    first, second = torchrun(run, 20), torchrun(run, 10)
    assert_lines(first, where, committed(10), committed(20))
    assert_lines(second, where, rf"resumed from step 20 \({_SIZE} in {_TIME}\)", committed(30))
    page = (ROOT / "docs" / "checkpointer.md").read_text()
    shown = [line for line in page.splitlines() if line.startswith("cloudckpt: ")]

    def shape(line: str) -> str:
        return re.sub(rf"{_TIME}|file://\S+", "_", line)

    assert list(map(shape, shown)) == list(map(shape, [*first, *second]))


UNOBSERVED = """
    import cloudckpt, torch, sys
    from cloudckpt.executor import ProcessExecutor
    if __name__ == "__main__":
        kind, uri = sys.argv[1:]
        state = {"t": torch.ones(10)}
        if kind == "executor":
            executor = ProcessExecutor()
            for _ in range(2):
                handle = executor.execute_save(state, checkpoint_id=uri)
        else:
            on_failure = "warn" if kind == "warn" else "raise"
            checkpointer = cloudckpt.Checkpointer(uri, progress=False, on_failure=on_failure)
            checkpointer.save(1, state)
            handle = checkpointer.async_save(1, state)
            if kind != "end":
                checkpointer.close()
            if kind == "asked":
                handle.result()
    """


@pytest.mark.parametrize(
    ("kind", "logged", "raised"),
    [("executor", 1, 0), ("end", 1, 0), ("warn", 1, 0), ("close", 0, 1)],
)
def test_a_failed_save_is_logged_or_raised_and_not_both(
    tmp_path: Path, kind: str, logged: int, raised: int
) -> None:
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(UNOBSERVED))
    command = [sys.executable, str(script), kind, f"file://{tmp_path}/run"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (ran.returncode != 0) is bool(raised), ran.stderr
    assert ran.stderr.count("Traceback") == raised, ran.stderr
    said = [line for line in ran.stderr.splitlines() if "CheckpointExistsError" in line]
    assert len(said) == logged + raised, ran.stderr


def test_a_failure_whose_handle_is_collected_is_logged_by_the_next_save(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with ProcessExecutor() as executor:
        saves = [executor.execute_save(STATE, checkpoint_id=f"{tmp_path}/a") for _ in range(2)]
        assert isinstance(saves[1].exception(60), FileExistsError)  # observed
        unobserved = executor.execute_save(STATE, checkpoint_id=f"{tmp_path}/a")
        while not unobserved.done():
            pass
        del unobserved, saves
        gc.collect()
        executor.execute_save(STATE, checkpoint_id=f"{tmp_path}/b").result(60)
        errors = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
        assert len(errors) == 1 and "CheckpointExistsError" in errors[0]


CASES = [
    "shapes",
    "shape",
    "missing",
    "loads",
    "unsupported",
    "state_dict",
    "conflict",
    "steps",
    "background",
]
"""What fails, on one rank or on all."""
QUICK = ("shapes", "unsupported", "state_dict")


@pytest.mark.parametrize(
    "case", [case if case in QUICK else pytest.param(case, marks=pytest.mark.soak) for case in CASES]
)
def test_a_failure_on_three_ranks_fits_on_one_screen(tmp_path: Path, case: str) -> None:
    outputs = three_ranks(case, tmp_path)
    for output in outputs:
        screen = [
            part
            for line in output
            for part in [line[at : at + 160] for at in range(0, max(1, len(line)), 160)]
        ]
        assert len(screen) <= 24, "\n".join(output)
        text = [
            line.partition(": ")[2] for line in output if re.match(r"\[rank\d\]: [\w.]*(Error|Exists)", line)
        ]
        assert len(text) == 1, "\n".join(output)  # one exception, without a chain
        assert any(text[0] in line for line in output[-10:])
        assert sum("raised on rank" in line for line in output) <= 1
    messages = {
        re.sub(r"^\[rank\d\]: ", "", line) for output in outputs for line in output if "Error: " in line
    }
    assert len({message.partition(" failed too")[2] or message for message in messages}) == 1, messages
    if case == "shapes":
        assert sum("ranks 1 and 2 failed in the same way" in line for line in outputs[0]) == 1
        assert not any("failed in the same way" in line for output in outputs[1:] for line in output)
    if case == "state_dict":  # the caller's own code is shown where it raised
        assert any("in state_dict" in line for line in outputs[1])
        assert not any("in state_dict" in line for line in outputs[0])


def three_ranks(case: str, folder: Path) -> list[list[str]]:
    job = ROOT / "tests" / "support" / "failing_job.py"
    environment = {
        **os.environ,
        "WORLD_SIZE": "3",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(unused_port()),
        "OMP_NUM_THREADS": "1",
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, str(job), case, f"file://{folder}/run"],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(3)
    ]
    try:
        outputs = [rank.communicate(timeout=100)[0].splitlines() for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    assert [rank.returncode for rank in ranks] == [1, 1, 1], outputs
    return outputs
