"""Set up the virtual environment of a pair: an interpreter, a version of torch, and everything else."""

from __future__ import annotations

import dataclasses
import datetime as dt
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from matrix import floors, stubs
from matrix.interpreters import Interpreter

_ANOTHERS: Final = re.compile(r"^(nvidia|triton|cuda|setuptools)")
"""Requirements of torch that a test on a CPU does without, and setuptools, whose version the pair chooses."""


class UnavailableError(Exception):
    """Something that the pair needs cannot be had on this machine: the pair is left out."""


class BrokenError(Exception):
    """The requirements of the project could not be installed, or its tests failed."""


class Deadline:
    """The end of the time that the whole run may take."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._end = time.monotonic() + seconds

    def left(self, doing: str) -> float:
        """Return the seconds that are left; raise BrokenError if none are."""
        left = self._end - time.monotonic()
        if left <= 0:
            raise BrokenError(
                f"the limit of {self.seconds:.0f} s for the whole run was reached before: {doing}. "
                "Set up first (`make tools`), or raise it: make matrix MATRIX='--limit 1200'"
            )
        return left


@dataclass(frozen=True)
class Pair:
    """Versions that are tried together."""

    name: str
    torch: str
    """Requirement of torch, as pip reads it."""
    requirements: tuple[str, ...]

    @classmethod
    def oldest(cls) -> Pair:
        """The floor of every requirement."""
        listed = [*floors.lowest_of_all(), *floors.build_backend(oldest=True), *floors.test_tools()]
        return cls("oldest", f"torch=={floors.torch_floor()}", tuple(listed))

    @classmethod
    def newest(cls) -> Pair:
        """The newest release of every requirement."""
        return cls.of("newest", None)

    @classmethod
    def of(cls, name: str, torch: str | None) -> Pair:
        """A version of torch with the newest release of everything else."""
        listed = [*floors.requirements(), *floors.build_backend(oldest=False), *floors.test_tools()]
        return cls(name, f"torch=={torch}" if torch else "torch", tuple(listed))


class Environment:
    """A folder ``.venv-matrix-NAME`` with the versions of a pair."""

    def __init__(self, pair: Pair, interpreter: Interpreter, deadline: Deadline) -> None:
        self.pair = pair
        self.interpreter = interpreter
        self.deadline = deadline
        self.folder = floors.ROOT / f".venv-matrix-{pair.name}"
        self.python = self.folder / "bin" / "python"
        self._stamp = self.folder / ".ready"

    def _wanted(self) -> str:
        # The newest versions of yesterday may not be those of today.
        day = None if self.pair.name == "oldest" else dt.datetime.now(dt.UTC).date().isoformat()
        wanted = [str(self.interpreter.version), dataclasses.asdict(self.pair), day]
        return json.dumps(wanted)

    def set_up(self) -> None:
        """Install what is not installed yet.

        Raises:
            UnavailableError: This torch has no wheel here, or its stand-ins no compiler.
            BrokenError: The requirements of the project do not install together.
        """
        if self._stamp.exists() and self._stamp.read_text() == self._wanted():
            return
        self._stamp.unlink(missing_ok=True)
        _say(f"{self.pair.name}: environment {self.folder.name}, from {self.interpreter.path}")
        self._run([self.interpreter.path, "-m", "venv", str(self.folder)], "create the environment")
        self._install_torch()
        # The packages of torch that are not NVIDIA's, then everything else in one resolution.
        listed = [*self._requirements_of_torch(), *self.pair.requirements]
        self._pip(["--upgrade", *listed], "install the requirements of pyproject.toml")
        self._pip(
            ["--no-deps", "--no-build-isolation", "--editable", str(floors.ROOT)], "install cloudckpt itself"
        )
        self._stamp.write_text(self._wanted())

    def _install_torch(self) -> None:
        try:
            self._pip(["--upgrade", "--no-deps", self.pair.torch], f"install {self.pair.torch}")
        except BrokenError as error:
            raise UnavailableError(
                f"no wheel of {self.pair.torch} for Python {self.interpreter.version} (tried pip's index and "
                f"folders: {_first_error(error)}). Give one: PIP_FIND_LINKS=/folder/of/the/wheel"
            ) from None
        (libraries,) = self.folder.glob("lib/python*/site-packages/torch/lib")
        try:
            made = stubs.write(libraries) if sys.platform == "linux" else []
        except stubs.CompilerMissingError as error:
            raise UnavailableError(str(error)) from None
        if made:
            _say(f"{self.pair.name}: stand-ins for {len(made)} libraries of NVIDIA, which no test calls")

    def _requirements_of_torch(self) -> list[str]:
        code = "import importlib.metadata, json; print(json.dumps(importlib.metadata.requires('torch')))"
        listed: list[str] = json.loads(self._run([str(self.python), "-c", code], "read torch's metadata"))
        return [one for one in listed if "extra ==" not in one and not _ANOTHERS.match(one)]

    def versions(self) -> str:
        """Return the versions that the pair came to, for a line of the report."""
        code = (
            "import platform, importlib.metadata as m; print(platform.python_version(), *"
            "(f'{n} {m.version(n)}' for n in ('torch', 'numpy', 'pydantic', 'awscrt', 's3fs', 'aiobotocore', "
            "'gcsfs', 'typer')), sep=', ')"
        )
        return self._run([str(self.python), "-c", code], "read the versions").strip()

    def _pip(self, arguments: Sequence[str], doing: str) -> None:
        pip = [str(self.python), "-m", "pip", "--disable-pip-version-check", "-qq", "install"]
        self._run([*pip, *arguments], doing)

    def _run(self, command: Sequence[str], doing: str) -> str:
        try:
            ran = subprocess.run(
                command,
                capture_output=True,
                text=True,
                timeout=self.deadline.left(doing),
                check=False,
                cwd=floors.ROOT,
                # setuptools warns of every editable install whose folder bears the package's name.
                env={**os.environ, "PYTHONWARNINGS": "ignore"},
            )
        except subprocess.TimeoutExpired:
            self.deadline.left(doing)
            raise
        if ran.returncode:
            raise BrokenError(f"could not {doing}:\n{ran.stderr.strip()[-3000:]}")
        return ran.stdout


def _first_error(error: Exception) -> str:
    """Return the first line that pip wrote after the line that says what was done."""
    return next(iter(str(error).splitlines()[1:]), "no message").strip()


def _say(line: str) -> None:
    print(f"==> matrix: {line}", flush=True)  # noqa: T201 - a command
