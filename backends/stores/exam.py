"""The part of an examination that depends on the kind of store, beside its common operations."""

from __future__ import annotations

import importlib
from collections.abc import Generator, Iterator
from typing import Final, Protocol, cast

from cloudckpt.backends.config.target import Target
from cloudckpt.backends.finding import Finding

_EXAMS: Final = {
    "file": ("local.exam", "LocalExam"),
    "gs": ("gcs.exam", "GCSExam"),
    "s3": ("s3.exam", "S3Exam"),
}


class Exam(Protocol):
    """The questions that are asked of each kind of store in its own words."""

    def reach(self) -> Generator[Finding, None, bool]:
        """Examine the connection; return False where nothing else can be tried.

        Raises:
            ConfigurationError: an option can't be used.
        """
        ...

    def settings(self, example: str | None, *, gc_aborts: bool = True) -> Iterator[Finding]:
        """Examine how the place is set up.

        ``example`` names an object that was just put, if one could be. ``gc_aborts`` is False where the store
        does not list or abort uploads.
        """
        ...

    def action(self, operation: str, error: Exception | None = None) -> str:
        """Return the permission for an operation of the store, and its resource; empty where there are none.

        ``error`` is what the operation was refused with: it may have been another step of it.
        """
        ...

    def close(self) -> None:
        """Let connections go."""
        ...


class PlainExam:
    """Of a store that nothing more is known of than its operations."""

    def __init__(self, target: Target) -> None:
        self._target = target

    def reach(self) -> Generator[Finding, None, bool]:
        if self._target.protocol == "memory":
            yield Finding(
                "place",
                "warning",
                "the memory of one process: what is saved there is gone with it",
                "Use it for trials alone",
            )
        else:
            yield Finding(
                "place",
                "warning",
                f"{self._target.protocol}:// is served by the generic store, over fsspec",
                "It supports no conditions and moves every byte three times; S3 and GCS do better",
            )
        return True

    def settings(self, example: str | None, *, gc_aborts: bool = True) -> Iterator[Finding]:
        del example, gc_aborts
        return iter(())

    def action(self, operation: str, error: Exception | None = None) -> str:
        del operation, error
        return ""

    def close(self) -> None:
        """There are none."""


def open_exam(target: Target) -> Exam:
    """Return what examines the kind of store that the target is on. No request is made."""
    if target.protocol not in _EXAMS:
        return PlainExam(target)
    module, name = _EXAMS[target.protocol]
    exam = getattr(importlib.import_module(f"cloudckpt.backends.stores.{module}"), name)
    return cast(Exam, exam(target))
