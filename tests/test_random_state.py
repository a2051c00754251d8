# ruff: noqa: NPY002 - the global generator is what this is about
"""What is drawn after a load is what would have been drawn after the save, of every global generator."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cloudckpt import ConfigurationError, RandomState

DRAW = """
import json, random, sys
import numpy as np, torch
import cloudckpt

def draw():
    return [
        [random.gauss(0, 1) for _ in range(3)], [random.random() for _ in range(700)],
        np.random.standard_normal(3).tolist(), np.random.rand(700).tolist(),
        random.sample(range(99), 9), np.random.permutation(20).tolist(),
        torch.randn(17).tolist(), torch.rand(701, dtype=torch.float64).tolist(), torch.randperm(20).tolist(),
    ]

with cloudckpt.Checkpointer(sys.argv[1], progress=False, preemption_grace=None) as checkpointer:
    state = {"random": cloudckpt.RandomState()}
    if sys.argv[2] == "save":
        random.seed(7), np.random.seed(8), torch.manual_seed(9)
        draw()  # an odd number of normal deviates: the second of the last pair is kept by the generators
        checkpointer.save(1, state)
    else:
        checkpointer.load(state)
print(json.dumps(draw()))
"""


@pytest.fixture(autouse=True)
def _generators() -> Iterator[None]:
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    yield
    random.setstate(before[0])
    np.random.set_state(before[1])
    torch.set_rng_state(before[2])


def seed(number: int) -> None:
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)


def drawn() -> list[Any]:
    return [
        random.gauss(0, 1),
        random.random(),
        np.random.standard_normal(3).tolist(),
        torch.randn(3).tolist(),
    ]


def test_a_fresh_process_goes_on_exactly(tmp_path: Path) -> None:
    def run(what: str) -> Any:
        command = [sys.executable, "-c", DRAW, f"file://{tmp_path}/run", what]
        ran = subprocess.run(command, capture_output=True, text=True, check=False)
        assert ran.returncode == 0, ran.stderr
        return json.loads(ran.stdout)

    assert run("save") == run("load")


def test_reading_the_state_changes_no_generator() -> None:
    seed(1)
    expected = drawn()
    seed(1)
    RandomState().state_dict()
    assert drawn() == expected


def test_the_state_is_tensors_and_plain_values() -> None:
    random.gauss(0, 1)

    def check(value: object) -> None:
        assert type(value) in (dict, list, int, float, str, type(None), torch.Tensor), type(value)
        if isinstance(value, dict | list):
            for one in value.values() if isinstance(value, dict) else value:
                check(one)

    check(RandomState().state_dict())


@pytest.mark.parametrize("draws", [0, 1])
def test_the_second_of_a_pair_of_normal_deviates_is_kept(draws: int) -> None:
    seed(1)
    for _ in range(draws):
        random.gauss(0, 1)
        np.random.standard_normal()
        np.random.randn()
    state = RandomState().state_dict()
    expected = drawn()
    drawn()
    RandomState().load_state_dict(state)
    assert drawn() == expected


def test_a_generator_whose_state_was_not_saved_is_left_alone() -> None:
    state = RandomState().state_dict()
    del state["numpy"]
    np.random.seed(5)
    expected = np.random.rand(3).tolist()
    np.random.seed(5)
    RandomState().load_state_dict(state)
    assert np.random.rand(3).tolist() == expected


@pytest.mark.parametrize("device", ["cuda", "xpu", "mps"])
def test_another_number_of_devices_is_named_and_nothing_changes(device: str) -> None:
    state = RandomState().state_dict() | {device: [torch.zeros(16, dtype=torch.uint8)] * 9}
    seed(3)
    expected = drawn()
    seed(3)
    with pytest.raises(ConfigurationError, match=rf"of 9 {device.upper()} devices, and this process has \w+"):
        RandomState().load_state_dict(state)
    assert drawn() == expected


def test_numpy_missing_at_the_load_is_named() -> None:
    code = """
import sys
sys.modules["numpy.random"] = None
import cloudckpt
state = cloudckpt.RandomState().state_dict()
assert "numpy" not in state
cloudckpt.RandomState().load_state_dict(state)
try:
    cloudckpt.RandomState().load_state_dict(state | {"numpy": {}})
except cloudckpt.ConfigurationError as error:
    print(error)
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "numpy is not installed here" in ran.stdout


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"version": 2}, "version is 2"),
        ({"jax": [1]}, "jax"),
        ({"torch": torch.zeros(3, dtype=torch.uint8)}, "can't be used"),
        ({"python": {"version": 3, "words": [1, 2], "gauss": None}}, "can't be used"),
    ],
)
def test_what_is_no_such_state_is_refused_and_nothing_changes(change: dict[str, Any], said: str) -> None:
    state = RandomState().state_dict() | change
    seed(3)
    expected = drawn()
    seed(3)
    with pytest.raises(ConfigurationError, match=said):
        RandomState().load_state_dict(state)
    assert drawn() == expected


def test_a_numpy_generator_of_another_kind_is_refused() -> None:
    code = """
import numpy as np, cloudckpt
np.random.set_bit_generator(np.random.PCG64(1))
try:
    cloudckpt.RandomState().state_dict()
except cloudckpt.ConfigurationError as error:
    print(error)
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "numpy's global generator is a PCG64" in ran.stdout
