"""The text of a Terraform module, worked out without Terraform and its providers.

    module = Module(folder, {"bucket": "b"}, {"aws_s3_bucket": {"this": {"arn": "arn:aws:s3:::b"}}})
    module.block("data", "aws_iam_policy_document", "trainer")

It takes the part of the language that policies and lifecycle rules are written in, and raises for any other.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import hcl2
from hcl2.rules.base import AttributeRule, BlockRule
from hcl2.rules.containers import ObjectRule, TupleRule
from hcl2.rules.expressions import BinaryOpRule, ConditionalRule, ExprTermRule
from hcl2.rules.functions import FunctionCallRule
from hcl2.rules.indexing import GetAttrExprTermRule, IndexExprTermRule
from hcl2.rules.literal_rules import IdentifierRule, IntLitRule, KeywordRule, LiteralValueRule
from hcl2.rules.strings import InterpolationRule, StringRule

Rendered = dict[str, Any]
"""A block: its attributes by name, and lists of the blocks in it, likewise."""

_OF_TERRAFORM: Final = frozenset({"count", "depends_on", "for_each"})
"""Attributes that say how often a block is there and when, and nothing of what it is."""
_OPERATORS: Final[Mapping[str, Callable[[Any, Any], Any]]] = {
    "==": lambda one, other: one == other,
    "!=": lambda one, other: one != other,
    "*": lambda one, other: one * other,
}
_FUNCTIONS: Final[Mapping[str, Callable[..., Any]]] = {
    "coalesce": lambda *values: next(value for value in values if value not in (None, "")),
    "join": lambda separator, parts: separator.join(parts),
    "replace": lambda text, old, new: text.replace(old, new),
    "sha256": lambda text: hashlib.sha256(text.encode()).hexdigest(),
    "substr": lambda text, offset, length: text[offset : offset + length],
    "trim": lambda text, characters: text.strip(characters),
}


class Module:
    """A module with its variables set.

    Args:
        folder: where its ``.tf`` files are.
        variables: those that are not to have their defaults.
        known: attributes of resources and data, as nested dicts.
    """

    def __init__(self, folder: Path, variables: Mapping[str, Any], known: Mapping[str, Any]) -> None:
        self._blocks = [block for path in sorted(folder.glob("*.tf")) for block in _blocks(path)]
        self._variables = variables
        self._known = known

    def labels(self, kind: str) -> list[tuple[str, ...]]:
        """What follows the word in each block of a kind: of a variable its name."""
        return [labels for found, labels, _ in self._blocks if found == kind]

    def block(self, kind: str, *labels: str, each: Mapping[str, Any] | None = None) -> Rendered:
        """Work out one block, for one element of its ``for_each`` where it has one."""
        return self._rendered(self._body(kind, *labels), {} if each is None else {"each": each})

    def local(self, name: str) -> Any:
        """Work out one local value."""
        for kind, _, body in self._blocks:
            for attribute in _children(body, AttributeRule) if kind == "locals" else ():
                if _name(attribute) == name:
                    return self._value(attribute.expression, {})
        raise KeyError(name)

    def variable(self, name: str) -> Any:
        """Say what was given for a variable, or else its default."""
        if name in self._variables:
            return self._variables[name]
        for attribute in _children(self._body("variable", name), AttributeRule):
            if _name(attribute) == "default":
                return self._value(attribute.expression, {})
        raise KeyError(name)

    def _body(self, kind: str, *labels: str) -> Any:
        (body,) = (body for *found, body in self._blocks if found == [kind, labels])
        return body

    def _rendered(self, body: Any, scope: Mapping[str, Any]) -> Rendered:
        rendered: Rendered = {}
        for child in body.children:
            if isinstance(child, AttributeRule) and _name(child) not in _OF_TERRAFORM:
                rendered[_name(child)] = self._value(child.expression, scope)
            elif isinstance(child, BlockRule):
                kind, labels, inner = _parts(child)
                if kind == "dynamic":
                    rendered.setdefault(labels[0], []).extend(self._each(inner, labels[0], scope))
                else:
                    rendered.setdefault(kind, []).append(self._rendered(inner, scope))
        return rendered

    def _each(self, body: Any, name: str, scope: Mapping[str, Any]) -> list[Rendered]:
        """What a dynamic block makes of the elements of its ``for_each``."""
        (over,) = (child.expression for child in _children(body, AttributeRule))
        (content,) = (_parts(child)[2] for child in _children(body, BlockRule))
        elements = self._value(over, scope)
        return [self._rendered(content, {**scope, name: {"value": element}}) for element in elements]

    def _value(self, node: Any, scope: Mapping[str, Any]) -> Any:
        match node:
            case ExprTermRule() | InterpolationRule():
                return self._value(node.expression, scope)
            case LiteralValueRule() | KeywordRule() | IntLitRule():
                return json.loads(str(node.token.value))
            case StringRule():
                return self._text(node, scope)
            case TupleRule():
                return [self._value(element, scope) for element in node.elements]
            case ObjectRule():
                pairs = ((one.key.serialize(), one.expression) for one in node.elements)
                return {str(key).strip('"'): self._value(inner, scope) for key, inner in pairs}
            case ConditionalRule():
                chosen = node.if_true if self._value(node.condition, scope) else node.if_false
                return self._value(chosen, scope)
            case BinaryOpRule():
                term = node.binary_term
                operator = _OPERATORS[str(term.binary_operator.token.value).strip()]
                return operator(self._value(node.expr_term, scope), self._value(term.expr_term, scope))
            case FunctionCallRule():
                function = _FUNCTIONS[".".join(str(name.token.value) for name in node.identifiers)]
                given = node.arguments.arguments if node.arguments else ()
                return function(*(self._value(argument, scope) for argument in given))
            case _:
                return self._reference(node, scope)

    def _reference(self, node: Any, scope: Mapping[str, Any]) -> Any:
        match node:
            case IdentifierRule():
                name = str(node.token.value)
                return scope[name] if name in scope else self._known[name]
            case IndexExprTermRule():
                term, index = node.children
                return self._value(term, scope)[self._value(index.index_expression, scope)]
            case GetAttrExprTermRule():
                name = str(node.get_attr.identifier.token.value)
                match node.expr_term.serialize():
                    case "var" | "${var}":
                        return self.variable(name)
                    case "local" | "${local}":
                        return self.local(name)
                    case _:
                        return self._value(node.expr_term, scope)[name]
            case _:
                raise NotImplementedError(type(node).__name__)

    def _text(self, node: StringRule, scope: Mapping[str, Any]) -> str:
        parts: list[str] = []
        for part in node.string_parts:
            content: Any = part.content
            inner = isinstance(content, InterpolationRule)
            parts.append(str(self._value(content, scope)) if inner else json.loads(f'"{content.value}"'))
        return "".join(parts)


@functools.cache
def _blocks(path: Path) -> list[tuple[str, tuple[str, ...], Any]]:
    start: Any = hcl2.parses(path.read_text())
    return [_parts(block) for block in _children(start.body, BlockRule)]


def _parts(block: Any) -> tuple[str, tuple[str, ...], Any]:
    kind, *labels = (str(label.serialize()).strip('"') for label in block.labels)
    return kind, tuple(labels), block.body


def _children(body: Any, kind: type[Any]) -> list[Any]:
    return [child for child in body.children if isinstance(child, kind)]


def _name(attribute: Any) -> str:
    return str(attribute.identifier.token.value)
