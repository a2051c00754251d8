"""Hugging Face's Trainer: a callback saves it in the background, and ``train`` goes on within an epoch.

CHECKPOINT_URI=s3://bucket/run torchrun --standalone --nproc-per-node 2 examples/recipes/hf_trainer.py
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback, TrainerCallback, TrainingArguments

import cloudckpt


class Trainer(transformers.Trainer):
    """A Trainer that is resumed from a `CloudCheckpoint`."""

    def _load_from_checkpoint(self, *_: Any, **__: Any) -> None:
        """Look for no file of weights: the callback loads them, in place, before the first step."""


class CloudCheckpoint(TrainerCallback):
    """Saves the model, optimizer, scheduler, progress and random numbers of a Trainer by a Checkpointer.

    Args:
        folder: an empty one of this process, for the small files that a Trainer is resumed from.
    """

    def __init__(self, trainer: Trainer, checkpointer: cloudckpt.Checkpointer, folder: Path) -> None:
        self._checkpointer = checkpointer
        self._state: dict[str, Any] = {"files": TrainerFiles(trainer, folder)}
        self._start = 0

    def begin(self) -> int:
        """Find the newest step, and make the folder one to resume from; 0 where there is none."""
        if (newest := self._checkpointer.latest_step()) is not None:
            self._start = self._checkpointer.load(self._state, newest)
        return self._start

    def on_train_begin(self, args: Any, state: Any, control: Any, **parts: Any) -> None:
        """Load what is large, now that the Trainer has made it."""
        optimizer = parts["optimizer"].optimizer  # torch's own, within Accelerate's
        live = {"model": parts["model"], "optimizer": optimizer, "scheduler": parts["lr_scheduler"]}
        self._state |= live
        self._checkpointer.warmup(live)
        if self._start:
            self._checkpointer.load(live, self._start)

    def on_step_end(self, args: Any, state: Any, control: Any, **parts: Any) -> None:
        """Save; the Checkpointer knows which steps, and raises `cloudckpt.Preempted` after the last."""
        self._checkpointer.async_save(state.global_step, self._state)


class TrainerFiles:
    """How far a Trainer is, and this rank's random numbers, in the files that it reads when it is resumed."""

    def __init__(self, trainer: Trainer, folder: Path) -> None:
        self._trainer, self._folder = trainer, folder
        one, rank = trainer.args.world_size == 1, trainer.args.process_index
        self._names = ("trainer_state.json", "rng_state.pth" if one else f"rng_state_{rank}.pth")

    def state_dict(self) -> dict[str, bytes]:
        self._trainer.state.save_to_json(str(self._folder / "trainer_state.json"))
        self._trainer._save_rng_state(str(self._folder))
        return {name: (self._folder / name).read_bytes() for name in self._names}

    def load_state_dict(self, files: dict[str, bytes]) -> None:
        for name, data in files.items():
            (self._folder / name).write_bytes(data)


class Tokens(Dataset[dict[str, torch.Tensor]]):
    """Texts of random tokens, each made from its index."""

    def __len__(self) -> int:
        return 256

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens = torch.randint(64, (32,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": tokens, "labels": tokens}


class Losses(TrainerCallback):
    """Prints them on rank 0."""

    def on_log(self, args: Any, state: Any, control: Any, **parts: Any) -> None:
        if state.is_world_process_zero and "loss" in parts["logs"]:
            print(f"step {state.global_step} loss {parts['logs']['loss']!r}", flush=True)


def main() -> None:
    """Train from the newest committed step, or from the start, up to ``--steps``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000, help="the last step of the run")
    steps = parser.parse_args().steps

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=steps,
            lr_scheduler_type="constant",
            logging_steps=1,
            save_strategy="no",  # the callback saves
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            dataloader_pin_memory=False,
        )
        transformers.set_seed(0)
        config = LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            attention_dropout=0.1,
        )
        model = LlamaForCausalLM(config)
        trainer = Trainer(model, arguments, train_dataset=Tokens(), callbacks=[Losses()])
        trainer.remove_callback(PrinterCallback)

        uri = os.environ["CHECKPOINT_URI"]
        with cloudckpt.Checkpointer(uri, keep_last=3, every_steps=5) as checkpointer:
            checkpoint = CloudCheckpoint(trainer, checkpointer, Path(folder))
            trainer.add_callback(checkpoint)
            start = checkpoint.begin()
            say(trainer, f"from step {start}")
            if start < steps:  # a Trainer that is resumed takes a step before it looks how many there are
                trainer.train(resume_from_checkpoint=folder if start else None)
        say(trainer, "done")


def say(trainer: Trainer, line: str) -> None:
    """Print on rank 0."""
    if trainer.is_world_process_zero():
        print(line, flush=True)


if __name__ == "__main__":
    main()
