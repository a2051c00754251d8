"""Runs Terraform on a copy of the modules, with the stand-in of one version of a provider."""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from terraform_check import schema
from terraform_check.schema import Schema

_TESTS: Final = Path(__file__).parents[1]
_HOST: Final = ".".join(("registry", "terraform", "io"))  # noqa: FLY002 - part of a path; no host is named here
"""The folder of a mirror that Terraform looks into for providers of hashicorp's. Nothing connects to it."""
_COLOURS_AND_FRAMES: Final = re.compile(r"\x1b\[[0-9;]*m|[│╷╵]")


@dataclass(frozen=True, slots=True)
class Ran:
    """The end of a Terraform process."""

    status: int
    output: str

    @property
    def message(self) -> str:
        """The output without frames and blank lines."""
        lines = (line.strip() for line in _COLOURS_AND_FRAMES.sub("", self.output).splitlines())
        return "\n".join(line for line in lines if line)

    @property
    def errors(self) -> list[str]:
        """The summaries of the errors."""
        return re.findall(r"^Error: (.+)$", self.message, re.MULTILINE)


class Workspace:
    """A copy of the modules of one cloud, in which Terraform finds one version of a provider.

    Args:
        modules: the folder of the modules of all clouds.
        cloud: the folder of one of them.
        provider: the name of its provider.
        served: the schema of the provider.
        folder: a folder for the copy, for the mirror and for states. It is deleted first.
    """

    def __init__(self, modules: Path, cloud: str, provider: str, served: Schema, folder: Path) -> None:
        self._program = shutil.which("terraform") or "terraform"
        shutil.rmtree(folder, ignore_errors=True)
        self.module = folder / "modules" / cloud
        self._states = folder / "states"
        self._states.mkdir(parents=True)
        left_out = shutil.ignore_patterns(".terraform*", "*.tfstate*", "*.tfvars*")
        shutil.copytree(modules / cloud, self.module, ignore=left_out)
        self._settings = _mirror(folder, provider, served)

    @property
    def folders(self) -> list[Path]:
        """The module, its examples and its test, each relative to the module."""
        return sorted({path.parent.relative_to(self.module) for path in self.module.rglob("*.tf")})

    def init(self, folder: Path) -> Ran:
        return self._terraform(folder, "init", "-input=false", "-no-color", "-backend=false")

    def validate(self, folder: Path) -> Ran:
        """Validate a folder that is initialized. A warning counts as a failure."""
        ran = self._terraform(folder, "validate", "-no-color", "-json")
        found = json.loads(ran.output)
        said = "\n".join(f"{one['summary']}: {one['detail']}" for one in found["diagnostics"])
        return Ran(0 if found["valid"] and not found["diagnostics"] else 1, said)

    def apply(self, name: str, variables: Mapping[str, Any]) -> Ran:
        """Apply the module, which is initialized, with some variables, and keep the state. None is a null."""
        current, kept = self.module / "terraform.tfstate", self._state(name)
        for path in (current, kept, current.with_suffix(".tfstate.backup")):
            path.unlink(missing_ok=True)
        ran = self._terraform(self.module, "apply", "-auto-approve", *self._options(variables))
        if current.exists():
            shutil.copy(current, kept)
        return ran

    def plan_again(self, variables: Mapping[str, Any]) -> Ran:
        """Plan what was applied last. The status is 2 if the plan would change anything."""
        return self._terraform(self.module, "plan", "-detailed-exitcode", *self._options(variables))

    def state(self, name: str) -> list[Mapping[str, Any]]:
        """Return the resources and data sources of what was applied under a name, with their instances."""
        path = self._state(name)
        if not path.exists():
            return []
        resources: list[Mapping[str, Any]] = json.loads(path.read_text())["resources"]
        return resources

    def copy(self, name: str) -> Path:
        """Copy the module without its examples and its test, to change the copy."""
        folder = self.module.parent / name
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.module, folder, ignore=shutil.ignore_patterns("examples", "test", ".terraform*"))
        return folder

    def _state(self, name: str) -> Path:
        return self._states / f"{name}.tfstate"

    def _options(self, variables: Mapping[str, Any]) -> list[str]:
        given = self._states / "variables.tfvars.json"
        given.write_text(json.dumps(variables))
        return ["-input=false", "-no-color", "-lock=false", f"-var-file={given}"]

    def _terraform(self, folder: Path, *arguments: str) -> Ran:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("TF_")}
        environment |= {
            "TF_CLI_CONFIG_FILE": str(self._settings),
            "TF_IN_AUTOMATION": "1",
            "CHECKPOINT_DISABLE": "1",
        }
        ran = subprocess.run(
            [self._program, f"-chdir={self.module / folder}", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
            check=False,
        )
        return Ran(ran.returncode, ran.stdout)


def _mirror(folder: Path, provider: str, served: Schema) -> Path:
    """Make a filesystem mirror that holds the stand-in alone, and return settings that name the mirror."""
    schema.write(folder / "schema.json", served)
    mirror = folder / "mirror"
    home = mirror / _HOST / "hashicorp" / provider / served["version"] / _system()
    home.mkdir(parents=True)
    server = shlex.join([sys.executable, "-m", "terraform_check.server", str(folder / "schema.json")])
    program = home / f"terraform-provider-{provider}_v{served['version']}"
    program.write_text(f"#!/bin/sh\nPYTHONPATH={shlex.quote(str(_TESTS))} exec {server}\n")
    program.chmod(0o755)
    settings = folder / "terraform.rc"
    path = json.dumps(str(mirror))
    settings.write_text(f"provider_installation {{\n  filesystem_mirror {{\n    path = {path}\n  }}\n}}\n")
    return settings


def _system() -> str:
    """Return Terraform's name of the system that it runs on."""
    machines = {"x86_64": "amd64", "aarch64": "arm64"}
    return f"{platform.system().lower()}_{machines.get(platform.machine(), platform.machine())}"
