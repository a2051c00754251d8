"""States of each kind that the demo, the recipes and the tests save; no computation decides their content.

A change here changes what the archives of releases are expected to hold: add kinds, and leave those as they
are that a release has written.
"""

from __future__ import annotations

import collections
import datetime as dt
import decimal
import fractions
import hashlib
import pathlib
import random
import uuid
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Placement, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, Adafactor, AdamW, Muon, Optimizer
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    LambdaLR,
    LinearLR,
    LRScheduler,
    MultiStepLR,
    OneCycleLR,
    ReduceLROnPlateau,
    SequentialLR,
)

from support.released_content import STEPS, Content, Held, State, TitanModel, TitanOptimizers, TrainingState

Build = Callable[[Content, DeviceMesh | None], State]

DTYPES = (
    *("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"),
    *("int64", "int32", "int16", "int8", "uint8", "bool", "complex64", "complex128"),
)


def model_of(mesh: DeviceMesh | None) -> nn.Module:
    """Return a small network; where there is a mesh, sharded by FSDP2, unevenly and with empty shards."""
    model = nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 1, bias=False))
    if mesh is not None:
        for part in (*model, model):
            fully_shard(part, mesh=mesh)
    return model


def tensors(content: Content, mesh: DeviceMesh | None) -> State:
    matrix, wide = content.tensor("matrix", (12, 10)), content.tensor("wide", (64,))
    waves, base = content.tensor("waves", (6, 4), torch.complex64), content.tensor("base", (8, 6))
    images = content.tensor("channels last", (2, 3, 4, 5))
    return {
        "dtypes": {name: content.tensor(name, (5, 3), getattr(torch, name)) for name in DTYPES},
        "layouts": {
            "zero dimensional": content.tensor("zero dimensional", ()),
            "one element of many": wide[7],
            "empty": content.tensor("empty", (0,)),
            "empty matrix": content.tensor("empty matrix", (0, 3), torch.bfloat16),
            "empty slice": matrix[3:3],
            "transposed": content.tensor("transposed", (5, 7)).t(),
            "permuted": content.tensor("permuted", (2, 3, 4), torch.int64).permute(2, 0, 1),
            "channels last": images.to(memory_format=torch.channels_last),
            "columns": matrix[:, 1:3],
            "every other column": matrix[:, ::2],
            "conjugated": waves.conj(),
            "parameter": nn.Parameter(content.tensor("parameter", (3, 2))),
        },
        "shared": {"base": base, "middle": base[2:5], "column": base[:, 3], "again": base},
    }


def nested(content: Content, mesh: DeviceMesh | None) -> State:
    pair = (content.tensor("in a tuple", (2, 3)), "beside a tensor")
    return {
        "step": content.value(STEPS),
        "tensor": content.tensor("top", (3,)),
        "list": [
            content.tensor("list 0", (2,)),
            {"inner": content.tensor("list 1", (3,), torch.int8)},
            content.value(7),
        ],
        "deep": {
            "a": {"b": {"c": content.tensor("deep", (1, 1), torch.float64), "d": content.value("leaf")}}
        },
        "dots.in.keys": {"a/b": content.tensor("dots", (2, 2)), "ü": content.value(1)},
        "tuple": content.value(pair),
        "dicts": [
            {"lr": content.value(0.1)},
            {"lr": content.value(0.2), "more": [content.tensor("more", (2,))]},
        ],
    }


def values(content: Content, mesh: DeviceMesh | None) -> State:
    plain = {
        "int": 12_345_678_901_234_567_890,
        "negative": -3,
        "float": 0.1,
        "infinity": float("-inf"),
        "complex": 1 + 2j,
        "str": "naïve ✓",
        "empty str": "",
        "bytes": bytes(range(256)),
        "bytearray": bytearray(b"\x00\xff"),
        "none": None,
        "true": True,
        "tuple": (1, "two", (3.0, None)),
        "empty tuple": (),
        "list": [1, 2, [3, "four"]],
        "set": {1, 2},
        "frozenset": frozenset({"a"}),
        "range": range(1, 9, 2),
        "slice": slice(1, None, 2),
        "size": torch.Size([2, 3]),
        "dtype": torch.bfloat16,
        "device": torch.device("cpu"),
        "layout": torch.strided,
        "dict in a tuple": (
            {1: 2, (1, 2): "x"},
            collections.OrderedDict(b=1, a=2),
            collections.Counter("aab"),
        ),
        "tensors in a tuple": (
            content.tensor("plain", (2,)),
            nn.Parameter(content.tensor("parameter", (2,))),
        ),
        "random": random.Random(7).getstate(),
    }
    return {"values": content.values(plain)}


def trusted(content: Content, mesh: DeviceMesh | None) -> State:
    """Return values that a checkpoint gives back with ``trust=True``."""
    when = dt.datetime(2026, 2, 3, 4, 5, 6, tzinfo=dt.UTC)
    pickled = {
        "array": np.arange(6, dtype=np.int16).reshape(2, 3),
        "float64": np.float64(0.1),
        "int64": np.int64(-7),
        "numpy dtype": np.dtype("<f4"),
        "numpy random": np.random.RandomState(7).get_state(legacy=True),
        "datetime": when,
        "timedelta": dt.timedelta(days=1, microseconds=2),
        "decimal": decimal.Decimal("1.50"),
        "fraction": fractions.Fraction(1, 3),
        "path": pathlib.PurePosixPath("/data/set"),
        "uuid": uuid.UUID(int=5),
        "deque": collections.deque([1, 2], maxlen=3),
        "defaultdict": (collections.defaultdict(list, a=[1]),),
        "class": int,
        "ellipsis": ...,
    }
    return {"values": content.values(pickled)}


def adamw(content: Content, mesh: DeviceMesh | None) -> State:
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2, bias=False))
    groups: list[dict[str, Any]] = [
        {"params": list(model[0].parameters()), "lr": content.lr(0.5), "weight_decay": 0.25},
        {"params": [*model[1].parameters(), *model[2].parameters()], "betas": (0.5, 0.75)},
    ]
    optimizer = AdamW(groups, lr=content.lr(0.125), amsgrad=True)
    content.train("adamw", model, optimizer)
    return {"model": model, "optimizer": optimizer, "step": content.value(STEPS)}


def sgd(content: Content, mesh: DeviceMesh | None) -> State:
    model = model_of(None)
    optimizer = SGD(model.parameters(), lr=content.lr(0.5), momentum=0.75)
    content.train("sgd", model, optimizer)
    return {"model": model, "optimizer": optimizer}


def adafactor(content: Content, mesh: DeviceMesh | None) -> State:
    model = model_of(None)
    optimizer = Adafactor(model.parameters(), lr=content.lr(0.5))
    content.train("adafactor", model, optimizer)
    return {"model": model, "optimizer": optimizer}


def two_optimizers(content: Content, mesh: DeviceMesh | None) -> State:
    model = model_of(None)
    matrices = [one for one in model.parameters() if one.ndim == 2]
    rest = [one for one in model.parameters() if one.ndim != 2]
    muon, optimizer = Muon(matrices, lr=content.lr(0.5)), AdamW(rest, lr=content.lr(0.25))
    content.train("two optimizers", model, muon, optimizer)
    return {"model": model, "muon": muon, "adamw": optimizer}


def milestones(content: Content, mesh: DeviceMesh | None) -> State:
    """Return the scheduler that has a dict whose keys are no text."""
    optimizer = SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    return {"multi_step": content.advance(MultiStepLR(optimizer, milestones=[2, 4, 8], gamma=0.5))}


def schedulers(content: Content, mesh: DeviceMesh | None) -> State:
    def optimizer() -> Optimizer:
        return SGD([nn.Parameter(torch.zeros(1))], lr=1.0)

    one_cycle, sequential = optimizer(), optimizer()
    chained: list[LRScheduler] = [LinearLR(sequential), CosineAnnealingLR(sequential, T_max=10)]
    return {
        "sequential": content.advance(SequentialLR(sequential, chained, milestones=[3])),
        "plateau": content.advance(ReduceLROnPlateau(optimizer(), patience=2), best=0.5, num_bad_epochs=1),
        "one_cycle": content.advance(OneCycleLR(one_cycle, max_lr=1.0, total_steps=16)),
        "lambda": content.advance(LambdaLR(optimizer(), lambda _: 1.0)),
    }


def scaler(content: Content, mesh: DeviceMesh | None) -> State:
    made = torch.amp.GradScaler("cpu", init_scale=content.lr(1024.0))
    if not content.blank:
        made.load_state_dict({**made.state_dict(), "_growth_tracker": 3})
    return {"scaler": made}


def replace_torch_save(content: Content, mesh: DeviceMesh | None) -> State:
    return {**_loop("replace_torch_save", content, None), "random": Held({"torch": _generator(content, 0)})}


def accelerate(content: Content, mesh: DeviceMesh | None) -> State:
    drawn = (random.Random(7).getstate(), _generator(content, 0), None)
    scaling = scaler(content, mesh)
    return {
        **_loop("accelerate", content, None),
        "random-0": Held({"states": content.value(drawn)}),
        **scaling,
    }


def hf_trainer(content: Content, mesh: DeviceMesh | None) -> State:
    model = nn.ModuleDict({"embed_tokens": nn.Embedding(8, 4), "lm_head": nn.Linear(4, 8, bias=False)})
    model["lm_head"].weight = model["embed_tokens"].weight
    optimizer = AdamW(model.parameters(), lr=content.lr(0.5))
    scheduler = content.advance(LambdaLR(optimizer, lambda _: 1.0))
    optimizer.param_groups[0]["lr"] = content.lr(0.5)
    content.train("hf_trainer", model, optimizer)
    files = {"trainer_state.json": b'{"global_step": 5}', "rng_state.pth": b"PK\x03\x04"}
    held = {"files": Held(content.values(files))}
    return {**held, "model": model, "optimizer": optimizer, "scheduler": scheduler}


def lightning(content: Content, mesh: DeviceMesh | None) -> State:
    made = _loop("lightning", content, None)
    batches = {"ready": 5, "completed": 5, "started": 5, "processed": 5}
    loops = {
        "epoch_loop.state_dict": {"_batches_that_stepped": 5},
        "epoch_loop.batch_progress": {"total": batches, "current": dict(batches), "is_last_batch": False},
        "epoch_loop.automatic_optimization.optim_progress": {"optimizer": {"step": {"total": {"ready": 5}}}},
    }
    parts = {"loops": loops, "precision": {}, "scheduler-0": {"last_epoch": STEPS, "_last_lr": [0.125]}}
    everything = (parts, random.Random(7).getstate(), _generator(content, 0), None)
    progress = Held({"all": content.value(everything)})
    return {"model": made["model"], "optimizer-0": made["optimizer"], "progress-0": progress}


def demo(content: Content, mesh: DeviceMesh | None) -> State:
    made = _loop("demo", content, mesh)
    own = "rng_0" if mesh is None else f"rng_{mesh.get_rank()}"
    drawn = {own: _generator(content, int(own[-1]))}
    return {"train": TrainingState(made["model"], made["optimizer"], step=content.value(STEPS), **drawn)}


def ddp(content: Content, mesh: DeviceMesh | None) -> State:
    made = _loop("ddp", content, None)
    return made if mesh is None else {**made, "model": DistributedDataParallel(made["model"])}


def fsdp2(content: Content, mesh: DeviceMesh | None) -> State:
    states = [hashlib.shake_256(b"rank %d" % rank).digest(64) for rank in range(2)]
    return {
        **_loop("fsdp2", content, mesh),
        "batches": Held({"drawn": content.value(STEPS)}),
        "random": Held({"ranks": content.value(states)}),
    }


def titan(content: Content, mesh: DeviceMesh | None) -> State:
    model = model_of(mesh)
    optimizers = TitanOptimizers([model], lr=content.lr(0.5))
    content.train("titan", model, *optimizers.optimizers)
    train_state = Held({"step": content.value(STEPS)})
    return {"model": TitanModel([model]), "optimizer": optimizers, "train_state": train_state}


def sharded(content: Content, mesh: DeviceMesh | None) -> State:
    def make(name: str, shape: Sequence[int], dtype: torch.dtype, placement: Placement) -> Tensor:
        whole = content.tensor(name, shape, dtype)
        return whole if mesh is None else distribute_tensor(whole, mesh, [placement], src_data_rank=None)

    return {
        "rows": make("rows", (6, 4), torch.float32, Shard(0)),
        "uneven rows": make("uneven rows", (7, 3), torch.bfloat16, Shard(0)),
        "fewer rows than ranks": make("fewer rows than ranks", (1, 5), torch.float32, Shard(0)),
        "columns": make("columns", (3, 11), torch.float8_e4m3fn, Shard(1)),
        "middle": make("middle", (2, 5, 3), torch.int64, Shard(1)),
        "bool rows": make("bool rows", (5,), torch.bool, Shard(0)),
        "complex rows": make("complex rows", (4, 2), torch.complex64, Shard(0)),
        "replicated": make("replicated", (3, 5), torch.float32, Replicate()),
    }


def _loop(name: str, content: Content, mesh: DeviceMesh | None) -> State:
    """Return model, AdamW and cosine schedule, as most recipes have them."""
    model = model_of(mesh)
    optimizer = AdamW(model.parameters(), lr=content.lr(0.5))
    scheduler = content.advance(CosineAnnealingLR(optimizer, T_max=100_000))
    content.train(name, model, optimizer)
    return {"model": model, "optimizer": optimizer, "scheduler": scheduler}


def _generator(content: Content, rank: int) -> Tensor:
    """Return a tensor such as ``torch.get_rng_state`` does."""
    return content.tensor(f"generator {rank}", (512,), torch.uint8)
