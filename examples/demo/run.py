"""Kill a checkpoint process and then the whole training job in the middle of a save, and lose nothing.

    python examples/demo/run.py                                  an S3 server of its own, on this machine
    python examples/demo/run.py --store gcs                      a GCS server of its own
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
import textwrap
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta

from checkpoints import METADATA, child, committed_steps, step_name
from gcs_server import gcs_server
from job import RANKS, Event, Job, JobFailedError
from s3_server import s3_server
from stock import differing, load_everything, stock_reader
from terminal import INDENT, Story

import cloudckpt
from cloudckpt.backends.config.target import Target
from cloudckpt.backends.errors import CheckpointError, CheckpointNotFoundError
from cloudckpt.backends.manage.gc import collect_garbage
from cloudckpt.backends.stores import open_store
from cloudckpt.backends.stores.base import Overwrite

BUCKET = "demo"
PROBE = "probe"
VICTIM = 1
"""The rank whose checkpoint process is killed."""
ATTEMPTS = 5
"""Kills to try: a save may commit in the instant before one arrives."""

WIDTH = 80 - len(INDENT)
WORTH_A_WORD = 0.1
"""Seconds of waiting that the reader is told of."""
ERROR_LINES = 6
"""Lines of an error that the reader is shown."""
TOO_FAST = "Every save was over before it could be cut off: this place is too fast."

SERVERS = {
    "s3": ("s3", s3_server, "moto's S3 server"),
    "gcs": ("gs", gcs_server, "the tests' GCS server"),
}
"""The protocol of each server that the demo can start, how, and whose it is."""

Losses = dict[int, str]
"""The loss of each step, with all the digits that a float32 has."""


def main() -> int:
    """Tell the story; return 0 when every claim held."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--uri",
        help="s3://bucket/prefix, gs://bucket/prefix or file:///folder (default: a server of its own)",
    )
    parser.add_argument("--store", choices=SERVERS, default="s3", help="what that server is (default: s3)")
    parser.add_argument("--every", type=int, default=5, help="training steps between saves (default: 5)")
    args = parser.parse_args()
    if args.uri and Target.parse(args.uri).protocol not in ("s3", "gs", "file"):
        parser.error("--uri takes s3://bucket/prefix, gs://bucket/prefix or file:///folder")

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    story = Story()
    began = time.monotonic()
    story.title("cloudckpt: a training job is killed in the middle of a save, and goes on")
    try:
        with place(story, args.uri, args.store) as uri:
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
def place(story: Story, given: str | None, store: str) -> Iterator[str]:
    """Yield the URI of a new, empty prefix in the user's place or on a server of the demo's own."""
    name = f"demo-{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
    if given:
        story.step("A place for checkpoints: yours")
        query = given.partition("?")[2] if "://" in given else ""  # in a plain path a ? is a ?
        root = Target.parse(given).uri
        yield child(f"{root}?{query}" if query else root, name)
        return
    protocol, serve, whose = SERVERS[store]
    story.step(f"A place for checkpoints: {whose} on this machine")
    with serve(BUCKET) as endpoint:
        story.say(f"{endpoint}, bucket {BUCKET!r}")
        yield child(f"{protocol}://{BUCKET}?endpoint_url={endpoint}", name)


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
        self._last_error = ""

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
            before: Losses = {}  # in the order of the steps
            killed = self._train_and_kill(before)
            newest = self._look_at_what_is_left(killed)
            self._resume(newest, killed, before)
            self._clean_up()
            self._read_with_stock_dcp(committed_steps(self._uri)[-1])

    def _train_and_kill(self, losses: Losses) -> int:
        """Kill a checkpoint process, then the job; return the step whose save was cut off by that."""
        story, every = self._story, self._every
        story.step(f"Train a small GPT on {RANKS} ranks, saving in the background")
        story.say(f"FSDP2, AdamW; the text is the LICENSE file; a save every {every} steps")
        story.say("each rank has a checkpoint process, which saves while training goes on;")
        story.say("the next save waits for the one before it")
        for attempt in range(ATTEMPTS):
            with Job(self._uri, steps=(3 * ATTEMPTS + attempt) * every, every=every) as job:
                if attempt == 0:
                    self._await_a_save(job, losses)
                    self._kill_a_checkpoint_process(job, losses)
                    story.step("Kill the whole job in the middle of a save")
                killed = self._save_under_way(job, losses)
                job.kill()
                for event in job.events():  # what it said while it was being killed
                    self._tell(event, losses)
            if killed not in committed_steps(self._uri):
                story.say(f"saving step-{killed} ... SIGKILL: torchrun and every rank are gone")
                return killed
            story.say(f"saving step-{killed} ... was committed before the kill came; once more")
        raise JobFailedError(TOO_FAST)

    def _await_a_save(self, job: Job, losses: Losses) -> None:
        for event in self._told(job, losses):
            if event[0] == "saved":
                return
        raise JobFailedError("No save succeeded.")

    def _kill_a_checkpoint_process(self, job: Job, losses: Losses) -> None:
        story = self._story
        story.step(f"Kill the checkpoint process of rank {VICTIM} in the middle of a save")
        for _ in range(ATTEMPTS):
            generation = job.generation(VICTIM)
            failed = self._save_under_way(job, losses)
            pid = job.kill_checkpoint_process(VICTIM)
            story.say(f"saving step-{failed} ... SIGKILL to checkpoint process {pid}")
            errors = self._errors(job, failed, losses)
            if failed not in committed_steps(self._uri):
                break
            story.say(f"saving step-{failed} ... was committed before the kill came; once more")
        else:
            raise JobFailedError(TOO_FAST)
        clear = all(f"rank {VICTIM} (pid {pid}) was killed by SIGKILL" in error for error in errors.values())
        story.claim(
            f"its save failed on {len(errors)} of {RANKS} ranks, with one error that names the cause",
            len(errors) == RANKS and len(set(errors.values())) == 1 and clear,
        )
        story.claim(f"{step_name(failed)} cannot be loaded", not self._loadable(failed))
        self._watch_it_go_on(job, failed, generation, losses)

    def _errors(self, job: Job, step: int, losses: Losses) -> dict[str, str]:
        """Wait until a save is over; return what each rank had to say of it, if it failed."""
        errors: dict[str, str] = {}
        for event in self._told(job, losses):
            match event:
                case ("not-saved", rank, of, *words) if int(of) == step:
                    errors[rank] = " ".join(words)
                    if len(errors) == RANKS:
                        break
                case ("saved", of, *_) if int(of) == step:
                    break
                case _:
                    pass
        return errors

    def _watch_it_go_on(self, job: Job, failed: int, generation: int, losses: Losses) -> None:
        """Follow the job to the end of the save after the one that failed."""
        step = failed + self._every
        meanwhile = 0
        for event in self._told(job, losses):
            match event:
                case ("not-saved", _, of, *_) if int(of) == step:
                    break
                case ("saved", of, _, "meanwhile", steps, *_) if int(of) == step:
                    meanwhile = int(steps)
                    break
                case _:
                    pass
        last = next(reversed(losses))
        self._story.claim(
            f"training went on through it: steps {failed + 1} to {last} came one by one",
            list(losses) == list(range(1, last + 1)) and meanwhile > 0,
        )
        serving = job.generation(0)
        self._story.claim(
            f"the next, {step_name(step)}, was committed by new processes (generation {serving})",
            self._loadable(step) and serving > generation,
        )

    def _save_under_way(self, job: Job, losses: Losses) -> int:
        """Follow the job until a save has its uploads open, and return its step."""
        for event in self._told(job, losses):
            match event:
                case ("saving", step) if self._uploads_seen(job, int(step)):
                    return int(step)
                case _:
                    pass
        raise JobFailedError(TOO_FAST)

    def _uploads_seen(self, job: Job, step: int) -> bool:
        """Watch a save from the store's side; true once an upload is open, false once the save is over."""
        while job.saving(step):
            if any(self._store.pending_uploads(f"{step_name(step)}/")):
                return True
            # GCS lists no uploads; there the marker of the save has to do.
            if self._store.uri.startswith("gs://") and self._store.list(f"{step_name(step)}/").objects:
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
        story.claim(f"{name} is half-written, and cannot be loaded", not self._loadable(killed))
        return newest

    def _resume(self, newest: int, killed: int, before: Losses) -> None:
        story, every = self._story, self._every
        story.step("Start the same command again")
        after: Losses = {}
        resumed = 0
        with Job(self._uri, steps=killed + every, every=every) as job:
            for event in self._told(job, after, before):
                match event:
                    case ("resumed", step):
                        resumed = int(step)
                        story.say(f"resumed from {step_name(resumed)}")
                        story.say("step   loss before the kill   loss now")
                    case _:
                        pass
        again = range(newest + 1, max(before) + 1)
        same = sum(before[step] == after.get(step) for step in again)
        story.claim(f"it went on from {step_name(newest)}", resumed == newest)
        story.claim(
            f"the loss goes on where it was: {same} of {len(again)} the same to the last bit",
            same == len(again),
        )
        story.claim(f"{step_name(killed)} is whole now", self._loadable(killed))

    def _clean_up(self) -> None:
        story = self._story
        story.step("Clear away what the failed and the killed save left")
        committed = committed_steps(self._uri)
        # Nothing saves here at the moment: what bears a marker is dead, however fresh that is.
        removed = collect_garbage(self._uri, older_than=timedelta(0), silent_for=timedelta(0))
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

    def _loadable(self, step: int) -> bool:
        """Tell whether there is a checkpoint of this step to load."""
        try:
            cloudckpt.StorageReader(child(self._uri, step_name(step))).read_metadata()
        except CheckpointNotFoundError:
            return False
        return True

    def _told(self, job: Job, losses: Losses, before: Losses | None = None) -> Iterator[Event]:
        """Yield what the job says, told to the reader."""
        for event in job.events():
            self._tell(event, losses, before)
            yield event

    def _tell(self, event: Event, losses: Losses, before: Losses | None = None) -> None:
        match event:
            case ("step", step, "loss", loss):
                losses[int(step)] = loss
                if before is None:
                    self._story.say(f"step {step:>3}   loss {float(loss):.6f}")
                else:
                    earlier = before.get(int(step))
                    column = f"{float(earlier):.6f}" if earlier else "-"
                    self._story.say(f"{step:>4}   {column:<20}   {float(loss):.6f}")
            case ("saved", step, seconds, "meanwhile", steps, "waited", waited):
                self._tell_of_a_save(int(step), float(seconds), int(steps), float(waited))
            case ("not-saved", rank, step, *words):
                self._tell_of_a_failure(int(rank), int(step), " ".join(words))
            case _:
                pass

    def _tell_of_a_save(self, step: int, seconds: float, meanwhile: int, waited: float) -> None:
        stored = self._store.list(f"{step_name(step)}/").objects
        megabytes = sum(info.size for info in stored) / 1e6
        did = [f"did {count(meanwhile, 'step')}"] if meanwhile else []
        if waited >= WORTH_A_WORD:
            did.append(f"waited {waited:.1f} s")
        training = f"; training {', then '.join(did)}" if did else ""
        self._story.say(f"{step_name(step)} saved: {megabytes:.0f} MB in {seconds:.1f} s{training}")

    def _tell_of_a_failure(self, rank: int, step: int, error: str) -> None:
        if error == self._last_error:
            self._story.say(f"{step_name(step)} failed on rank {rank}, with the same error")
            return
        self._last_error = error
        self._story.say(f"{step_name(step)} failed on rank {rank}:")
        for line in textwrap.wrap(error, WIDTH - 2, max_lines=ERROR_LINES, placeholder=" ..."):
            self._story.say(f"  {line}")


def count(number: int, noun: str) -> str:
    """Return ``1 upload`` or ``3 uploads``."""
    return f"{number} {noun}" + ("" if number == 1 else "s")


if __name__ == "__main__":
    sys.exit(main())
