"""Which names an object may have where names become paths."""

from __future__ import annotations

from cloudckpt.backends.errors import ConfigurationError


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
