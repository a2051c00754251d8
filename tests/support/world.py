"""A world of one checkpoint and the jobs that meet there: what a step does, and what holds after each."""

from __future__ import annotations

import contextlib
import itertools
import logging
import pickle
import threading
from collections.abc import Callable, Hashable, Iterable, Iterator
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from typing import Any, TypeVar
from unittest import mock

from fsspec.implementations.memory import MemoryFileSystem

from cloudckpt.backends.config.target import Target
from cloudckpt.backends.errors import CheckpointError, ObjectNotFoundError, PreconditionFailedError
from cloudckpt.backends.format import metadata as md
from cloudckpt.backends.manage.set_aside import ASIDE
from cloudckpt.backends.stores.base import Condition, ObjectInfo, ObjectStore, Overwrite
from cloudckpt.backends.stores.memory import MemoryStore
from support.interleave import Strand, Violation
from support.lagging import Past, RunOfTwo, clock, simulated
from support.scenario import FIRST, Limit, Part, Role, Scenario
from support.turnstile import (
    ANSWERS,
    CARRIED_OUT,
    DEADLY,
    LAGGING,
    METADATA,
    Actor,
    Aliases,
    Call,
    Kind,
    Step,
    Turnstile,
    faults_of,
    is_private,
)

POOLS = tuple(
    f"cloudckpt.backends.{module}.Workers"
    for module in ("transfer.task_pool", "transfer.downloader", "save.uploader")
)
OPENERS = (
    *(f"cloudckpt.backends.{module}.open_store" for module in ("dcp_base", "manage.delete", "manage.gc")),
    "cloudckpt.run.open_store",
)
T = TypeVar("T")

_here = threading.local()


@dataclass(frozen=True, slots=True)
class Late:
    """A put of ``.metadata`` that is still on its way."""

    actor: Actor
    data: bytes
    condition: Condition


class World:
    """One run of a scenario; ``judge`` raises ``Violation`` for what is wrong when all has happened."""

    def __init__(self, scenario: Scenario, judge: Callable[[World], None]) -> None:
        self.scenario = scenario
        self._judge = judge
        self.store = scenario.store(Target.parse(scenario.uri))
        self.honours = self.store.capabilities.conditional_create
        self.aliases = Aliases()
        self.labels: dict[str, str] = {}
        """Who put a version of ``.metadata``, and whose how manieth it is."""
        self.named: dict[str, frozenset[str]] = {}
        """The objects of a checkpoint, by such a label."""
        self.sent: dict[str, bytes] = {}
        """What was sent as an object's content."""
        self.committed: set[str] = set()
        """Names of actors whose metadata was visible at some moment."""
        self.late: list[Late] = []
        self.left = scenario.faults
        self.over = False
        self.pauses = scenario.pauses
        self._lines: list[str] = []
        self._unwind = threading.Event()
        clock.start()
        for name, data in scenario.first.items():
            self.aliases.shown(name, FIRST)
            self.sent[name] = data
            info = self.store.put(name, data, Overwrite())
            if name == METADATA:
                self._note(FIRST, data, info)
        self.past = Past()
        self._pass_time()
        self.actors = [self._actor(index, role) for index, role in enumerate(scenario.roles)]
        for actor in self.actors:
            actor.strand.resume()

    def _actor(self, index: int, role: Role) -> Actor:
        actor = Actor(role.name, index)
        # Who deletes goes through a listing for metadata only, and `judge` makes sure of it.
        lists = md.is_metadata if role.part is Part.DELETES else bool
        turnstile = Turnstile(self.store, actor, self._unwind, lambda info: self._shown(info, actor), lists)

        def body() -> object:
            _here.store = turnstile
            return role.act(self.scenario.uri)

        actor.strand = Strand(role.name, body)
        return actor

    # What the search asks for.

    def state(self) -> Hashable:
        objects = sorted(str(self._shown(info, None)) for info in self.store.list().objects)
        uploads = sorted(self.aliases.shown(p.upload.name) for p in self.store.pending_uploads())
        actors = tuple(
            (a.history, a.dead, a.faults > 0, a.unclean, a.disturbed, self.took_its_own(a))
            for a in self.actors
        )
        late = tuple(one.actor.index for one in self.late)
        past = tuple(tuple(sorted(str(self._shown(i, None)) for i in infos)) for infos in self.past.states())
        left = self.left, self.pauses, past if self.scenario.lags else ()
        return actors, tuple(objects), tuple(uploads), late, left, frozenset(self.committed), self.over

    def choices(self) -> list[Step]:
        if self.over:
            return []
        waiting = [(actor, call) for actor in self.actors if (call := actor.waiting) is not None]
        collected = self.scenario.has(Part.COLLECTS, Part.CLEARS, Part.PRUNES)
        for actor, call in waiting:
            if is_private(call, collected=collected) or self._is_unnoticed(call):
                return self._choices_of(actor, call)
        steps = [
            step
            for actor, call in waiting
            if not self._is_double(actor)
            for step in self._choices_of(actor, call)
        ]
        steps += [Step(one.actor.index, Kind.ARRIVED) for one in self.late]
        steps += [Step(-1, Kind.LATER)] if self.pauses and waiting else []
        return steps if waiting else [Step(-1, Kind.OVER), *steps]

    def _is_unnoticed(self, call: Call) -> bool:
        """Whether a commit must follow at once on the look at the marker before it."""
        return Limit.UNNOTICED in self.scenario.limits and call.is_commit

    def _is_double(self, actor: Actor) -> bool:
        """Whether another can begin in its place, and the rest be the same but for the names."""
        parts = [role.part for role in self.scenario.roles]
        return parts[actor.index] in parts[: actor.index] and not any(a.history for a in self.actors)

    def _choices_of(self, actor: Actor, call: Call) -> list[Step]:
        kinds = [Kind.DONE]
        if self.scenario.lags and call.operation == "list":
            now = self.store.list(call.prefix)
            kinds += [kind for kind in LAGGING if self.past.listing(kind, now, call.prefix) != now]
        if self.left and self.scenario.roles[actor.index].part is not Part.READS:
            kinds += [kind for kind in faults_of(call) if kind in self.scenario.kinds]
        return [Step(actor.index, kind) for kind in kinds]

    def take(self, choice: Step) -> None:
        if choice.kind is Kind.LATER:
            self.pauses -= 1
            self._pass_time()
            self._lines.append(Kind.LATER.value)
        elif choice.kind is Kind.OVER:
            self.over = True
            self._judge(self)
        elif choice.kind is Kind.ARRIVED:
            self._arrive(next(one for one in self.late if one.actor.index == choice.actor))
        else:
            actor = self.actors[choice.actor]
            if (call := actor.waiting) is None:
                raise LookupError(f"{actor.name} waits for nothing")
            self._turn(actor, call, choice.kind)

    def check(self) -> None:
        """If it lists, it loads; and what was set aside a moment ago can be put back."""
        there = {info.name for info in self.store.list().objects}
        for name in there - self.past.then.keys():
            if ASIDE.fullmatch(name) and (
                lost := md.objects_of(pickle.loads(self.store.get(name)[0])) - there
            ):
                raise Violation(f"what was set aside lacks {[self.aliases.shown(one) for one in lost]}")
        if (label := self.label()) is None:
            return
        for name in self.named[label]:
            shown = self.aliases.shown(name)
            try:
                data, _ = self.store.get(name)
            except ObjectNotFoundError:
                raise Violation(
                    f"the checkpoint of {label} is there, and its object {shown} is not"
                ) from None
            if data != self.sent[name]:
                raise Violation(f"the object {shown} is not what was sent")

    def trace(self) -> str:
        return "\n".join(self._lines)

    def close(self) -> None:
        self._unwind.set()
        for actor in self.actors:
            while not actor.strand.done:
                actor.strand.resume()
            actor.strand.join()
        self.store.delete([info.name for info in self.store.list().objects])
        for pending in self.store.pending_uploads():
            self.store.abort_upload(pending.upload)

    # What the verdicts ask for.

    def label(self) -> str | None:
        """Whose metadata is there, and which."""
        try:
            return self.labels[self.store.stat(METADATA).version or ""]
        except ObjectNotFoundError:
            return None

    def belongings(self, actor: Actor) -> list[str]:
        """What there is of an actor's, visible and pending, other than ``.metadata``."""
        names = [info.name for info in self.store.list().objects]
        names += [pending.upload.name for pending in self.store.pending_uploads()]
        return [self.aliases.shown(name) for name in names if self.aliases.owner(name) == actor.name]

    def took_its_own(self, actor: Actor) -> bool:
        """Whether it deleted a data object of its own."""
        return any(
            self.aliases.owner(name) == actor.name and name.endswith(md.DATA_SUFFIX) for name in actor.taken
        )

    # The steps.

    def _turn(self, actor: Actor, call: Call, kind: Kind) -> None:
        if kind is not Kind.DONE and kind not in LAGGING:
            self.left -= 1
            actor.faults += 1
            actor.unclean = actor.unclean or call.cleans
        if kind in CARRIED_OUT:
            try:
                if kind in LAGGING:
                    call.answer = self.past.listing(kind, self.store.list(call.prefix), call.prefix)
                else:
                    call.answer = self._carry_out(actor, call)
                self.past.note(self.store.list().objects)
            except CheckpointError as error:
                call.error = error
        elif kind in (Kind.LATE, Kind.SENT) and call.condition is not None:
            self.late.append(Late(actor, call.data, call.condition))
        if kind in ANSWERS:
            call.error = ANSWERS[kind]("injected", uri=self.store.uri)
        told = "nothing" if kind in DEADLY else call.told
        names = ", ".join(self.aliases.shown(name, actor.name) for name in call.names)
        self._lines.append(f"{actor.name}: {call.operation} {names}: {kind.value} → {told}")
        # The time counts: what it made of the ages of what it saw.
        event = (actor.history, call.operation, names, told, self.pauses)
        actor.history = self.scenario.numbers.setdefault(event, len(self.scenario.numbers) + 1)
        actor.call = None
        if kind in DEADLY:
            actor.dead = True
        else:
            actor.strand.resume()

    def _carry_out(self, actor: Actor, call: Call) -> object:
        match call.operation:
            case "put" if call.is_commit and call.condition is not None:
                return self._commit(actor, call.data, call.condition)
            case "get" if call.names == (METADATA,):
                self._look(actor)
            case "upload_part":
                self.sent[call.names[0]] = self.sent.get(call.names[0], b"") + call.data
            case "delete":
                actor.taken.update(call.names)
                self._disturb()
            case _:
                pass
        return call.act()

    def _pass_time(self) -> None:
        """Let more time pass than a listing lags. Those who live have renewed their leases."""
        clock.advance()
        alive = {a.name for a in getattr(self, "actors", ()) if not a.dead and not a.strand.done}
        renewed = {
            info.name
            for info in self.store.list().objects
            if info.name.startswith(".cloudckpt-") and self.aliases.owner(info.name) in alive
        }
        for name in renewed:
            MemoryFileSystem.store[f"{self.store.uri.removeprefix('memory:/')}/{name}"].modified = clock.now
        self.past = Past.of(self.store.list().objects, renewed)

    def _look(self, actor: Actor) -> None:
        label = self.label()
        if not actor.has_looked:
            actor.has_looked, actor.looked = True, label

    def _commit(self, actor: Actor, data: bytes, condition: Condition) -> ObjectInfo:
        before = self.label()
        info = self.store.put(METADATA, data, condition)
        label = self._note(actor.name, data, info)
        self.committed.add(actor.name)
        if before is not None:
            self._disturb()
        if self.honours and before != actor.looked:
            raise Violation(f"{label} replaced {before}, and {actor.name} had seen {actor.looked}")
        return info

    def _arrive(self, late: Late) -> None:
        self.late.remove(late)
        try:
            self._commit(late.actor, late.data, late.condition)
            how = "is obeyed"
        except PreconditionFailedError:
            how = "finds its condition broken"
        self._lines.append(f"{late.actor.name}: put {METADATA} {Kind.ARRIVED.value} and {how}")

    def _note(self, owner: str, data: bytes, info: ObjectInfo) -> str:
        label = next(
            label for n in itertools.count(1) if (label := f"{owner}#{n}") not in self.labels.values()
        )
        self.labels[info.version or ""] = label
        self.named[label] = md.objects_of(pickle.loads(data))
        return label

    def _disturb(self) -> None:
        for actor in self.actors:
            if actor.has_looked and self.scenario.roles[actor.index].part is Part.READS:
                actor.disturbed = True

    def _shown(self, info: ObjectInfo, actor: Actor | None) -> str:
        """An object as an actor sees it, but for what differs from run to run."""
        name = self.aliases.shown(info.name, actor.name if actor else None)
        return f"{name} of {self.labels[info.version or '']}" if info.name == METADATA else name


class InlinePool(Executor):
    """Runs a task where it is handed in, as a pool of one thread would before the next one.

    Threads beyond the actors' own would change nothing but the time that a run takes.
    """

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        future: Future[T] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except BaseException as error:  # noqa: BLE001 - as a pool hands it on
            future.set_exception(error)
        return future


class Arriving(Future[T]):
    """The result of a request that arrives at the latest moment: when somebody waits for its answer."""

    def __init__(self, request: Callable[[], T]) -> None:
        super().__init__()
        self._request: Callable[[], T] | None = request

    def result(self, timeout: float | None = None) -> T:
        self.arrive()
        return super().result(timeout)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        self.arrive()
        return super().exception(timeout)

    def arrive(self) -> None:
        request, self._request = self._request, None
        if request is None:
            return
        try:
            self.set_result(request())
        except BaseException as error:  # noqa: BLE001 - as a thread hands it on
            self.set_exception(error)


@contextlib.contextmanager
def in_flight_together(*, late: bool) -> Iterator[None]:
    """Have requests that are in flight together arrive as early as can be, or as late, the last one first."""

    def begun(request: Callable[[], T], _: str) -> Future[T]:
        future = Arriving(request)
        if not late:
            future.arrive()
        return future

    def wait(futures: Iterable[Future[Any]]) -> None:
        for future in reversed(list(futures)):
            future.exception()

    with (
        mock.patch("cloudckpt.backends.transfer.task_pool.in_thread", begun),
        mock.patch("cloudckpt.backends.save.commit_requests.wait", wait),
    ):
        yield


def open_here(target: Target) -> ObjectStore:
    """Open an actor's own way to the store of its world, and to whoever is none the store itself."""
    store: ObjectStore | None = getattr(_here, "store", None)
    if store is None:
        return MemoryStore(target)
    return store if store.uri == target.uri else RunOfTwo(store, target.uri)


@contextlib.contextmanager
def many_worlds() -> Iterator[None]:
    """Let every actor open its own way to the store of its world, and the library log nothing."""

    with contextlib.ExitStack() as stack:
        for opener in OPENERS:
            stack.enter_context(mock.patch(opener, open_here))
        # A run lasts milliseconds and a renewal comes by the minute, on a thread that a dead actor leaves.
        stack.enter_context(mock.patch("cloudckpt.backends.save.save_lease._keep_renewed"))
        for pool in POOLS:
            stack.enter_context(mock.patch(pool, InlinePool))
        stack.enter_context(simulated())
        logging.disable(logging.CRITICAL)
        stack.callback(logging.disable, logging.NOTSET)
        yield
