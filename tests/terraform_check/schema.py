"""The schema of a Terraform provider, as far as the modules use it.

The check keeps it as JSON between the process that reads the bindings and the processes that serve it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypedDict


class Attribute(TypedDict):
    """An attribute of a block."""

    type: Any
    """Terraform's JSON form of a type: "string", ["list", "string"], ["object", {...}]."""
    required: bool
    optional: bool
    computed: bool


class Nested(TypedDict):
    """A block in a block."""

    mode: str
    """"single", "list" or "set"."""
    required: bool
    block: Block


class Block(TypedDict):
    """The attributes and blocks of a resource, of a data source, of a provider, or of a block in one."""

    attributes: dict[str, Attribute]
    blocks: dict[str, Nested]


class Schema(TypedDict):
    """The schema of one version of a provider."""

    version: str
    provider: Block
    resource: dict[str, Block]
    data: dict[str, Block]


def read(path: Path) -> Schema:
    """Read a schema that `write` wrote."""
    schema: Schema = json.loads(path.read_text())
    return schema


def write(path: Path, schema: Schema) -> None:
    """Write a schema. Another process sees the whole file or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(schema, indent=1, sort_keys=True))
    partial.replace(path)
