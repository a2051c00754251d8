"""Kill a training job in the middle of a save, and watch it lose nothing.

    python examples/demo/run.py                                  an S3 server of its own, on this machine
    python examples/demo/run.py --uri s3://your-bucket/prefix    your bucket, with your own credentials
    python examples/demo/run.py --uri file:///some/folder        a folder

Everything is written below a new prefix, ``demo-<time>-<id>``; nothing else is touched.
"""

from __future__ import annotations

import argparse
import contextlib
import secrets
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta

from checkpoints import METADATA, child, committed_steps, step_name
from job import RANKS, Job, JobFailedError
from s3_server import s3_server
from stock import differing, load_everything, stock_reader
from terminal import INDENT, Story

import cloudckpt
from cloudckpt.backends.errors import CheckpointError, CheckpointNotFoundError
from cloudckpt.backends.gc import collect_garbage
from cloudckpt.backends.store import Overwrite
from cloudckpt.backends.stores import open_store
from cloudckpt.backends.target import Target

BUCKET = "demo"
PROBE = "probe"
SAVES_BEFORE = 2
"""Saves that the job may finish; the next one is cut off."""
ATTEMPTS = 5
"""Kills to try: a save may commit in the instant before one arrives."""

Losses = dict[int, str]
"""The loss of each step, with all the digits that a float32 has."""


def main() -> int:
    """Tell the story; return 0 when every claim held."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--uri", help="s3://bucket/prefix or file:///folder (default: an S3 server of its own)"
    )
    parser.add_argument("--every", type=int, default=5, help="training steps between saves (default: 5)")
    args = parser.parse_args()
    if args.uri and Target.parse(args.uri).protocol not in ("s3", "file"):
        parser.error("--uri takes s3://bucket/prefix or file:///folder")

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    story = Story()
    began = time.monotonic()
    story.title("cloudckpt: a training job is killed in the middle of a save")
    try:
        with place(story, args.uri) as uri:
            Demo(story, uri, args.every).play()
            if args.uri:
                story.say("The checkpoints stay, and are yours to delete:")
                story.say(shown(uri))
    except (CheckpointError, JobFailedError) as error:
        sys.stderr.write(f"\n{INDENT}The demo could not go on.\n{error}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write(f"\n{INDENT}Interrupted; every process of the demo was stopped.\n")
        return 128 + signal.SIGINT
    return 0 if story.end(time.monotonic() - began) else 1


@contextlib.contextmanager
def place(story: Story, given: str | None) -> Iterator[str]:
    """Yield the URI of a new, empty prefix in the user's place or on a server of the demo's own."""
    name = f"demo-{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
    if given:
        story.step("A place for checkpoints: yours")
        query = given.partition("?")[2] if "://" in given else ""  # in a plain path a ? is a ?
        root = Target.parse(given).uri
        yield child(f"{root}?{query}" if query else root, name)
        return
    story.step("A place for checkpoints: an S3 server on this machine")
    with s3_server(BUCKET) as endpoint:
        story.say(f"moto's S3 server at {endpoint}, bucket {BUCKET!r}")
        yield child(f"s3://{BUCKET}?endpoint_url={endpoint}", name)


def shown(uri: str) -> str:
    """Return the URI without its options."""
    return uri.partition("?")[0]


class Demo:
    """The steps of the story, in order, on one fresh prefix."""

    def __init__(self, story: Story, uri: str, every: int) -> None:
        self._story = story
        self._uri = uri
        self._every = every
        self._store = open_store(Target.parse(uri))

    def play(self) -> None:
        """Play every step.

        Raises:
            CheckpointError: the place for checkpoints could not be used.
            JobFailedError: training ended by itself.
        """
        with self._store:
            self._store.put(PROBE, b"", Overwrite())  # a wrong bucket, key or folder shows here
            self._store.delete([PROBE])
            self._story.say(f"checkpoints go to {shown(self._uri)}")
            before: Losses = {}
            killed = self._train_and_kill(before)
            newest = self._look_at_what_is_left(killed)
            self._resume(newest, killed, before)
            self._clean_up()
            self._read_with_stock_dcp(committed_steps(self._uri)[-1])

    def _train_and_kill(self, losses: Losses) -> int:
        story, every = self._story, self._every
        story.step(f"Train a small GPT on {RANKS} ranks, and kill it in the middle of a save")
        story.say(f"FSDP2, AdamW; the text is the LICENSE file; a save every {every} steps")
        target = every * (SAVES_BEFORE + 1)
        for _ in range(ATTEMPTS):
            with Job(self._uri, steps=target + ATTEMPTS * every, every=every) as job:
                killed = self._kill_in_a_save(job, target, losses)
            if killed is None:
                break
            if killed not in committed_steps(self._uri):
                story.say(f"saving step {killed} ... SIGKILL: torchrun and every rank are gone")
                return killed
            story.say(f"saving step {killed} ... was committed before the kill came; once more")
            target = killed + every
        raise JobFailedError("Every save was over before it could be cut off: this place is too fast.")

    def _kill_in_a_save(self, job: Job, first: int, losses: Losses) -> int | None:
        """Kill the job while a save's uploads are open; return its step, or None if none was caught."""
        for event in job.events():
            match event:
                case ("saving", step) if int(step) >= first:
                    if self._uploads_seen(job, step_name(int(step))):
                        job.kill()
                        return int(step)
                case _:
                    self._tell(event, losses)
        return None

    def _uploads_seen(self, job: Job, name: str) -> bool:
        """Watch a save from the store's side; true once an upload is open, false once the save is over."""
        while job.silent():
            if any(self._store.pending_uploads(f"{name}/")):
                return True
        return False

    def _look_at_what_is_left(self, killed: int) -> int:
        story = self._story
        story.step("What the killed save left behind")
        committed = committed_steps(self._uri)
        name = step_name(killed)
        pending = sum(1 for _ in self._store.pending_uploads(f"{name}/"))
        objects = len(self._store.list(f"{name}/").objects)
        story.say(f"committed checkpoints: {', '.join(map(step_name, committed))}")
        story.say(f"of {name}: {count(pending, 'upload')} pending, {count(objects, 'object')} visible")
        story.say("the put of .metadata makes a save a checkpoint, and it comes last")
        newest = committed[-1] if committed else 0
        story.claim(
            f"the newest checkpoint is the one before: {step_name(newest)}",
            newest == killed - self._every,
        )
        story.claim(f"{name} is half-written, and cannot be loaded", not loadable(child(self._uri, name)))
        return newest

    def _resume(self, newest: int, killed: int, before: Losses) -> None:
        story, every = self._story, self._every
        story.step("Start the same command again")
        after: Losses = {}
        resumed = 0
        with Job(self._uri, steps=killed + every, every=every) as job:
            for event in job.events():
                match event:
                    case ("resumed", step):
                        resumed = int(step)
                        story.say(f"resumed from {step_name(resumed)}")
                        story.say("step   loss before the kill   loss now")
                    case _:
                        self._tell(event, after, before)
        again = range(newest + 1, killed + 1)
        same = sum(before[step] == after.get(step) for step in again)
        story.claim(f"it went on from {step_name(newest)}", resumed == newest)
        story.claim(
            f"the loss goes on where it was: {same} of {len(again)} the same to the last bit",
            same == len(again),
        )
        story.claim(f"{step_name(killed)} is whole now", loadable(child(self._uri, step_name(killed))))

    def _clean_up(self) -> None:
        story = self._story
        story.step("Clear away what the killed save left")
        committed = committed_steps(self._uri)
        removed = collect_garbage(self._uri, older_than=timedelta(0))  # nothing saves here at the moment
        uploads, objects = count(len(removed.uploads), "upload"), count(len(removed.objects), "object")
        story.say(f"garbage collection removed {uploads} and {objects}")
        story.claim("no upload is pending", not any(self._store.pending_uploads()))
        strangers = self._objects_of_no_checkpoint(committed)
        story.claim(f"every object belongs to one of {len(committed)} committed checkpoints", not strangers)

    def _objects_of_no_checkpoint(self, committed: Sequence[int]) -> set[str]:
        known: set[str] = set()
        for name in map(step_name, committed):
            metadata = cloudckpt.StorageReader(child(self._uri, name)).read_metadata()
            known.add(f"{name}/{METADATA}")
            known.update(f"{name}/{stored.relative_path}" for stored in metadata.storage_data.values())
        return {info.name for info in self._store.list().objects} - known

    def _read_with_stock_dcp(self, step: int) -> None:
        story = self._story
        story.step("Read the last checkpoint with stock torch.distributed.checkpoint")
        uri = child(self._uri, step_name(step))
        reader = stock_reader(Target.parse(uri))
        stock = load_everything(reader)
        ours = load_everything(cloudckpt.StorageReader(uri))
        story.say(
            f"{type(reader).__name__} and cloudckpt.StorageReader, one process, all of {step_name(step)}"
        )
        different = differing(stock, ours)
        story.claim(f"{len(stock)} values, bit for bit the same", bool(stock) and not different)

    def _tell(self, event: tuple[str, ...], losses: Losses, before: Losses | None = None) -> None:
        match event:
            case ("step", step, "loss", loss):
                losses[int(step)] = loss
                if before is None:
                    self._story.say(f"step {step:>3}   loss {float(loss):.6f}")
                else:
                    earlier = before.get(int(step))
                    column = f"{float(earlier):.6f}" if earlier else "-"
                    self._story.say(f"{step:>4}   {column:<20}   {float(loss):.6f}")
            case ("saved", step, "seconds", seconds):
                stored = self._store.list(f"{step_name(int(step))}/").objects
                megabytes = sum(info.size for info in stored) / 1e6
                self._story.say(f"{step_name(int(step))} saved: {megabytes:.0f} MB in {float(seconds):.1f} s")
            case _:
                pass


def count(number: int, noun: str) -> str:
    """Return ``1 upload`` or ``3 uploads``."""
    return f"{number} {noun}" + ("" if number == 1 else "s")


def loadable(uri: str) -> bool:
    """Tell whether there is a checkpoint to load at ``uri``."""
    try:
        cloudckpt.StorageReader(uri).read_metadata()
    except CheckpointNotFoundError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
