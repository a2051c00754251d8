"""A hint names only what exists: packages, commands, options, environment variables, keywords and methods."""

from __future__ import annotations

import ast
import inspect
import re
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch.distributed
import typer

import cloudckpt
from cloudckpt.backends.config.libraries import install_hint
from cloudckpt.backends.config.options import Options
from cloudckpt.cli.app import app
from cloudckpt.executor import ProcessExecutor, ProcessGroupInfo

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
FOLDERS = ("cloudckpt", "executor", "backends")
_NAME = re.compile(r"[A-Za-z0-9._-]+")


def texts() -> Iterator[tuple[str, str]]:
    """Place and text of each string of the code that is no docstring; fields of f-strings are ``{}``."""
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            name = str(path.relative_to(ROOT))
            if not name.startswith(("cloudckpt/backends/", "cloudckpt/executor/")):
                yield from ((f"{name}:{line}", text) for line, text in _strings(ast.parse(path.read_text())))


def _strings(tree: ast.AST) -> Iterator[tuple[int, str]]:
    whole = {
        id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts = (str(one.value) if isinstance(one, ast.Constant) else "{}" for one in node.values)
            yield node.lineno, "".join(parts)
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            whole.add(id(node.value))  # a docstring
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in whole:
            yield node.lineno, node.value


def hints() -> Iterator[tuple[str, str]]:
    """Place and text of each string within a ``hint=`` and each named like a cure."""
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            name = str(path.relative_to(ROOT))
            if name.startswith(("cloudckpt/backends/", "cloudckpt/executor/")):
                continue
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.keyword) and node.arg in ("hint", "cure"):
                    yield from ((f"{name}:{node.value.lineno}", text) for _, text in _strings(node.value))


TEXTS = list(texts())
HINTS = list(hints())


def libraries() -> set[str]:
    """Return the packages that the project requires, with all its extras."""
    extras = PROJECT["optional-dependencies"].values()
    every = [*PROJECT["dependencies"], *(one for extra in extras for one in extra)]
    return {match[0] for one in every if (match := _NAME.match(one))} - {"cloudckpt"}


def commands() -> set[str]:
    """Return the commands of ``cloudckpt``."""
    return set(typer.main.get_command(app).commands)  # type: ignore[attr-defined]


def options() -> set[str]:
    """Return the options of a URI."""
    return set(Options.model_fields)


def variables() -> set[str]:
    """Return the environment variables of the project: the options', and those of the docs."""
    documented = set(
        re.findall(r"CLOUDCKPT_[A-Z_]+", "".join(page.read_text() for page in (ROOT / "docs").glob("*.md")))
    )
    return documented | {f"CLOUDCKPT_{name.upper()}" for name in options()}


def keywords() -> set[str]:
    """Return the keywords of what users call."""
    front = [getattr(cloudckpt, name) for name in dir(cloudckpt) if not name.startswith("_")]
    called = [*front, ProcessExecutor, ProcessGroupInfo]
    called += [
        method for one in called if inspect.isclass(one) for _, method in inspect.getmembers(one, callable)
    ]
    found = options() | set(FOREIGN)
    for one in called:
        try:
            found |= set(inspect.signature(one).parameters)
        except (TypeError, ValueError):  # of a builtin class
            continue
    return found


def methods() -> set[str]:
    """Return the names of functions and methods of what users import, of torch.distributed as well."""
    front = [getattr(cloudckpt, name) for name in dir(cloudckpt) if not name.startswith("_")]
    return {*dir(torch.distributed)} | (
        {name for one in [*front, ProcessExecutor] for name in dir(one)} | set(dir(cloudckpt)) | set(FOREIGN)
    )


FOREIGN = {"autocommit": "of fsspec's open"}
"""Names in hints that are others', and whose they are."""


def named(pattern: str, among: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Place and name of each match."""
    return [(at, match) for at, text in among for match in re.findall(pattern, text)]


@pytest.mark.parametrize(
    ("pattern", "among", "known"),
    [
        pytest.param(r"`?\bcloudckpt ([a-z]+)\b(?=[^`]*`)", TEXTS, commands, id="command"),
        pytest.param(r"CLOUDCKPT_[A-Z_]+[A-Z]", TEXTS, variables, id="variable"),
        pytest.param(
            r"\boptions? ([a-z_]+_[a-z_]+|region|profile|anon|retries|timeout|checksum)",
            TEXTS,
            options,
            id="option",
        ),
        pytest.param(r"\b([a-z_]{3,})=(?=['\"\[{A-Z0-9N]|\s|$|,)", HINTS, keywords, id="keyword"),
        pytest.param(r"(?<![.\w])([a-z_]{3,})\(", HINTS, methods, id="method"),
    ],
)
def test_what_a_text_names_exists(
    pattern: str, among: list[tuple[str, str]], known: Callable[[], set[str]]
) -> None:
    found, there = named(pattern, among), known()
    assert found, "nothing is checked"
    assert [(at, name) for at, name in found if name not in there] == []


def test_a_package_that_is_to_be_installed_is_one_that_is_published() -> None:
    for at, text in TEXTS:
        for packages in re.findall(r"pip install (.*)", text):
            assert "cloudckpt" not in packages, at  # it is on no index
            assert packages == "" or set(_NAME.findall(packages)) <= libraries(), at


@pytest.mark.parametrize("extra", sorted(set(PROJECT["optional-dependencies"]) - {"all"}))
def test_the_libraries_of_an_extra_are_named(extra: str) -> None:
    told = install_hint(extra, "missing.module").partition("pip install ")[2]
    named = {one.strip('"') for one in re.findall(r'"[^"]+"|\S+', told)}
    assert named == set(PROJECT["optional-dependencies"][extra])
