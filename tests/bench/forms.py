"""The forms that are compared: each saves a state in the background and answers with a future."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType, AsyncSaveResponse

import cloudckpt
from cloudckpt.executor import ProcessExecutor

State = dict[str, dict[str, torch.Tensor]]
"""Tensors in a dictionary in a dictionary, as ``{"model": model.state_dict()}`` is."""
Save = Callable[[State, Path], Future[Any]]


@dataclass(frozen=True, slots=True)
class Form:
    """A way to save; ``prepare`` is what a form offers to be ready for a state's first save."""

    save: Save
    prepare: Callable[[State], None] = lambda _: None


@contextmanager
def _cloudckpt_process() -> Iterator[Form]:
    with ProcessExecutor() as executor:

        def save(state: State, folder: Path) -> Future[Any]:
            writer = cloudckpt.StorageWriter(folder.as_uri())
            return executor.execute_save(state, storage_writer=writer)

        yield Form(save, executor.warmup)


@contextmanager
def _stock_process() -> Iterator[Form]:
    # Descriptors go to the process, some for every tensor: let it have as many as it may.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    # It can't do without a group, however small.
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield Form(lambda state, folder: _stock(state, folder, AsyncCheckpointerType.PROCESS))
    dist.destroy_process_group()


@contextmanager
def _stock_thread() -> Iterator[Form]:
    yield Form(lambda state, folder: _stock(state, folder, AsyncCheckpointerType.THREAD))


def _stock(state: State, folder: Path, kind: AsyncCheckpointerType) -> Future[Any]:
    """Save as DCP does when it is told nothing but where: its own stager, its own writer of files."""
    answer = dcp.async_save(state, checkpoint_id=folder, async_checkpointer_type=kind)
    return answer.upload_completion if isinstance(answer, AsyncSaveResponse) else answer


FORMS: dict[str, Callable[[], AbstractContextManager[Form]]] = {
    "cloudckpt": _cloudckpt_process,
    "stock process": _stock_process,
    "stock thread": _stock_thread,
}
