"""The errors of a pickle that is not what a pickler writes, and of one that this machine can't load."""

from __future__ import annotations


class MalformedError(ValueError):
    """A pickle that no pickler wrote of a value known here."""


class NotHereError(Exception):
    """A value needs a device or data that this machine lacks."""

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.hint = hint
