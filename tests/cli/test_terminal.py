"""A terminal of 80 columns, a pipe, and a machine that lacks something."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import torch
import typer
from typer.core import TyperGroup

import cloudckpt
from cloudckpt.cli import output
from cloudckpt.cli.app import app
from support.commands import COLUMNS, at, in_a_pipe, on_a_terminal, save
from support.places import Place

COMMANDS = (
    "ls",
    "show",
    "verify",
    "diff",
    "cp",
    "convert",
    "rm",
    "prune",
    "pin",
    "unpin",
    "gc",
    "doctor",
    "bench",
)
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
LONG = "block." * 3 + "attention_output_projection." * 4 + "weight"


def lines_of(printed: str) -> list[str]:
    return ESCAPES.sub("", printed).replace("\r", "\n").splitlines()


@pytest.mark.parametrize(
    "command", [("ls",), ("show",), ("verify",), ("rm", "--step", "2", "--dry-run")], ids=lambda one: one[0]
)
def test_a_terminal_of_80_columns_holds_what_is_printed_and_a_pipe_is_plain(
    folder: Place, command: tuple[str, ...]
) -> None:
    for step in (1, 2):
        save(folder, {LONG: torch.ones(1000, 1000), "epoch": 1}, step)
    save(folder.child(name := f"a-name-{'of-a-folder-' * 9}"), {"t": torch.ones(1)})
    shown = on_a_terminal(*command, folder.uri)
    piped = in_a_pipe(*command, folder.uri)
    assert (shown.status, piped.status, piped.err) == (0, 0, "")
    assert max(map(len, lines_of(shown.out))) <= COLUMNS
    assert "…" not in shown.out + piped.out
    assert "\x1b" not in piped.out
    # A name is there in one piece in the pipe, and in however many lines on the terminal.
    whole = {"ls": name, "show": LONG[LONG.index("attention") :]}.get(command[0], at(folder, 2).uri)
    assert whole in piped.out
    count = {"ls": "of-a-folder-"[3:-1], "show": "attention_output_projection"}.get(command[0], "step-00")
    assert ESCAPES.sub("", shown.out).count(count) >= whole.count(count) - 1


def test_names_that_an_encoding_lacks_are_spelt_out(folder: Place) -> None:
    save(folder, {"größe": torch.ones(3)})
    ran = in_a_pipe("show", folder.uri, environment={"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"})
    assert (ran.status, ran.err) == (0, "")
    assert r"gr\xf6\xdfe" in ran.out


@pytest.mark.parametrize("more", [[], ["--json"]], ids=["plain", "json"])
def test_a_reader_that_goes_away_is_no_reason_for_a_traceback(folder: Place, more: list[str]) -> None:
    save(folder, {f"key{n}": n for n in range(3000)})
    command = shlex.join([sys.executable, "-m", "cloudckpt.cli", "show", folder.uri, *more])
    ran = subprocess.run(
        ["/bin/sh", "-c", f"{command} | head -c 10"], capture_output=True, text=True, check=False
    )
    assert len(ran.stdout) == 10
    assert ran.stderr == ""


def test_answers_can_go_to_a_file_while_questions_stay_on_the_terminal(folder: Place, tmp_path: Path) -> None:
    save(folder, {"t": torch.ones(3)}, step=1)
    save(folder, {"t": torch.ones(3)}, step=2)
    with (tmp_path / "answer.json").open("wb") as out:
        ran = on_a_terminal("prune", folder.uri, "--keep-last", "1", "--json", typed="y\n", out=out.fileno())
    assert ran.status == 0 and "Delete 1 step of" in ran.out
    answer = (tmp_path / "answer.json").read_text()
    assert answer.startswith("{\n") and answer.endswith("}\n")
    assert not at(folder, 1).visible()


def test_the_help_names_every_command_and_needs_no_torch() -> None:
    ran = in_a_pipe("--help")
    assert ran.status == 0
    assert all(re.search(rf"\b{name}\b", ran.out) for name in COMMANDS)
    assert max(map(len, ran.out.splitlines())) <= COLUMNS
    code = "import sys\nfrom cloudckpt.cli.app import app\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    command = typer.main.get_command(app)
    assert isinstance(command, TyperGroup) and {*command.commands} == {*COMMANDS}


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_has_help(command: str) -> None:
    ran = in_a_pipe(command, "--help")
    assert ran.status == 0
    assert "--json" in ran.out and "--option" in ran.out
    assert ("--yes" in ran.out and "--dry-run" in ran.out) == (command in ("rm", "prune", "gc"))


def test_the_version_is_the_librarys() -> None:
    assert in_a_pipe("--version").out == f"{cloudckpt.__version__}\n"


def test_completion_is_there() -> None:
    environment = {"_CLOUDCKPT_COMPLETE": "complete_bash", "COMP_WORDS": "cloudckpt v", "COMP_CWORD": "1"}
    assert in_a_pipe(environment=environment).out.strip() == "verify"


@pytest.mark.parametrize("library", ["typer", "rich"])
def test_without_its_libraries_it_says_what_to_install(library: str) -> None:
    code = f"import sys\nsys.modules[{library!r}] = None\nfrom cloudckpt.cli import main\nmain()"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr.count("\n") == 1 and library in ran.stderr.partition("pip install ")[2]


def test_importing_the_library_does_not_import_the_command_line() -> None:
    code = "import sys, cloudckpt\ncloudckpt.Checkpointer\nassert not {'typer', 'rich'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_nobody_expected_is_told_without_a_traceback(folder: Place) -> None:
    code = (
        "import sys\nfrom cloudckpt import run\nfrom cloudckpt.cli import main\n"
        "def broken(*_): raise ZeroDivisionError('by nothing')\nrun.Run.listed = broken\nmain()"
    )
    command = [sys.executable, "-c", code]
    plain = subprocess.run([*command, "ls", "/x"], capture_output=True, text=True, check=False)
    assert (plain.returncode, plain.stdout) == (1, "")
    assert (
        plain.stderr.startswith("unexpected ZeroDivisionError: by nothing") and "\n" not in plain.stderr[:-1]
    )
    debugged = subprocess.run([*command, "--debug", "ls", "/x"], capture_output=True, text=True, check=False)
    assert debugged.returncode == 1 and "Traceback" in debugged.stderr


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (3 << 19, "1.5 MiB"),
        (5 << 40, "5.0 TiB"),
        (1 << 63, "8192.0 PiB"),
    ],
)
def test_sizes_are_short(nbytes: int, text: str) -> None:
    assert output.size(nbytes) == text
    assert len(text) <= 10


@pytest.mark.parametrize(
    ("passed", "text"),
    [
        (timedelta(seconds=-5), "0 s"),
        (timedelta(seconds=119), "119 s"),
        (timedelta(minutes=2), "2 min"),
        (timedelta(minutes=119), "119 min"),
        (timedelta(hours=47), "47 h"),
        (timedelta(days=400), "400 d"),
    ],
)
def test_ages_are_in_one_unit(passed: timedelta, text: str) -> None:
    now = datetime.now(UTC)
    assert output.age(now - passed, now) == text
    assert output.age(None) == "-"
