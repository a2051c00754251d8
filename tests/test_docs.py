"""What the README and the guide show, runs; what they link to, name and count, is there."""

from __future__ import annotations

import dataclasses
import itertools
import os
import re
import shlex
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast
from xml.etree import ElementTree as ET

import pytest
import torch
import torch.distributed.checkpoint as dcp
import typer

import cloudckpt
from bench.endpoint import served
from bench.growth import reached
from cloudckpt.backends.config.options import Options
from cloudckpt.cli.app import app
from cloudckpt.cli.arguments import options_of
from support.servers import S3Server, unused_port

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "terraform").rglob("README.md")),
    *sorted(DOCS.rglob("*.md")),
]
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_SHELL = ("", "sh")
_BUCKET = "s3://training"
"""A block that names the guide's bucket gets one, on a server of its own."""


def _name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def _blocks(page: Path) -> list[tuple[str, str]]:
    """Info string and content of each block of a page."""
    return _FENCE.findall(page.read_text())


def _of_kind(kind: str) -> list[Any]:
    """Each block of a kind, with the page and all blocks before it."""
    found: list[Any] = []
    for page in PAGES:
        if page == DOCS / "tutorial.md":
            continue  # gone through as a whole, below
        blocks = _blocks(page)
        at = [position for position, (info, _) in enumerate(blocks) if info == kind]
        found += [
            pytest.param(page, blocks[: position + 1], id=f"{_name(page)}-{number}")
            for number, position in enumerate(at)
        ]
    return found


def _environment(more: Mapping[str, str] | None = None) -> dict[str, str]:
    """This one, with the environment's own scripts before all others."""
    path = f"{sysconfig.get_path('scripts')}{os.pathsep}{os.environ.get('PATH', '')}"
    return {**os.environ, "PATH": path, **(more or {})}


class _Here:
    """A place of its own for what a page puts into /tmp and into its bucket."""

    def __init__(self, folder: Path, request: pytest.FixtureRequest) -> None:
        self._folder = folder
        self._request = request
        self._bucket: str | None = None
        self._server: S3Server | None = None

    def run(self, page: Path, command: list[str], block: str) -> None:
        here = block.replace("/tmp/cloudckpt", f"{self._folder}/cloudckpt")  # noqa: S108 - what the page says
        if _BUCKET in here:
            self._server = cast("S3Server", self._request.getfixturevalue("moto"))
            self._bucket = self._bucket or self._server.new_bucket()
            here = here.replace(_BUCKET, f"s3://{self._bucket}")
        environment = _environment(self._server.environment if self._server is not None else None)
        ran = subprocess.run(
            [*command, here], env=environment, cwd=self._folder, capture_output=True, text=True, check=False
        )
        assert ran.returncode == 0, f"{_name(page)}:\n{here}\n{ran.stdout}\n{ran.stderr}"


@pytest.fixture
def here(tmp_path: Path, request: pytest.FixtureRequest) -> _Here:
    return _Here(tmp_path, request)


_PYTHON = [sys.executable, "-W", "ignore", "-c"]
_BASH = ["bash", "-euo", "pipefail", "-c"]


@pytest.mark.parametrize(("page", "blocks"), _of_kind("python"))
def test_a_code_block_runs_as_it_stands(page: Path, blocks: list[tuple[str, str]], here: _Here) -> None:
    here.run(page, _PYTHON, blocks[-1][1])


@pytest.mark.parametrize(("page", "blocks"), _of_kind("sh"))
def test_commands_run_after_the_code_before_them(
    page: Path, blocks: list[tuple[str, str]], here: _Here
) -> None:
    before = [block for info, block in blocks if info == "python"]
    for block in before[-1:]:
        here.run(page, _PYTHON, block)
    here.run(page, _BASH, blocks[-1][1])


# The guide's ten minutes


@dataclasses.dataclass(frozen=True, slots=True)
class _Step:
    """A command of the guide, and the lines that it prints there."""

    command: str
    printed: list[str]


def _guided(text: str) -> Iterator[_Step]:
    """The commands of a page's shell blocks, in their order."""
    for info, block in _FENCE.findall(text):
        lines = block.splitlines() if info == "" else []
        if not any(line.startswith("$ ") for line in lines):
            yield from (_Step(line, []) for line in lines)
            continue
        starts = [at for at, line in enumerate(lines) if line.startswith("$ ")]
        for at, end in itertools.pairwise([*starts, len(lines)]):
            yield _Step(lines[at].removeprefix("$ "), lines[at + 1 : end])


def _alike(line: str) -> str:
    """A pattern of a printed line: its words, with any numbers and any number of spaces."""
    words = [re.sub(r"\d[\d.,]*", r"\\d[\\d.,]*", re.escape(word)) for word in line.split()]
    return r"\s*" + r"\s+".join(words)


def _assert_prints_like(shown: list[str], printed: str) -> None:
    """What a page shows is printed, in its order; of rows that are alike there may be more or fewer."""
    lines = iter(printed.splitlines())
    wanted = [pattern for pattern, _ in itertools.groupby(_alike(line) for line in shown if line != "…")]
    for pattern in wanted:
        assert any(re.match(pattern, line) for line in lines), f"{pattern} is not in\n{printed}"


def _put_together(steps: list[_Step], port: int) -> str:
    """One script of all commands, which says where each begins and how it ends."""
    script: list[str] = []
    for number, step in enumerate(steps):
        command = step.command.replace("9000", str(port))
        if command.endswith("&"):  # it logs to a file, and answers before the reader has typed the next one
            ready = f"until (exec 3<>/dev/tcp/127.0.0.1/{port}) 2>/dev/null; do sleep 0.1; done"
            command = f"{command.removesuffix('&')} >server.log 2>&1 & server=$!\n{ready}"
        script.append(f"echo '@@ {number}'\n{command}\necho \"@@ ended $?\"")
    return "\n".join([*script, "kill $server"])


def _walked(folder: Path, steps: list[_Step]) -> str:
    """What is printed where the steps are gone through, each having printed what the page says."""
    script = ["bash", "-c", _put_together(steps, unused_port())]
    with subprocess.Popen(
        script,
        cwd=folder,
        env=_environment({"PYTHONUNBUFFERED": "1"}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as shell:
        try:
            out, _ = shell.communicate(timeout=240)
        finally:
            if shell.poll() is None:
                os.killpg(shell.pid, signal.SIGKILL)
    printed = dict(re.findall(r"^@@ (\d+)\n(.*?)^@@ ended \d+$", out, re.MULTILINE | re.DOTALL))
    assert len(printed) == len(steps), out
    for number, step in enumerate(steps):
        _assert_prints_like(step.printed, printed[str(number)])
    # A preempted trainer ends with 128 plus the number of SIGTERM.
    statuses = [int(status) for status in re.findall(r"^@@ ended (\d+)$", out, re.MULTILINE)]
    assert statuses == [143 if step.command.startswith("kill") else 0 for step in steps], out
    return out


def _guide(folder: Path) -> tuple[list[_Step], Path]:
    """The guide's steps in the environment of the tests, and its program, written down."""
    page = (DOCS / "tutorial.md").read_text()
    shown = list(_guided(page))
    assert "twelve commands" in page and len(shown) == 12
    assert [step.command.split()[0] for step in shown[:2]] == ["python3", "pip"]
    [block] = [block for info, block in _FENCE.findall(page) if info == "python"]
    program = folder / "train.py"
    program.write_text(block)
    return shown[2:], program


def test_the_guide_leads_to_a_run_with_its_newest_steps(tmp_path: Path) -> None:
    steps, program = _guide(tmp_path)
    [started] = [at for at, step in enumerate(steps) if step.command.endswith("trainer=$!")]
    program.write_text(re.sub(r"time\.sleep\(.*\)", "pass", program.read_text()))
    _walked(tmp_path, steps[:started] + steps[started + 4 :])  # without the preemption and its listing


@pytest.mark.soak  # a minute, most of it what the guide sleeps and waits
def test_the_ten_minutes_of_the_guide_take_a_run_through_its_end_and_on(tmp_path: Path) -> None:
    steps, _ = _guide(tmp_path)
    out = _walked(tmp_path, steps)
    [last] = re.findall(r"the last step, (\d+), is committed", out)
    assert re.findall(r"^from step (\d+)$", out, re.MULTILINE) == ["0", last]


# The command line, as pages show it


def _typed(page: Path) -> Iterator[tuple[list[str], bool]]:
    """Each command that a page shows, as its arguments, and whether it is a whole one."""
    for info, block in _blocks(page):
        for line in block.replace("\\\n", " ").splitlines() if info in _SHELL else []:
            words = shlex.split(line.removeprefix("$ "), comments=True) if "cloudckpt " in line else []
            ended = list(itertools.takewhile(lambda word: word not in ("|", "&&", "||", ">", ">>"), words))
            if ended[:1] == ["cloudckpt"]:
                yield ended[1:], True
    prose = _FENCE.sub("", page.read_text())
    for inline in re.findall(r"`cloudckpt ([a-z-][^`]*)`", prose):
        yield shlex.split(inline), False


_COMMANDS = cast("Any", typer.main.get_command(app))
"""What typer makes of them; its classes are click's, which it brings along."""


def _options(command: Any) -> set[str]:
    return {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}


def _named_options(words: list[str]) -> set[str]:
    return {word.partition("=")[0] for word in words if re.match(r"--?[a-z]", word)}


@pytest.mark.parametrize("page", [page for page in PAGES if any(_typed(page))], ids=_name)
def test_a_command_that_is_shown_can_be_typed(page: Path) -> None:
    for words, whole in _typed(page):
        common = list(itertools.takewhile(lambda word: word.startswith("-"), words))
        assert set(common) <= _options(_COMMANDS), f"{_name(page)} shows {words}"
        if not (rest := words[len(common) :]):
            continue
        assert rest[0] in _COMMANDS.commands, f"{_name(page)} shows {words}"
        command = _COMMANDS.commands[rest[0]]
        assert _named_options(rest) <= _options(command), f"{_name(page)} shows {words}"
        if whole:
            with command.make_context(rest[0], rest[1:]) as context:  # raises for what can't be understood
                given = [context.params.get(name) for name in ("option", "from_option", "to_option")]
            for options in given:
                assert options_of(options or ()).keys() <= Options.model_fields.keys()


def test_every_command_and_option_that_the_command_lines_page_names_is_there() -> None:
    page = (DOCS / "cli.md").read_text()
    there = set[str]().union(_options(_COMMANDS), *map(_options, _COMMANDS.commands.values()))
    assert set(re.findall(r"`(--[a-z-]+)", page)) <= there
    described = set(re.findall(r"^\|.*?`cloudckpt ([a-z]+)", page, re.MULTILINE))
    assert described | {"unpin"} == _COMMANDS.commands.keys()


def test_the_table_of_options_has_them_all() -> None:
    page = (DOCS / "options.md").read_text()
    [table] = re.findall(r"^\| option \|.*?\n(?=\n)", page, re.MULTILINE | re.DOTALL)
    named = [name for row in table.splitlines() for name in re.findall(r"`(\w+)`", row.split("|")[1])]
    assert sorted(named) == sorted(Options.model_fields)


# What pages link to, name and count


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_a_link_within_the_project_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
        assert (page.parent / target).exists(), f"{page} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_a_test_that_is_named_exists(page: Path) -> None:
    text = page.read_text()
    for name, function in re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", text):
        assert (ROOT / name).exists(), f"{page} names {name}"
        if function:
            assert f"\ndef {function}(" in (ROOT / name).read_text(), f"{page} names {name}::{function}"
    for folder in re.findall(r"`(tests/[\w/]+)`", text):
        assert (ROOT / folder).is_dir(), f"{page} names {folder}"


def test_each_of_the_ten_promises_has_tests_and_what_stock_does() -> None:
    rows = re.findall(r"^\| \*\*(\d+)\.(.*)$", (DOCS / "guarantees.md").read_text(), re.MULTILINE)
    assert [number for number, _ in rows] == [str(number) for number in range(1, 11)]
    for number, row in rows:
        _, stock, tests, _ = (cell.strip() for cell in row.split(" |"))
        assert len(stock) > 1, f"promise {number} has nothing to compare with"
        assert "::test_" in tests, f"promise {number} names no test"


@pytest.mark.parametrize("package", ["cloudckpt", "executor", "backends"])
def test_every_module_has_its_place_on_the_map(package: str) -> None:
    page = (DOCS / "architecture.md").read_text()
    section = page.partition(f"### `{package}/`")[2].partition("\n#")[0]
    named = set(re.findall(r"`([\w/]+)(?:\.py|/)`", section))
    for path in sorted((ROOT / package).rglob("*.py")):
        name = path.relative_to(ROOT / package)
        folder = name.parts[0]
        if not path.name.startswith("_") and folder not in ("cli", "doctor", "bench"):
            assert name.stem in named, f"{package}/{name} is not on the map"
            assert len(name.parts) == 1 or name.parent.as_posix() in named, (
                f"{package}/{name.parent} is not on the map"
            )


@pytest.mark.parametrize("drawing", sorted(DOCS.glob("*.svg")), ids=_name)
def test_a_drawing_is_well_formed_and_needs_nothing_from_elsewhere(drawing: Path) -> None:
    text = drawing.read_text()
    ET.fromstring(text)  # noqa: S314 - our own
    assert re.findall(r"(?:href|src)\s*=\s*[\"']\s*(?!#)|url\(\s*[\"']?(?!#)|@import", text) == []


def test_a_save_takes_as_many_requests_as_operations_says() -> None:
    page = " ".join((DOCS / "operations.md").read_text().split())
    assert re.search(r"> parts \+ 4 . objects \+ 5", page)
    with served() as endpoint:
        uri = f"s3://{endpoint.server.new_bucket()}/run"
        options: dict[str, Any] = {**reached(endpoint.server), "part_size": "5MiB"}
        state = {"weights": torch.ones(3 << 20)}  # 12 MiB are three parts of one object
        for step in (1, 2):  # the first asks the server what it honours
            endpoint.reset()
            dcp.save(state, storage_writer=cloudckpt.StorageWriter(f"{uri}/{step}", **options))
        requests = endpoint.counts().requests
        assert requests["UploadPart"] == 3
        assert sum(requests.values()) == 3 + 4 * 1 + 5
        endpoint.reset()
        dcp.load(state, storage_reader=cloudckpt.StorageReader(f"{uri}/2", **options))
        assert sum(endpoint.counts().requests.values()) == 3  # two of 8 MiB at most, and .metadata


def test_the_site_has_every_page() -> None:
    listed = re.findall(r"[\w/-]+\.md", (ROOT / "mkdocs.yml").read_text())
    there = [
        str(page.relative_to(DOCS if page.is_relative_to(DOCS) else ROOT))
        for page in PAGES
        if page.parent != ROOT
    ]
    assert sorted(listed) == sorted(there)


def test_every_make_target_that_is_named_exists() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in PAGES:
        for named in re.findall(r"(?:`|^)make ([a-z]+)", page.read_text(), re.MULTILINE):
            assert named in targets, f"{page} names `make {named}`"
