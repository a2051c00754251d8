"""What the promises of docs/commit.md say about a world in which nothing more happens."""

from __future__ import annotations

from typing import Any, cast

import torch

from cloudckpt.backends.errors import (
    CheckpointError,
    CheckpointExistsError,
    CheckpointNotFoundError,
    CommitError,
    IntegrityError,
    ObjectNotFoundError,
    UncertainCommitError,
)
from support import roles
from support.interleave import Violation
from support.lagging import clock
from support.scenario import WRITERS, Limit, Part
from support.turnstile import METADATA, Actor
from support.world import World


def judge(world: World) -> None:
    """Raise ``Violation`` for the first promise that was broken; collects the garbage in the end."""
    for actor, role in zip(world.actors, world.scenario.roles, strict=True):
        if actor.dead:
            continue
        if isinstance(actor.outcome, BaseException) and not isinstance(actor.outcome, CheckpointError):
            raise Violation(f"{actor.name} raised {actor.outcome!r}") from actor.outcome
        if role.part in WRITERS:
            _judge_writer(world, actor)
        elif role.part is Part.READS:
            _judge_reader(world, actor)
        elif role.part is Part.DELETES:
            _judge_deleter(world, actor)
        elif role.part is Part.PRUNES and METADATA in actor.taken and roles.is_misled(role):
            raise Violation(f"{actor.name} deleted the newest step")
        elif isinstance(actor.outcome, CheckpointError) and not actor.faults:
            raise Violation(f"{actor.name} raised {actor.outcome!r}") from actor.outcome
    _judge_race(world)
    _judge_what_is_left(world)


def _judge_writer(world: World, actor: Actor) -> None:
    outcome, was_there = actor.outcome, actor.name in world.committed
    if outcome is None and not was_there:
        raise Violation(f"{actor.name} reported success, and its checkpoint was never there")
    if isinstance(outcome, UncertainCommitError):
        if world.took_its_own(actor):
            raise Violation(f"{actor.name} is uncertain and took its objects away")
        return
    if isinstance(outcome, CheckpointError) and was_there and not _is_overtaken(world, actor):
        raise Violation(f"{actor.name} reported {type(outcome).__name__}, and its checkpoint was there")
    left = world.belongings(actor)
    if isinstance(outcome, CheckpointError) and left and not actor.unclean:
        raise Violation(f"{actor.name} reported {type(outcome).__name__} and left {left}")
    if outcome is None and not actor.faults and any("save" in name for name in left):
        raise Violation(f"{actor.name} succeeded and left {left}")
    if not actor.faults and isinstance(outcome, CheckpointError) and not _is_expected(world, outcome):
        raise Violation(f"{actor.name} met no fault and reported {outcome!r}")


def _is_overtaken(world: World, actor: Actor) -> bool:
    label = world.label()
    gone = label is None or label.partition("#")[0] != actor.name
    return Limit.OVERTAKEN in world.scenario.limits and actor.faults > 0 and gone


def _is_expected(world: World, outcome: CheckpointError) -> bool:
    """Whether a save may end like this although no fault was its own."""
    bereft = world.scenario.has(Part.DELETES, Part.CLEARS, Part.PRUNES, Part.SETS_ASIDE)
    collected = world.scenario.has(Part.COLLECTS, Part.CLEARS) and Limit.UNMARKED in world.scenario.limits
    if collected and isinstance(outcome, ObjectNotFoundError | CommitError):
        return True
    return isinstance(outcome, CheckpointExistsError) or (bereft and type(outcome) is CommitError)


def _judge_reader(world: World, actor: Actor) -> None:
    match actor.outcome:
        case CheckpointNotFoundError():
            if actor.looked is not None:
                raise Violation(f"{actor.name} did not find the checkpoint of {actor.looked}")
        case IntegrityError():
            if not actor.disturbed:
                raise Violation(f"{actor.name} found damage, and nothing had changed")
        case CheckpointError() as error:
            raise Violation(f"{actor.name} raised {error!r}")
        case state:
            if not _is_state_of(cast(dict[str, Any], state), actor.looked):
                raise Violation(f"{actor.name} read {state}, and the checkpoint was {actor.looked}'s")


def _judge_deleter(world: World, actor: Actor) -> None:
    found = world.named[actor.looked] if actor.looked else frozenset[str]()
    if strangers := actor.taken - found - {METADATA}:
        raise Violation(f"{actor.name} deleted {strangers}, which it did not find named")
    if isinstance(actor.outcome, CheckpointError | None):
        if not actor.faults and not isinstance(actor.outcome, CheckpointNotFoundError):
            raise Violation(f"{actor.name} met no fault and reported {actor.outcome!r}")
        return
    there = {info.name for info in world.store.list().objects} - {METADATA}
    if left := there.intersection(cast(tuple[str, ...], actor.outcome)):
        raise Violation(f"{actor.name} deleted {actor.outcome} and left {left}")


def _judge_race(world: World) -> None:
    """Of jobs that create one checkpoint one wins, and the others are told."""
    if {role.part for role in world.scenario.roles} - {Part.READS} != {Part.CREATES} or not world.honours:
        return
    writers = [a for a, r in zip(world.actors, world.scenario.roles, strict=True) if r.part is Part.CREATES]
    won = [actor for actor in writers if actor.outcome is None and not actor.dead]
    if len(won) > 1:
        raise Violation("both created the checkpoint")
    if not won and not any(actor.faults for actor in writers):
        raise Violation("nobody created the checkpoint")


def _judge_what_is_left(world: World) -> None:
    """What is committed loads, and nothing else is left once the garbage is collected."""
    label, uri = world.label(), world.scenario.uri
    if label is not None and not _is_state_of(roles.load(uri), label):
        raise Violation(f"the checkpoint of {label} does not load as it was saved")
    clock.advance()
    roles.collect(uri)
    expected = {METADATA, *world.named[label]} if label is not None else set[str]()
    there = {info.name for info in world.store.list().objects}
    if there != expected:
        raise Violation(f"gc left {sorted(there - expected)} and took {sorted(expected - there)}")
    if pending := list(world.store.pending_uploads()):
        raise Violation(f"gc left {pending}")


def _is_state_of(state: dict[str, torch.Tensor], label: str | None) -> bool:
    if label is None:
        return False
    expected = roles.state_of(label.partition("#")[0])
    return all(torch.equal(state[name], expected[name]) for name in expected)
