"""The modules under terraform/: what they take and tell is written down, and refused where it is wrong."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import pytest

from support.hcl import Module
from terraform_check.variants import APPLIED, LEAST, REFUSED, Variables

ROOT = Path(__file__).parents[2] / "terraform"
MODULES = [ROOT / "aws", ROOT / "gcp"]
FOLDERS = sorted({path.parent for path in ROOT.rglob("*.tf") if ".terraform" not in path.parts})
CALLERS = [folder for folder in FOLDERS if folder not in MODULES]
TERRAFORM = shutil.which("terraform")
needs_terraform = pytest.mark.skipif(TERRAFORM is None, reason="terraform is not installed")


def named(folder: Path) -> str:
    return str(folder.relative_to(ROOT))


def names(folder: Path, kind: str) -> set[str]:
    return {label for (label,) in Module(folder, {}, {}).labels(kind)}


def text(folder: Path) -> str:
    return "\n".join(path.read_text() for path in sorted(folder.glob("*.tf")))


def blocks(folder: Path, kind: str) -> dict[str, str]:
    """The text of each block of a kind, by its name."""
    return dict(re.findall(rf'^{kind} "(\w+)" {{\n(.*?)^}}', text(folder), re.MULTILINE | re.DOTALL))


@pytest.mark.parametrize("folder", FOLDERS, ids=named)
def test_every_variable_has_a_type_and_every_one_and_every_output_says_what_it_is(folder: Path) -> None:
    variables, outputs = blocks(folder, "variable"), blocks(folder, "output")
    assert (set(variables), set(outputs)) == (names(folder, "variable"), names(folder, "output"))
    for name, block in {**variables, **outputs}.items():
        assert re.search(r'^  description = ".+"$', block, re.MULTILINE), name
    for name, block in variables.items():
        assert re.search(r"^  type +=", block, re.MULTILINE), name


@pytest.mark.parametrize("folder", MODULES, ids=named)
@pytest.mark.parametrize(("title", "kind"), [("Inputs", "variable"), ("Outputs", "output")])
def test_the_tables_of_the_readme_are_those_of_the_module(folder: Path, title: str, kind: str) -> None:
    (table,) = re.findall(
        rf"^## {title}\n\n(.*?)(?:\n\n|\Z)", (folder / "README.md").read_text(), re.DOTALL | re.MULTILINE
    )
    told = re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)
    assert told == list(blocks(folder, kind))


@pytest.mark.parametrize("folder", FOLDERS, ids=named)
def test_the_versions_of_terraform_and_of_the_provider_are_held(folder: Path) -> None:
    (cloud,) = Module(folder, {}, {}).block("terraform")["required_providers"]
    assert Module(folder, {}, {}).block("terraform")["required_version"] == ">= 1.9"
    (version,) = (one["version"] for one in cloud.values())
    assert re.fullmatch(r"~> \d+\.\d+|>= \d+\.\d+, < \d+\.\d+", version)
    module = ROOT / named(folder).partition("/")[0]
    assert [cloud] == Module(module, {}, {}).block("terraform")["required_providers"]


@pytest.mark.parametrize("folder", CALLERS, ids=named)
def test_an_example_gives_a_module_what_it_takes(folder: Path) -> None:
    (call,) = re.findall(r'^module "\w+" {\n(.*?)^}', text(folder), re.MULTILINE | re.DOTALL)
    (source,) = re.findall(r'^  source = "(.+)"$', call, re.MULTILINE)
    module = (folder / source).resolve()
    assert module in MODULES
    given = set(re.findall(r"^  (\w+) +=", call, re.MULTILINE)) - {"source"}
    variables = blocks(module, "variable")
    assert given <= variables.keys()
    assert {name for name, block in variables.items() if "  default " not in block} <= given


@pytest.mark.parametrize("cloud", MODULES, ids=named)
def test_what_the_throw_away_bucket_holds_is_gone_after_a_day(cloud: Path) -> None:
    (call,) = re.findall(r'^module "bucket" {\n(.*?)^}', text(cloud / "test"), re.MULTILINE | re.DOTALL)
    given = dict(re.findall(r"^  (\w+) += (.+)$", call, re.MULTILINE))
    assert (given["expiration_days"], given["force_destroy"]) == ("1", "true")


def test_whatever_checkov_is_to_skip_has_its_reason_beside_it() -> None:
    files = [path for path in ROOT.rglob("*") if path.is_file() and ".terraform" not in path.parts]
    skips = [
        line.strip()
        for path in files
        if path.suffix != ".txt"
        for line in path.read_text().splitlines()
        if "skip" in line
    ]
    assert skips
    for skip in skips:
        assert re.fullmatch(r"#checkov:skip=CKV2?_[A-Z]+_\d+: \S.{30,}", skip), skip


@needs_terraform
def test_the_files_are_formatted() -> None:
    ran = subprocess.run(
        [str(TERRAFORM), "fmt", "-check", "-diff", "-recursive", str(ROOT)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout


def refusals(cloud: str, cases: Mapping[str, Variables], folder: Path) -> dict[str, set[str]]:
    """Plan a call of a module for each case, and return the variables whose rules refuse something, by case.

    The module is its variables alone, so that no provider is needed. A plan with a refused constant ends
    before rules that compare variables are tried. So the cases that are left are planned again.
    """
    module = folder / "module"
    module.mkdir()
    shutil.copy(ROOT / cloud / "variables.tf", module)
    for name, variables in cases.items():
        call = {"module": {name: {"source": "./module", **LEAST[cloud], **variables}}}
        (folder / f"{name}.tf.json").write_text(json.dumps(call, indent=1))
    terraform(folder, "init", "-no-color")
    refused: dict[str, set[str]] = {}
    while refused.keys() < cases.keys() and (found := _refused_arguments(folder)):
        refused |= found
        for name in found:
            (folder / f"{name}.tf.json").unlink()
    return refused


def _refused_arguments(folder: Path) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    ran = terraform(folder, "plan", "-input=false", "-json")
    for line in ran.stdout.splitlines():
        message = json.loads(line)
        if message["type"] == "diagnostic" and message["diagnostic"]["severity"] == "error":
            place = message["diagnostic"]["range"]
            argument = re.match(r' *"(\w+)":', message["diagnostic"]["snippet"]["code"])
            assert argument, line
            found.setdefault(place["filename"].removesuffix(".tf.json"), set()).add(argument[1])
    assert bool(found) is (ran.returncode != 0), ran.stdout
    return found


def terraform(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(TERRAFORM), f"-chdir={folder}", *arguments], capture_output=True, text=True, check=False
    )


GOOD: Final[Mapping[str, Sequence[Variables]]] = {
    "aws": [
        *APPLIED["aws"].values(),
        {"prefix": "runs/llm-7b"},
        {"prefix": "...a/b..", "noncurrent_days": 36500},
        {"bucket": "a" * 56, "name": "a"},
        {"bucket": "an-sthree-xn--s3alias-b", "log_bucket": "a.b"},
        {"kms_key_arn": "arn:aws-us-gov:kms:us-gov-west-1:123456789012:key/mrk-1234abcd"},
        {"transition": {"days": 30, "storage_class": "GLACIER_IR"}, "expiration_days": 31},
    ],
    "gcp": [
        *APPLIED["gcp"].values(),
        {"prefix": "...a/b..", "noncurrent_days": 36500},
        {"bucket": "a_b", "location": "NAM4", "log_bucket": "a.b"},
        {"name": "a", "soft_delete_days": 90},
        {"transition": {"days": 1, "storage_class": "COLDLINE"}, "expiration_days": 2},
    ],
}


@needs_terraform
@pytest.mark.parametrize("cloud", GOOD)
def test_good_values_are_taken(tmp_path: Path, cloud: str) -> None:
    assert refusals(cloud, {f"case{at}": given for at, given in enumerate(GOOD[cloud])}, tmp_path) == {}


@needs_terraform
@pytest.mark.parametrize("cloud", REFUSED)
def test_values_that_a_provider_refuses_are_refused_by_the_rule_of_their_variable(
    tmp_path: Path, cloud: str
) -> None:
    cases = {f"case{at}": values for at, (_, values) in enumerate(REFUSED[cloud])}
    refused = refusals(cloud, cases, tmp_path)
    wrong = [
        (variable, values, refused.get(name))
        for (name, values), (variable, _) in zip(cases.items(), REFUSED[cloud], strict=True)
        if refused.get(name) != {variable}
    ]
    assert wrong == []


@pytest.mark.parametrize("folder", CALLERS, ids=named)
def test_every_example_has_the_outputs_that_the_readme_reads(folder: Path) -> None:
    assert {"uri", "environment"} <= blocks(folder, "output").keys()


@pytest.mark.parametrize("module", MODULES, ids=named)
def test_the_readme_reads_outputs_that_its_own_example_has(module: Path) -> None:
    readme = (module / "README.md").read_text()
    read = set(re.findall(r"terraform output -\w+ (\w+)", readme))
    (example, *_) = re.findall(r"```hcl\n(.*?)```", readme, re.DOTALL)
    assert read == {"uri", "environment"}
    assert read <= set(re.findall(r'^output "(\w+)"', example, re.MULTILINE))


def test_every_variable_of_the_modules_takes_a_null_or_is_required() -> None:
    for cloud in GOOD:
        optional = {name for name in blocks(ROOT / cloud, "variable") if name not in LEAST[cloud]}
        assert APPLIED[cloud]["nulls"].keys() == optional
        assert {variable for variable, values in REFUSED[cloud] if None in values.values()} >= LEAST[
            cloud
        ].keys()
