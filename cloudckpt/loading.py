"""Loading a step into a state, on every rank or on none: what fails on one of them is raised on all."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata

from cloudckpt.backends.config.uri_hints import advice
from cloudckpt.backends.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    ConfigurationError,
    IntegrityError,
)
from cloudckpt.backends.load.reader import StorageReader
from cloudckpt.backends.state.load_planner import CheckpointLoadPlanner
from cloudckpt.backends.system import background_log
from cloudckpt.backends.system.tracebacks import trimmed, trimming
from cloudckpt.executor.coordination import remote_errors
from cloudckpt.executor.coordination.rendezvous import grouped
from cloudckpt.progress import Arriving, Display
from cloudckpt.rank_broadcast import agreed, gathered, together
from cloudckpt.read_ahead import ReadAhead
from cloudckpt.run import Run
from cloudckpt.state.app_state import AppState

_log = background_log.logger(__name__)

_NAMED = 5
"""Names in a log message."""
_TRIES = 10
"""Times that a load looks for the newest step, where each was deleted while it was read."""

_READER = ("set_up_storage_reader", "prepare_local_plan", "prepare_global_plan", "read_data")
_PLANNER = ("set_up_planner", "create_local_plan", "create_global_plan", "finish_plan")
"""Methods that DCP calls and whose exceptions it sends to the other ranks, by pickle as they are."""


@dataclass(slots=True)
class Loading:
    """Loads steps of a run on these ranks, and shows progress on this display."""

    run: Run
    group: dist.ProcessGroup | None
    rank: int
    trust: bool
    shown: Display | None
    ahead: ReadAhead
    size: int = 0
    """Bytes of the checkpoint that was loaded last."""
    is_newest: bool = True
    """True if no step was committed above the one that was asked for."""

    def begin(
        self, prepare: Callable[[], AppState], step: int | None, last: int | None
    ) -> tuple[AppState, int]:
        """Prepare a state on every rank, and choose the step to load on the first. A collective of the group.

        Args:
            prepare: returns the state.
            step: the step that was asked for; None for the newest.
            last: the step that this process saved or loaded last, if any.

        Raises:
            CheckpointNotFoundError: no step is committed.
            BaseException: what failed on any rank.
        """
        try:
            state, chosen = together(prepare, lambda: self.ahead.choose(step, last), self.group)
        except BaseException:
            self.ahead.release()
            raise
        if chosen is None:
            self.ahead.release()
            uri = self.run.target.uri
            raise CheckpointNotFoundError(
                "no step of this run is committed yet",
                uri=uri,
                hint=advice(uri, "Check the URI, or begin at step 0"),
            )
        return state, chosen

    @trimming
    def load_newest(self, state: AppState, newest: int, *, fallback: bool) -> tuple[int, str]:
        """Load the newest step into the state. A collective of the group.

        A step that was deleted while it was read is no failure: the newest is then another. With
        ``fallback``, damaged steps are passed over, and set aside once an older one was loaded.

        Args:
            state: to load into.
            newest: the first rank's choice.
            fallback: load an older step where this one is damaged.

        Returns:
            The step and its checkpoint's URI.

        Raises:
            CheckpointNotFoundError: no step is left.
            IntegrityError: the step is damaged, and so is each before it with ``fallback``.
            BaseException: as `load`.
        """
        chosen, tries, damaged = newest, _TRIES, list[int]()
        while True:
            try:
                uri = self.load(state, chosen)
            except (IntegrityError, CheckpointNotFoundError) as error:
                there, following = agreed(lambda: self._after(chosen), self.group)  # noqa: B023 - called at once
                tries -= not there
                if following is None or tries == 0:
                    raise
                if not there:
                    _log.info("step %d was deleted while it was read, loading step %d", chosen, following)
                elif fallback:
                    damaged.append(chosen)
                    level = background_log.warning_on(self.rank)
                    _log.log(level, "step %d is damaged, loading step %d: %s", chosen, following, error)
                else:
                    error.add_note(
                        f"step {following} is the newest before it: load(state, step={following}) loads it, "
                        "and load(state, fallback=True) also sets the damaged step aside"
                    )
                    raise
                chosen = following
            else:
                if damaged:
                    agreed(lambda: self._set_aside(damaged), self.group)
                return chosen, uri

    def _after(self, step: int) -> list[int | None]:
        """Return whether a step that could not be loaded is there, and the step to load instead of it."""
        there = self.run.is_committed(step)
        return [there, self.run.newest(before=step if there else None)]

    def _set_aside(self, damaged: list[int]) -> None:
        """Set damaged steps aside, so that no load meets them again and their numbers are free."""
        for step in damaged:
            try:
                self.run.set_aside(step)
            except CheckpointError as error:  # the state is loaded, and a job may only read
                _log.warning("step %d is damaged and could not be set aside: %s", step, error)
            else:
                _log.warning(
                    "step %d is set aside: its objects are kept, and its number may be saved again", step
                )

    @trimming
    def load(self, state: AppState, step: int, asked: int | None = None) -> str:
        """Load a step into the state and return its checkpoint's URI. A collective of the group.

        Args:
            state: to load into.
            step: the first rank's choice.
            asked: step that this rank was asked for; None for no step in particular.

        Raises:
            ConfigurationError: a rank was asked for another step.
            CheckpointError: it is not there, does not fit or is damaged.
            BaseException: what else failed on any rank, such as the state's own ``load_state_dict``.
        """

        def begin() -> StorageReader:
            if asked is not None and self.run.number(asked) != step:
                raise ConfigurationError(
                    f"rank {self.rank} is to load step {asked!r}, and rank 0 step {step!r}",
                    uri=self.run.target.uri,
                    hint="Give every rank the same step",
                )
            state.prepare()
            return StorageReader(self.run.at(step), trust=self.trust)

        try:
            # Once, for all ranks.
            reader, metadata = together(begin, lambda: self.ahead.metadata(step), self.group)
            reader.take_metadata(metadata)
            self._load(reader, state, step)
        except IntegrityError as error:
            if agreed(lambda: self.run.is_committed(step), self.group):
                raise
            raise CheckpointNotFoundError(
                f"step {step} was deleted while it was loaded",
                uri=self.run.at(step).uri,
                hint="Load another step; parts of this one may be in the state",
            ) from error
        finally:
            self.ahead.release()
        return reader.checkpoint_id

    def _load(self, reader: StorageReader, state: AppState, step: int) -> None:
        name = f"step {step}, rank {self.rank}"
        if self.shown is not None:
            arriving = Arriving(self.shown, name)
            reader.observe(arriving.arrived, arriving.begun)
        try:
            loaded = self._read(reader, state)
        except BaseException:
            self._end(name)
            raise

        def finish() -> None:
            self._end(name)
            state.take(loaded)

        _, self.is_newest = together(finish, self.ahead.is_newest, self.group)
        self.size = reader.size
        self._report(step, gathered(sorted(state.unasked), self.group))

    def _report(self, step: int, unasked: list[list[str]] | None) -> None:
        """Log what the checkpoint has and no rank asked for."""
        left = sorted(set(unasked[0]).intersection(*unasked)) if unasked else []
        if left:
            named = ", ".join(map(repr, left[:_NAMED]))
            more = f" and {len(left) - _NAMED:,} more" if len(left) > _NAMED else ""
            _log.warning("step %d also has %s%s, which the state does not ask for", step, named, more)

    def _read(self, reader: StorageReader, state: AppState) -> dict[str, Any]:
        """Read what the state asks for, and return it by name."""
        planner = CheckpointLoadPlanner(state.choose)
        carried = _Carried(self.rank, alone=not grouped())
        carried.calls(reader, planner)
        try:
            with warnings.catch_warnings():
                # DCP says so on every load in a single process, which is what that means here.
                warnings.filterwarnings("ignore", message="torch.distributed is disabled")
                dcp.load(
                    {},
                    storage_reader=reader,
                    planner=planner,
                    process_group=self.group,
                    no_dist=not grouped(),
                )
        except CheckpointException as error:
            carried.deliver(error, reader.checkpoint_id)
        return planner.loaded

    def _end(self, name: str) -> None:
        if self.shown is not None:
            self.shown.end(name)


class _Carrier(Exception):
    """Carries a pickled exception through DCP, which pickles exceptions itself."""


@dataclass(slots=True)
class _Carried:
    """Has DCP carry exceptions from rank to rank that survive it.

    DCP pickles what its reader and planner raise. An exception that does not pickle would fail the collective
    on one rank and leave the others in it.
    """

    rank: int
    alone: bool
    """Without other ranks an exception is raised as it is."""
    own: BaseException | None = None
    """The exception that this rank raised."""
    absence: _Carrier | None = None
    """The reason why this rank could not read the metadata."""

    def calls(self, reader: StorageReader, planner: CheckpointLoadPlanner) -> None:
        """Have DCP's calls of these two raise what reaches every rank."""
        # On the instances, which were made for this one load.
        for name in _READER:
            vars(reader)[name] = self._carrying(getattr(reader, name))
        for name in _PLANNER:
            vars(planner)[name] = self._carrying(getattr(planner, name))
        read, plan = self._carrying(reader.read_metadata), planner.set_up_planner

        # DCP takes any failure to read the metadata for its absence, looks for a rank's own, and would make
        # an AssertionError of both. The planner, which it calls next, raises the error.
        @functools.wraps(read)
        def read_metadata(*args: Any, **keywords: Any) -> Metadata:
            try:
                metadata: Metadata = read(*args, **keywords)
            except _Carrier as absence:
                self.absence = absence
                return Metadata({})
            return metadata

        def set_up_planner(*args: Any, **keywords: Any) -> None:
            if self.absence is not None:
                raise self.absence
            plan(*args, **keywords)

        vars(reader)["read_metadata"], vars(planner)["set_up_planner"] = read_metadata, set_up_planner

    def _carrying(self, method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)  # DCP looks at its signature
        def carrying(*args: Any, **keywords: Any) -> Any:
            try:
                return method(*args, **keywords)
            except _Carrier:
                raise
            except BaseException as error:
                if self.alone:
                    self.own = error
                    raise _Carrier from error
                common = remote_errors.shared(error, self.rank)
                self.own = common if isinstance(error, remote_errors.ANY) else error
                raise _Carrier(remote_errors.dumps(common)) from error

        return carrying

    def deliver(self, error: CheckpointException, uri: str) -> NoReturn:
        """Raise what failed the load: the lowest failing rank's exception, the same on every rank."""
        failed = {rank: (_opened(failure), frames) for rank, (failure, frames) in error.failures.items()}
        lowest = min(failed)
        if self.own is None:
            first = remote_errors.original(CheckpointException("load", failed), self.rank)
        elif self.alone or not isinstance(self.own, remote_errors.ANY):
            first = trimmed(self.own)
        else:
            common = remote_errors.original(CheckpointException("load", failed), self.rank, with_frames=False)
            first = remote_errors.with_traceback_of(self.own, common)
        if isinstance(first, CheckpointError):
            first.located(uri=uri, rank=lowest)
        raise first from first.__cause__


def _opened(error: BaseException) -> BaseException:
    return remote_errors.loads(*error.args) if isinstance(error, _Carrier) and error.args else error
