"""Reads the schema of one resource or data source out of a provider's CDKTF bindings.

The bindings are generated from the real provider's `terraform providers schema -json`. They keep the name of
each attribute, its type, whether it is a block, whether it is required (in index.d.ts), and which attributes
are only computed (getters without a setter). They do not keep defaults and validators, and the older ones do
not keep whether an optional attribute is computed too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from terraform_check.schema import Attribute, Block

_CLASS: Final = re.compile(
    r"^class (\w+) extends [\w.]*Terraform(Resource|DataSource) \{.*?terraformResourceType: '(\w+)'",
    re.MULTILINE | re.DOTALL,
)
_FUNCTION: Final = re.compile(
    r"^function (\w+)ToHclTerraform\(struct\) \{\n(.*?)^\}", re.MULTILINE | re.DOTALL
)
_ENTRY: Final = re.compile(
    r'^ {8,16}"?(?P<name>\w+)"?: \{\n\s+value: (?P<value>.*),\n\s+isBlock: (?P<block>true|false),\n'
    r'\s+type: "(?P<mode>\w+)",\n\s+storageClassType: "(?P<storage>\w+)",',
    re.MULTILINE,
)
_SYNTHESIZE: Final = re.compile(r"synthesizeHclAttributes\(\) \{\n(.*?)^    \}", re.MULTILINE | re.DOTALL)
_INTERFACE: Final = re.compile(
    r"^export interface (\w+)(?: extends [\w.]+)? \{\n(.*?)^\}", re.MULTILINE | re.DOTALL
)
_PROPERTY: Final = re.compile(r"/\*\*(.*?)\*/\s*readonly \w+(\??):", re.DOTALL)
_DOCUMENTED: Final = re.compile(r"docs(?:/[\w-]+)*#(\w+) ")
_GETTER: Final = re.compile(
    r"^    get \w+\(\) \{\n\s+return (?:\w+\.Fn\.tolist\()?this\.get(\w+)Attribute\('(\w+)'\)", re.MULTILINE
)
_NESTED_GETTER: Final = re.compile(r'^ +(?:this\.)?_\w+ = new \w+\(this, "(\w+)"', re.MULTILINE)
_COMPUTED: Final = re.compile(
    r"^ +// (\w+) - computed: (true|false), optional: \w+, required: \w+ *$", re.MULTILINE
)

_OF_STORAGE: Final[Mapping[str, Any]] = {
    "string": "string",
    "number": "number",
    "boolean": "bool",
    "any": "dynamic",
    "stringList": ["list", "string"],
    "numberList": ["list", "number"],
    "booleanList": ["list", "bool"],
    "stringMap": ["map", "string"],
    "numberMap": ["map", "number"],
    "booleanMap": ["map", "bool"],
    "anyMap": ["map", "dynamic"],
}
_OF_GETTER: Final[Mapping[str, Any]] = {
    "String": "string",
    "Number": "number",
    "Boolean": "bool",
    "List": ["list", "string"],
    "NumberList": ["list", "number"],
    "StringMap": ["map", "string"],
    "NumberMap": ["map", "number"],
    "BooleanMap": ["map", "bool"],
    "AnyMap": ["map", "dynamic"],
}


class UnreadableBindingsError(Exception):
    """The text of the bindings does not have the form that this module reads."""


@dataclass(frozen=True, slots=True)
class Source:
    """The text of one class of the bindings: index.js and index.d.ts of its folder."""

    script: str
    declarations: str


def resource(source: Source) -> Block:
    """Read the schema of a resource or of a data source.

    Raises:
        UnreadableBindingsError: the text has no such class.
    """
    found = _CLASS.search(source.script)
    if found is None:
        raise UnreadableBindingsError("index.js has no class of a resource or of a data source")
    name = found[1]
    own = source.script[found.start() :]
    reader = _Reader(source)
    block = reader.block(_entries(own), f"{name}Config")
    for kind, attribute in _GETTER.findall(own):
        _add_computed(block, attribute, _OF_GETTER.get(kind, "dynamic"))
    for attribute in _NESTED_GETTER.findall(own):
        _add_computed(block, attribute, "dynamic")
    # The newer bindings have comments that say what is computed.
    for attribute, computed in _COMPUTED.findall(own):
        if attribute in block["attributes"] and not block["attributes"][attribute]["required"]:
            block["attributes"][attribute]["computed"] = computed == "true"
    _add_computed(block, "id", "string")
    return block


def provider(source: Source) -> tuple[str, Block]:
    """Read the version of a provider, and the names and types of the attributes of its own block.

    Raises:
        UnreadableBindingsError: the text names no version.
    """
    version = re.search(r"providerVersion: '([^']+)'", source.script)
    if version is None:
        raise UnreadableBindingsError("lib/provider/index.js names no providerVersion")
    block: Block = {"attributes": {}, "blocks": {}}
    for entry in _entries(source.script):
        if entry["block"] == "false":
            kind = (
                ["set", "string"] if entry["mode"] == "set" else _OF_STORAGE.get(entry["storage"], "dynamic")
            )
            block["attributes"][entry["name"]] = _attribute(kind, required=False)
    return version[1], block


class _Reader:
    """Reads the blocks of one class, which refer to functions and interfaces of the same text."""

    def __init__(self, source: Source) -> None:
        self._functions = dict(_FUNCTION.findall(source.script))
        self._required = {
            name: {
                documented[-1]: optional == ""
                for comment, optional in _PROPERTY.findall(body)
                if (documented := _DOCUMENTED.findall(comment))
            }
            for name, body in _INTERFACE.findall(source.declarations)
        }

    def block(self, entries: list[dict[str, str]], interface: str) -> Block:
        required = self._required.get(interface, {})
        block: Block = {"attributes": {}, "blocks": {}}
        for entry in entries:
            name, function = entry["name"], self._function(entry["value"])
            if entry["block"] == "true" and function is not None:
                block["blocks"][name] = {
                    "mode": "single" if entry["mode"] == "struct" else entry["mode"],
                    "required": required.get(name, False),
                    "block": self.block(
                        _matches(self._functions[function]), function[0].upper() + function[1:]
                    ),
                }
            else:
                block["attributes"][name] = _attribute(self._type(entry), required=required.get(name, False))
        return block

    def _type(self, entry: dict[str, str]) -> Any:
        simple = _OF_STORAGE.get(entry["storage"])
        if simple is not None:
            return ["set", simple[1]] if entry["mode"] == "set" and isinstance(simple, list) else simple
        function = self._function(entry["value"])
        if function is None:
            return "dynamic"
        of = ["object", {one["name"]: self._type(one) for one in _matches(self._functions[function])}]
        return of if entry["mode"] == "struct" else [entry["mode"], of]

    def _function(self, value: str) -> str | None:
        return next(
            (one for one in re.findall(r"(\w+)ToHclTerraform\b", value) if one in self._functions), None
        )


def _entries(script: str) -> list[dict[str, str]]:
    body = _SYNTHESIZE.search(script)
    return _matches(body[1]) if body else []


def _matches(body: str) -> list[dict[str, str]]:
    return [one.groupdict() for one in _ENTRY.finditer(body)]


def _attribute(kind: Any, *, required: bool) -> Attribute:
    # An optional attribute counts as computed until a comment of the bindings denies it.
    return {"type": kind, "required": required, "optional": not required, "computed": not required}


def _add_computed(block: Block, name: str, kind: Any) -> None:
    if name not in block["attributes"] and name not in block["blocks"]:
        block["attributes"][name] = {"type": kind, "required": False, "optional": False, "computed": True}
