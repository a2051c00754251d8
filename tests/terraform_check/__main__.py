"""Checks the modules of terraform/ against the schemas of the providers: `make lint`, in full `make soak`.

Run as `python -m terraform_check` with `tests` on the module search path, by the Python of .venv-providers.
Terraform does the checks. The provider that it finds has the schema of the real one, from bindings that pip
downloads, and creates nothing.

The short form takes the newest version of each provider. It validates the modules, their examples and their
tests. It applies two variants of each module and plans them a second time, which must change nothing.

`--long` takes every version that terraform/bindings.txt names, every variant that must apply, and every value
that must be refused. It puts in faults that must be found, and checks the rendered policies.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

from terraform_check import bindings, controls, policies
from terraform_check.bindings import Bindings, BindingsError
from terraform_check.runs import Workspace
from terraform_check.schema import Schema
from terraform_check.variants import APPLIED, LEAST, REFUSED

_ROOT: Final = Path(__file__).parents[2]
_MODULES: Final = _ROOT / "terraform"
_PINS: Final = _MODULES / "bindings.txt"
_PROVIDERS: Final = {"aws": "aws", "gcp": "google"}
_SHORT: Final = ("least", "most")
_OF_VARIABLES: Final = {"Invalid value for variable", "Required variable not set"}
"""Terraform's errors for a value that a variable does not take."""

Finding = tuple[bool, str]
"""True where it is as it should be, and the line to print."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the check and return the exit status: 1 if a fault was found."""
    parser = argparse.ArgumentParser(
        prog="terraform_check", description="Check terraform/ against providers' schemas."
    )
    parser.add_argument(
        "--long", action="store_true", help="all versions, all variants, control faults, policies"
    )
    parser.add_argument(
        "--work", type=Path, default=_ROOT / "build" / "terraform", help="folder for copies and schemas"
    )
    given = parser.parse_args(arguments)
    if shutil.which("terraform") is None:
        print("terraform is not installed: the modules are not checked against the providers' schemas")
        return 0
    work = given.work.resolve()
    check = _long if given.long else _short
    with ThreadPoolExecutor(len(_PROVIDERS), thread_name_prefix="terraform-check") as threads:
        faults = sum(threads.map(lambda cloud: _report(check(work, cloud)), _PROVIDERS))
    if faults:
        print(f"{faults} faults in terraform/, or in the check of it", file=sys.stderr)
    return 1 if faults else 0


def _report(findings: Iterator[Finding]) -> int:
    """Print findings as they come, and return the number of faults."""
    faults = 0
    try:
        for good, line in findings:
            faults += not good
            print(f"{'ok   ' if good else 'FAULT'} {line}", flush=True)
    except BindingsError as error:
        faults += 1
        print(f"FAULT {error}", flush=True)
    return faults


def _short(work: Path, cloud: str) -> Iterator[Finding]:
    """Check the modules of a cloud against the newest version of its provider."""
    served = _schema(work, cloud, bindings.pinned(_PINS, _PROVIDERS[cloud])[-1])
    workspace = _workspace(work, cloud, served)
    yield from _valid(workspace, cloud, served)
    yield from _applied(workspace, cloud, served, _SHORT)


def _long(work: Path, cloud: str) -> Iterator[Finding]:
    """Check the modules of a cloud against every version of its provider, with every variant."""
    workspace: Workspace | None = None
    for one in bindings.pinned(_PINS, _PROVIDERS[cloud]):
        served = _schema(work, cloud, one)
        workspace = _workspace(work, cloud, served)
        yield from _valid(workspace, cloud, served)
        yield from _applied(workspace, cloud, served, tuple(APPLIED[cloud]))
        tried, accepted = controls.unnoticed(workspace)
        yield (
            tried > 0 and not accepted,
            f"{cloud} {served['version']}: {tried} faults put in, not found: {accepted or 'none'}",
        )
    if workspace is not None:
        yield from _refused(workspace, cloud)
        yield from _distinct(workspace, cloud)
        yield from _policies(workspace, cloud)


def _schema(work: Path, cloud: str, one: Bindings) -> Schema:
    return bindings.schema_of(one, bindings.used(_MODULES / cloud, one.provider), work / "schemas")


def _workspace(work: Path, cloud: str, served: Schema) -> Workspace:
    folder = work / f"{cloud}-{served['version']}"
    return Workspace(_MODULES, cloud, _PROVIDERS[cloud], served, folder)


def _valid(workspace: Workspace, cloud: str, served: Schema) -> Iterator[Finding]:
    for folder in workspace.folders:
        ran = workspace.init(folder)
        if ran.status == 0:
            ran = workspace.validate(folder)
        yield (
            ran.status == 0,
            _line(f"{cloud} {served['version']}: validate {Path(cloud) / folder}", ran.message),
        )


def _applied(workspace: Workspace, cloud: str, served: Schema, names: Sequence[str]) -> Iterator[Finding]:
    for name in names:
        variables = {**LEAST[cloud], **APPLIED[cloud][name]}
        ran = workspace.apply(name, variables)
        line = f"{cloud} {served['version']}: apply {name!r}, and a second plan"
        if ran.status == 0:
            ran = workspace.plan_again(variables)
        yield ran.status == 0, _line(line, "" if ran.status == 0 else ran.message)


def _refused(workspace: Workspace, cloud: str) -> Iterator[Finding]:
    """Try the values that must be refused: by a rule of the variable, with nothing created."""
    accepted: list[str] = []
    for _, values in REFUSED[cloud]:
        ran = workspace.apply("refused", {**LEAST[cloud], **values})
        if not ran.errors or set(ran.errors) - _OF_VARIABLES or workspace.state("refused"):
            accepted.append(f"{values}: {ran.message}")
    yield not accepted, _line(f"{cloud}: {len(REFUSED[cloud])} wrong values are refused", "\n".join(accepted))


def _distinct(workspace: Workspace, cloud: str) -> Iterator[Finding]:
    """Compare the names that two buckets of one account or project give to roles and accounts."""
    names = {"role_id", "account_id"}
    one, other = (
        {
            instance["attributes"][name]
            for resource in workspace.state(variant)
            for instance in resource["instances"]
            for name in names & instance["attributes"].keys()
            if resource["mode"] == "managed"
        }
        for variant in ("least", "another bucket")
    )
    if cloud == "gcp":
        yield (
            len(one) > 0 and not one & other,
            f"{cloud}: two buckets give different names: {sorted(one | other)}",
        )


def _policies(workspace: Workspace, cloud: str) -> Iterator[Finding]:
    for variant in _SHORT if cloud == "aws" else ():
        for name, policy in policies.documents(workspace.state(variant)).items():
            found = policies.findings(name, policy)
            yield not found, _line(f"{cloud}: policy {name} of {variant!r}", "\n".join(found))


def _line(text: str, details: str) -> str:
    return "\n        ".join([text, *details.splitlines()])


if __name__ == "__main__":
    raise SystemExit(main())
