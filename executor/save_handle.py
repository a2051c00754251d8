"""The handle of a save in the background."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from types import TracebackType
from typing import Any, Generic, TypeVar

from torch.distributed.checkpoint.metadata import Metadata

from cloudckpt.backends.system.tracebacks import trimmed
from cloudckpt.executor.forks import Owner
from cloudckpt.executor.messages import Sealed
from cloudckpt.executor.progress import Progress
from cloudckpt.executor.unobserved_failures import Unobserved
from cloudckpt.executor.worker import main_unpickler

_WAITING = Progress(0, 0, "waiting")

T = TypeVar("T")


class _OwnedFuture(Future[T], Generic[T]):
    """A future that raises an error, and does not wait for ever, in a forked child of its process."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self._owner = Owner(what)

    def result(self, timeout: float | None = None) -> T:
        self._check()
        return super().result(timeout)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        self._check()
        return super().exception(timeout)

    def _check(self) -> None:
        if self._owner.is_elsewhere and not self.done():
            self._owner.check("result()")


class SaveHandle(_OwnedFuture[T], Generic[T]):
    """A save that goes on while training does: a future of DCP's ``Metadata``, or of what is made of it.

    It ends when every rank's has ended, and alike on each: with its result once the checkpoint is committed,
    or with the error that failed the save. A save that was skipped is ``cancelled()``; one that was accepted
    can't be cancelled.

    Attributes:
        staged: done when the state has been copied: from then on it may change. It is done already when
            ``execute_save`` was given the state itself and not a future of it.
    """

    def __init__(self, make: Callable[[Metadata], T]) -> None:
        super().__init__("this save under way")
        self.staged: Future[None] = _OwnedFuture("this save under way")
        self._read: Callable[[], Progress] = lambda: _WAITING
        self._make = make
        self._sealed: Sealed | None = None
        self._size: int | None = None
        self._unsealing = threading.Lock()
        self._made: T | None = None
        self._observed = False
        self._trace: TracebackType | None = None
        self._unobserved: Unobserved | None = None

    @property
    def failed(self) -> bool:
        """True if the save failed. Reading this does not mark the failure as observed."""
        return self.done() and not self.cancelled() and super().exception() is not None

    @property
    def error(self) -> BaseException | None:
        """The error that failed the save. Reading this does not mark the failure as observed."""
        return super().exception() if self.failed else None

    @property
    def observed(self) -> bool:
        """True if the end of the save was observed: by `result`, by `exception`, or where it was raised."""
        return self._observed

    @property
    def size(self) -> int | None:
        """Bytes of the committed checkpoint, of all ranks; None before, or where no sizes are noted."""
        return self._size

    @property
    def progress(self) -> Progress:
        """This rank's part: bytes done and in all, the phase, and the object last written to."""
        return self._read()

    def result(self, timeout: float | None = None) -> T:
        """Return what the save came to, once it is committed.

        Raises:
            TimeoutError: it did not end in ``timeout`` seconds.
            CancelledError: it was skipped.
            ExecutorError: this process was forked from the one whose save it is, while that was under way.
            Exception: what failed the save, on whichever rank.
        """
        error = self.exception(timeout)
        if error is not None:
            try:
                raise error.with_traceback(self._trace)  # not with those of earlier calls
            finally:
                del error  # its traceback has this frame
        super().result()
        with self._unsealing:
            # Unpickled when it is asked for, not while training goes on.
            if self._made is None and self._sealed is not None:
                self._made, self._sealed = self._make(main_unpickler.loads(self._sealed.metadata)), None
        return self._made  # type: ignore[return-value]  # None only for a warm-up, which has no handle

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Return what failed the save, or None once it is committed; raise as `result` does."""
        error = super().exception(timeout)
        self._observe()
        return error

    def _observe(self) -> None:
        self._observed = True
        if self._unobserved is not None:
            self._unobserved.observed()


class Delivery:
    """The side of a handle that the executor holds. ``make`` turns the metadata into its result."""

    def __init__(self, make: Callable[[Metadata], Any]) -> None:
        self.handle: SaveHandle[Any] = SaveHandle(make)
        self.handle.set_running_or_notify_cancel()
        self.handle.staged.set_running_or_notify_cancel()

    def follow(self, read: Callable[[], Progress]) -> None:
        """Tell progress from ``read`` on."""
        self.handle._read = read  # noqa: SLF001 - the other half of one object

    def staged(self) -> None:
        """Mark the state as copied: it may change from now on."""
        self.handle.staged.set_result(None)

    def known(self) -> None:
        """Note that this rank has raised the error of the save, which counts as observed here."""
        self.handle._observe()  # noqa: SLF001 - see above

    def done(self, sealed: Sealed | None, last: Progress) -> None:
        """End well, with what the checkpoint process returned."""
        handle = self.handle
        if handle.done():  # the executor was closed meanwhile
            return
        handle._sealed = sealed  # noqa: SLF001 - see above
        handle._size = None if sealed is None else sealed.size  # noqa: SLF001
        handle._read = lambda: last  # noqa: SLF001
        if not handle.staged.done():
            handle.staged.set_result(None)
        handle.set_result(None)  # `result` unseals what there is

    def failed(self, error: BaseException, last: Progress, unobserved: str | None = None) -> None:
        """End with an error.

        Args:
            error: what failed the save.
            last: progress of the save.
            unobserved: what to log if the error is never observed; None logs nothing.
        """
        handle = self.handle
        if handle.done():
            return
        handle._read = lambda: last  # noqa: SLF001 - see above
        handle._trace = trimmed(error).__traceback__  # noqa: SLF001
        if unobserved is not None and not handle.observed:
            handle._unobserved = Unobserved(handle, unobserved)  # noqa: SLF001
        if not handle.staged.done():
            handle.staged.set_exception(error)
        handle.set_exception(error)


def skipped() -> SaveHandle[Any]:
    """Return the handle of a save that never began."""
    handle: SaveHandle[Any] = SaveHandle(lambda metadata: metadata)
    for future in (handle, handle.staged):
        future.cancel()
        future.set_running_or_notify_cancel()
    return handle
