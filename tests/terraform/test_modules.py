"""The modules under terraform/: what they take and tell is written down, and refused where it is wrong."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from support.hcl import Module

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


def complaint(folder: Path, tmp_path: Path, **given: str) -> str:
    """What Terraform has against some values of a module's variables, by their declarations alone."""
    shutil.copy(folder / "variables.tf", tmp_path)
    ran = subprocess.run(
        [
            *(str(TERRAFORM), f"-chdir={tmp_path}", "plan", "-input=false", "-no-color"),
            *(f"-var={name}={value}" for name, value in given.items()),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (ran.returncode == 0) is (ran.stderr.find("Error:") < 0), ran.stderr
    return "" if ran.returncode == 0 else ran.stderr


GOOD: dict[str, dict[str, str]] = {
    "aws": {"bucket": "checkpoints"},
    "gcp": {"project": "a-project", "bucket": "checkpoints", "location": "us-central1"},
}
ACCEPTED = [
    ("aws", {}),
    ("aws", {"prefix": "runs/llm-7b"}),
    ("aws", {"kms_key_arn": "arn:aws:kms:us-east-1:123456789012:key/1234abcd-12ab"}),
    ("aws", {"transition": '{days=30,storage_class="GLACIER_IR"}'}),
    ("aws", {"instances": '["trainer"]', "expiration_days": "1", "versioning": "true"}),
    ("aws", {"service_accounts": '[{role="reader",cluster="c",namespace="n",name="s"}]'}),
    ("gcp", {}),
    ("gcp", {"prefix": "runs", "kms_key_name": "projects/p/locations/l/keyRings/r/cryptoKeys/k"}),
    ("gcp", {"soft_delete_days": "0", "transition": '{days=1,storage_class="COLDLINE"}'}),
    ("gcp", {"workload_identities": '[{role="trainer",namespace="n",name="s"}]'}),
]
REFUSED = [
    ("aws", "bucket", "Capital"),
    ("aws", "bucket", "dotted.name"),
    ("aws", "bucket", "b" * 60),  # too long for the name of a role
    ("aws", "prefix", "/runs"),
    ("aws", "prefix", "runs/"),
    ("aws", "prefix", "ru*ns"),
    ("aws", "prefix", "${aws:userid}"),
    ("aws", "kms_key_arn", "alias/checkpoints"),
    ("aws", "noncurrent_days", "0"),
    ("aws", "expiration_days", "0.5"),
    ("aws", "transition", '{days=90,storage_class="DEEP_ARCHIVE"}'),
    ("aws", "transition", '{days=7,storage_class="STANDARD_IA"}'),
    ("aws", "instances", '["admin"]'),
    ("aws", "service_accounts", '[{role="admin",cluster="c",namespace="n",name="s"}]'),
    ("gcp", "project", "P"),
    ("gcp", "name", "a-name-that-is-too-long-"),
    ("gcp", "prefix", "runs/"),
    ("gcp", "prefix", 'runs")'),
    ("gcp", "kms_key_name", "k"),
    ("gcp", "soft_delete_days", "3"),
    ("gcp", "transition", '{days=7,storage_class="GLACIER_IR"}'),
    ("gcp", "workload_identities", '[{role="admin",namespace="n",name="s"}]'),
]


@needs_terraform
@pytest.mark.parametrize(("cloud", "given"), ACCEPTED)
def test_a_good_value_is_taken(tmp_path: Path, cloud: str, given: dict[str, Any]) -> None:
    assert complaint(ROOT / cloud, tmp_path, **{**GOOD[cloud], **given}) == ""


@needs_terraform
@pytest.mark.parametrize(("cloud", "variable", "value"), REFUSED)
def test_a_value_that_can_not_be_meant_is_refused(
    tmp_path: Path, cloud: str, variable: str, value: str
) -> None:
    said = complaint(ROOT / cloud, tmp_path, **{**GOOD[cloud], variable: value})
    assert "Invalid value for variable" in said
    assert f"var.{variable}" in said


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
