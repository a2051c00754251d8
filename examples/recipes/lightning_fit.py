"""Lightning: a callback saves the whole trainer in the background, and ``fit`` goes on where the run was.

CHECKPOINT_URI=s3://bucket/run torchrun --standalone --nproc-per-node 2 examples/recipes/lightning_fit.py
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import logging
import os
import random
import signal
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Checkpoint
from torch.utils.data import DataLoader, Dataset, DistributedSampler

import cloudckpt


class CloudCheckpoint(Checkpoint):
    """Saves a trainer by a `cloudckpt.Checkpointer`, whose arguments it takes, and resumes from its newest.

    As it is a `Checkpoint`, Lightning calls it last, and writes no checkpoints of its own.
    """

    def __init__(self, uri: str, **arguments: Any) -> None:
        self._uri, self._arguments = uri, arguments
        self._open = contextlib.ExitStack()
        self._saved = 0

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Load: the ranks have met, the optimizers are made, and the loops have not begun."""
        self._checkpointer = self._open.enter_context(cloudckpt.Checkpointer(self._uri, **self._arguments))
        self._handler = signal.getsignal(signal.SIGTERM)
        self._state = {
            "model": pl_module,
            **{f"optimizer-{at}": one for at, one in enumerate(trainer.optimizers)},
            f"progress-{trainer.global_rank}": Progress(trainer),
        }
        self._checkpointer.warmup(self._state)
        newest = self._checkpointer.latest_step()
        self._saved = 0 if newest is None else self._checkpointer.load(self._state, newest)

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Take SIGTERM back: Lightning would end the loop before the ranks have agreed on a last step."""
        if self._handler != signal.SIG_DFL:  # which it is with preemption_grace=None
            signal.signal(signal.SIGTERM, self._handler)

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save when the optimizer has taken a step: while gradients accumulate it takes none."""
        if trainer.global_step > self._saved:
            self._saved = trainer.global_step
            self._checkpointer.async_save(self._saved, self._state)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Close, and let the error count; `cloudckpt.Preempted` comes by here as well."""
        self._open.__exit__(type(exception), exception, exception.__traceback__)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Wait for what is under way."""
        self._open.close()


class Progress:
    """What one rank knows beside weights and optimizers: loops, schedulers, callbacks, data, random numbers.

    What is in there changes as training goes on: a tuple is stored as one value, whatever it holds.
    """

    def __init__(self, trainer: Any) -> None:
        self._parts = {
            "loops": trainer.fit_loop,
            "precision": trainer.precision_plugin,
            **{f"scheduler-{at}": one.scheduler for at, one in enumerate(trainer.lr_scheduler_configs)},
            **{f"callback {one.state_key}": one for one in trainer.callbacks},
            **({"data": trainer.datamodule} if trainer.datamodule else {}),
        }

    def state_dict(self) -> dict[str, Any]:
        parts = {name: part.state_dict() for name, part in self._parts.items()}
        cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
        return {"all": (parts, random.getstate(), torch.get_rng_state(), cuda)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        parts, python, cpu, cuda = state["all"]
        for name in self._parts.keys() & parts.keys():
            self._parts[name].load_state_dict(parts[name])
        random.setstate(python)
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state(cuda)


class Batches(DataLoader[torch.Tensor]):
    """A DataLoader that says how far into its epoch it is, which Lightning saves, and goes on there."""

    _taken = _skipped = 0

    def __iter__(self) -> Any:
        self._taken, self._skipped = self._skipped, 0
        for batch in itertools.islice(super().__iter__(), self._taken, None):
            self._taken += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        return {"taken": self._taken % len(self)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._skipped = state["taken"]


class Samples(Dataset[torch.Tensor]):
    """Made up, each by its index."""

    def __len__(self) -> int:
        return 256

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.rand(32, generator=torch.Generator().manual_seed(index))


class Model(lightning.LightningModule):
    """As any other: nothing in it is there for its checkpoints."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(32, 64), torch.nn.Dropout(0.1), torch.nn.Linear(64, 1)
        )

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters())
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=100_000)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def train_dataloader(self) -> Batches:
        data = Samples()
        # Shuffled by its epoch, so that the order is the same however often the run was started.
        order = DistributedSampler[Any](data, self.trainer.world_size, self.trainer.global_rank)
        # Its generator seeds workers, at each epoch; without one that is drawn from what dropout draws from.
        return Batches(data, batch_size=8, sampler=order, generator=torch.Generator())

    def training_step(self, batch: torch.Tensor) -> Any:
        return self.layers(batch).square().mean()

    def on_fit_start(self) -> None:  # after the callbacks'
        self.print(f"from step {self.trainer.global_step}", flush=True)

    def on_train_batch_end(self, outputs: Any, batch: torch.Tensor, batch_idx: int) -> None:
        self.print(f"step {self.trainer.global_step} loss {outputs['loss'].item()!r}", flush=True)


def main() -> None:
    """Train from the newest committed step, or from the start, up to ``--steps``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000, help="the last step of the run")
    steps = parser.parse_args().steps

    for name in ("lightning.fabric", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.WARNING)
    lightning.seed_everything(0, verbose=False)
    trainer = lightning.Trainer(
        accelerator="cpu",
        strategy="ddp",
        devices=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        max_steps=steps,
        max_epochs=-1,
        callbacks=CloudCheckpoint(os.environ["CHECKPOINT_URI"], keep_last=3, every_steps=5),
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    model = Model()
    trainer.fit(model)
    model.print("done", flush=True)


if __name__ == "__main__":
    main()
