"""Parsers of command line arguments."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from datetime import timedelta
from typing import Any, Final

import pydantic

from cloudckpt.backends.config.options import uses_option
from cloudckpt.backends.errors import ConfigurationError

_SIZE: Final = pydantic.TypeAdapter(pydantic.ByteSize)
_UNITS: Final = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}
_DURATION = re.compile(r"([0-9]{1,6}(?:\.[0-9]+)?)([smhdw])")


def options_of(given: Iterable[str]) -> dict[str, Any]:
    """Options of a URI, each given as ``name=value``; ``storage_options`` has a JSON object for its value.

    Nothing that is refused is repeated, for it may be a secret.

    Raises:
        ConfigurationError: one can't be read, or is given twice.
    """
    options: dict[str, Any] = {}
    for one in given:
        name, equals, value = one.partition("=")
        if not equals or not name.isidentifier():
            raise ConfigurationError(
                "an option is not of the form name=value", hint="Write it like -o region=eu-central-1"
            )
        if name in options:
            raise ConfigurationError(f"option {name!r} is given twice", hint="Give it once")
        options[name] = _from_json(value) if name == "storage_options" else value
    return options


def for_each_side(
    protocols: tuple[str, str], both: Iterable[str], source: Iterable[str], destination: Iterable[str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options of two URIs: those for both go to each store that uses them; those for one override them.

    Raises:
        ConfigurationError: one can't be read, is given twice, or has no store that uses it.
    """
    common = options_of(both)
    own = options_of(source), options_of(destination)
    taken = [{name: value for name, value in common.items() if uses_option(one, name)} for one in protocols]
    if unused := sorted(common.keys() - taken[0].keys() - taken[1].keys()):
        raise ConfigurationError(
            f"option {unused[0]!r} can't be honoured by {' or '.join(f'{one}://' for one in protocols)}",
            hint="Leave it out",
        )
    return {**taken[0], **own[0]}, {**taken[1], **own[1]}


def duration(text: str) -> timedelta:
    """Read a time such as ``90s``, ``30m``, ``12h``, ``1d``, ``2w``.

    Raises:
        ConfigurationError: it is none.
    """
    match = _DURATION.fullmatch(text.strip().lower())
    if match is None:
        raise ConfigurationError(
            f"{text!r} is not a time", hint="Write it like 90s, 30m, 12h, 1d or 2w; 0s is no time at all"
        )
    return timedelta(**{_UNITS[match[2]]: float(match[1])})


def size_of(text: str) -> int:
    """Read a size such as ``64MiB``, ``8MB``, ``1048576``, in bytes.

    Raises:
        ConfigurationError: it is none.
    """
    try:
        size = int(_SIZE.validate_python(text))
    except pydantic.ValidationError:
        size = 0
    if size <= 0:
        raise ConfigurationError(f"{text!r} is not a size", hint="Write it like 64MiB, 8MB or 1048576")
    return size


def steps_or_time(text: str) -> int | timedelta:
    """Read a number of steps, such as ``1000``, or a time, such as ``6h``.

    Raises:
        ConfigurationError: it is neither.
    """
    if text.isascii() and text.isdecimal() and int(text) > 0:
        return int(text)
    try:
        return duration(text)
    except ConfigurationError as error:
        raise ConfigurationError(
            f"{text!r} is neither a number of steps nor a time", hint="Write it like 1000, 30m, 12h or 1d"
        ) from error


def _from_json(text: str) -> dict[str, Any]:
    try:
        value: object = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise ConfigurationError(
            "storage_options is not a JSON object",
            hint="""Write it like -o storage_options='{"client_kwargs": {"verify": false}}'""",
        ) from None
    return {str(name): held for name, held in value.items()}
