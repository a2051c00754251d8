"""Gets the schemas of the versions that terraform/bindings.txt names, from bindings that pip downloads.

A wheel has about 50 MB and holds every resource of its provider. Only the types that the modules use are
read, which takes seconds, and their schema is kept under build/terraform/schemas.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final

from terraform_check import jsii, schema
from terraform_check.schema import Schema

_TYPE: Final = re.compile(
    rb"^class \w+ extends [\w.]*Terraform(Resource|DataSource) \{.*?terraformResourceType: '(\w+)'",
    re.MULTILINE | re.DOTALL,
)
_INDEX: Final = re.compile(r"package/lib/([\w-]+)/(index\.js|index\.d\.ts)")
_PIN: Final = re.compile(r"([a-z-]+-provider-([a-z]+))==([0-9.]+)")


class BindingsError(Exception):
    """The schema of a version of a provider can't be had, or lacks types that the modules use."""


@dataclass(frozen=True, slots=True)
class Bindings:
    """One line of terraform/bindings.txt."""

    package: str
    provider: str
    release: str

    @property
    def requirement(self) -> str:
        return f"{self.package}=={self.release}"


def pinned(path: Path, provider: str) -> list[Bindings]:
    """Read the bindings of a provider, the oldest version of it first.

    Raises:
        ValueError: a line is none of bindings with a version.
    """
    found: list[Bindings] = []
    for line in path.read_text().splitlines():
        requirement = line.partition("#")[0].strip()
        if not requirement:
            continue
        pin = _PIN.fullmatch(requirement)
        if pin is None:
            raise ValueError(f"{path}: {requirement!r} does not pin the bindings of a provider")
        found.append(Bindings(pin[1], pin[2], pin[3]))
    return [one for one in found if one.provider == provider]


def used(modules: Path, provider: str) -> set[tuple[str, str]]:
    """Return the kind ("resource" or "data") and the type of every resource and data source of a provider."""
    text = "\n".join(
        path.read_text() for path in sorted(modules.rglob("*.tf")) if ".terraform" not in path.parts
    )
    return {
        (kind, name)
        for kind, name in re.findall(r'^(resource|data) "(\w+)"', text, re.MULTILINE)
        if name.startswith(f"{provider}_")
    }


def schema_of(bindings: Bindings, types: set[tuple[str, str]], cache: Path) -> Schema:
    """Return the schema of the types, from the cache or from bindings that are downloaded.

    Raises:
        BindingsError: pip could not download the bindings, or they do not have all of the types.
    """
    path = cache / f"{bindings.package}-{bindings.release}.json"
    if path.exists():
        kept = schema.read(path)
        if types <= _types(kept):
            return kept
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "-m",
            "pip",
            "--quiet",
            "--disable-pip-version-check",
            "download",
            "--no-deps",
        ]
        if subprocess.run([*command, "--dest", folder, bindings.requirement], check=False).returncode:
            raise BindingsError(f"pip could not download {bindings.requirement}: see its message above")
        (wheel,) = Path(folder).glob("*.whl")
        found = _read(wheel, types)
    if missing := types - _types(found):
        names = ", ".join(sorted(name for _, name in missing))
        raise BindingsError(f"hashicorp/{bindings.provider} {found['version']} has no {names}")
    schema.write(path, found)
    return found


def _types(found: Schema) -> set[tuple[str, str]]:
    return {("resource", name) for name in found["resource"]} | {("data", name) for name in found["data"]}


def _read(wheel: Path, types: set[tuple[str, str]]) -> Schema:
    found: Schema = {"version": "", "provider": {"attributes": {}, "blocks": {}}, "resource": {}, "data": {}}
    with zipfile.ZipFile(wheel) as archive:
        (inner,) = (name for name in archive.namelist() if name.endswith(".jsii.tgz"))
        with archive.open(inner) as compressed:
            for folder, source in _sources(compressed, types):
                if folder == "provider":
                    found["version"], found["provider"] = jsii.provider(source)
                    continue
                kind, name = _type_of(source.script.encode())
                found["data" if kind == "data" else "resource"][name] = jsii.resource(source)
    return found


def _sources(compressed: IO[bytes], types: set[tuple[str, str]]) -> Iterator[tuple[str, jsii.Source]]:
    """Yield the text of the provider and of each of the types."""
    texts: dict[str, dict[str, bytes]] = {}
    with tarfile.open(fileobj=compressed, mode="r|gz") as archive:
        for member in archive:
            index = _INDEX.fullmatch(member.name)
            content = archive.extractfile(member) if index else None
            if index is None or content is None:
                continue
            texts.setdefault(index[1], {})[index[2]] = content.read()
            if len(texts[index[1]]) == 2:
                both = texts.pop(index[1])
                if index[1] == "provider" or _type_of(both["index.js"]) in types:
                    yield index[1], jsii.Source(both["index.js"].decode(), both["index.d.ts"].decode())


def _type_of(script: bytes) -> tuple[str, str]:
    found = _TYPE.search(script)
    if found is None:  # an ephemeral resource, or a function
        return "", ""
    return ("data" if found[1] == b"DataSource" else "resource"), found[2].decode()
