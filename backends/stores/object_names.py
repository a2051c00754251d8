"""Names of objects: which there may be where names become paths, and that of a probe."""

from __future__ import annotations

import re
import uuid
from typing import Final

from cloudckpt.backends.errors import ConfigurationError

HIDDEN_PREFIX: Final = ".cloudckpt-"
"""Names of hidden objects begin so."""

PROBE_PREFIX: Final = ".cloudckpt-probe."
PROBE: Final = re.compile(rf"(?:.*/)?{re.escape(PROBE_PREFIX)}[0-9a-f]{{32}}")
"""Names of the hidden objects by which a store is tried; one that was cut off may be deleted."""

PIN: Final = ".cloudckpt-pin"
"""The hidden object beside a checkpoint that keeps it from retention."""

DATA: Final = re.compile(r"(?:.*/)?__\d+_\d+\.[0-9a-f]{32}\.distcp")
"""Names of data objects, which carry the id of their save."""

STEP_PREFIX: Final = "step-"
STEP_DIGITS: Final = 10
STEP: Final = re.compile(rf"(?:.*/)?{STEP_PREFIX}[0-9]{{{STEP_DIGITS}}}", re.DOTALL)
"""Names of the folders that a run makes, one for each step."""


def probe_name() -> str:
    """Return a new name for such an object."""
    return f"{PROBE_PREFIX}{uuid.uuid4().hex}"


def check_name(name: str, uri: str) -> str:
    """Return ``name`` if it is a relative path without ``.``, ``..`` or empty segments.

    Raises:
        ConfigurationError: it is not.
    """
    if "\0" in name or any(segment in ("", ".", "..") for segment in name.split("/")):
        raise ConfigurationError(
            f"{name!r} can't be the name of an object",
            uri=uri,
            object_name=name,
            hint="A name is a relative path without empty, . or .. segments",
        )
    return name
