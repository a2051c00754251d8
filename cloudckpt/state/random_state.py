"""The random generators of a process as one part of a training state."""

from __future__ import annotations

import importlib
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Final

import torch

from cloudckpt.backends.errors import ConfigurationError

_FORM: Final = 1
_HINT: Final = "Save cloudckpt.RandomState() under this key, in cloudckpt.PerRank where each rank has its own"
_MERSENNE: Final = "MT19937"


class RandomState:
    """The state of the process's global random generators: Python's, numpy's, torch's and each device's.

    It has no state of its own. `state_dict` reads the generators and `load_state_dict` sets them, so that
    what is drawn after a load is what would have been drawn after the save. Generators that the program makes
    itself, such as a ``torch.Generator`` or a ``numpy.random.Generator``, are not among them.

    numpy's is there where numpy has been installed, and that of CUDA, XPU or MPS where training has used the
    device. Where each rank draws its own numbers, put it into `PerRank`.
    """

    def state_dict(self) -> dict[str, Any]:
        """Return the generators' states as tensors and plain values.

        Returns:
            ``version``, ``python`` and ``torch``; ``numpy``, ``cuda``, ``xpu`` and ``mps`` where they are in
            use. Those of devices are lists with a tensor for each.

        Raises:
            ConfigurationError: numpy's global generator was replaced by one of another kind.
        """
        version, words, gauss = random.getstate()
        described: dict[str, Any] = {
            "version": _FORM,
            "python": {"version": version, "words": list(words), "gauss": gauss},
            "torch": torch.get_rng_state(),
        }
        if (numpy := _numpy()) is not None:
            described["numpy"] = _of_numpy(numpy)
        for device in _DEVICES:
            if device.in_use():
                described[device.name] = device.read()
        return described

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Set the generators to these states. Nothing is changed where one of them can't be.

        Raises:
            ConfigurationError: the number of devices differs, numpy or a device is missing, or this is no
                state of a `RandomState`.
        """
        if state_dict.get("version") != _FORM or not {"python", "torch"} <= state_dict.keys():
            raise ConfigurationError(
                f"this is no state of a RandomState: version is {state_dict.get('version')!r}, keys are "
                f"{', '.join(sorted(map(str, state_dict)))}",
                hint=_HINT,
            )
        known = {"version", "python", "torch", "numpy", *(device.name for device in _DEVICES)}
        if unknown := sorted(map(str, state_dict.keys() - known)):
            raise ConfigurationError(
                f"the state has generators that this version does not know: {', '.join(unknown)}",
                hint="Load it with the version of cloudckpt that saved it",
            )
        try:
            restore = [*self._of_host(state_dict)]
            restore += [
                device.written(state_dict[device.name]) for device in _DEVICES if device.name in state_dict
            ]
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise ConfigurationError(
                f"a generator's state can't be used: {type(error).__name__}: {error}", hint=_HINT
            ) from error
        for one in restore:
            one()

    @staticmethod
    def _of_host(state_dict: Mapping[str, Any]) -> Iterator[Callable[[], object]]:
        """Yield setters of the generators of Python, torch and numpy, each tried on one of its own."""
        python = state_dict["python"]
        state = (int(python["version"]), tuple(map(int, python["words"])), _optional(python["gauss"]))
        random.Random().setstate(state)  # noqa: S311 - no secret
        yield lambda: random.setstate(state)
        own = _bytes(state_dict["torch"])
        torch.Generator().set_state(own)
        yield lambda: torch.set_rng_state(own)
        if "numpy" in state_dict:
            yield _to_numpy(state_dict["numpy"])


@dataclass(frozen=True, slots=True)
class _Device:
    """A kind of devices, each of which has a generator."""

    name: str

    def module(self) -> Any:
        """Torch's module for it; None where this build of torch has none."""
        return getattr(torch, self.name, None)

    def in_use(self) -> bool:
        """Return True if this process has used such a device: reading a state would initialize it."""
        module = self.module()
        if self.name == "mps":
            return bool(torch.backends.mps.is_available())
        return module is not None and bool(module.is_available()) and bool(module.is_initialized())

    def count(self) -> int:
        module = self.module()
        if module is None or not module.is_available():
            return 0
        return 1 if self.name == "mps" else int(module.device_count())

    def read(self) -> list[torch.Tensor]:
        module = self.module()
        return [module.get_rng_state()] if self.name == "mps" else list(module.get_rng_state_all())

    def written(self, states: list[torch.Tensor]) -> Callable[[], object]:
        """Return a setter of the generators, which is known to work.

        Raises:
            ConfigurationError: another number of devices is here.
        """
        here, name = self.count(), self.name.upper()
        if here != len(states):
            raise ConfigurationError(
                f"the state has the generators of {len(states)} {name} device{'s' * (len(states) != 1)}, and "
                f"this process has {here or 'none'}",
                hint="Load it on as many devices, or set CUDA_VISIBLE_DEVICES alike at the save and the load"
                if self.name == "cuda"
                else "Load it on as many devices",
            )
        module, own = self.module(), [_bytes(state) for state in states]
        if self.name == "mps":
            return lambda: module.set_rng_state(own[0])
        return lambda: module.set_rng_state_all(own)


_DEVICES: Final = (_Device("cuda"), _Device("xpu"), _Device("mps"))


def _numpy() -> ModuleType | None:
    try:
        return importlib.import_module("numpy.random")
    except ImportError:
        return None


def _of_numpy(numpy: ModuleType) -> dict[str, Any]:
    state = numpy.get_state(legacy=False)
    if state["bit_generator"] != _MERSENNE:
        raise ConfigurationError(
            f"numpy's global generator is a {state['bit_generator']}, and no longer a {_MERSENNE}",
            hint="Save that generator's state yourself, in a class with state_dict and load_state_dict",
        )
    inner = state["state"]
    return {
        "words": torch.tensor([int(word) for word in inner["key"]], dtype=torch.int64),
        "position": int(inner["pos"]),
        "has_gauss": int(state["has_gauss"]),
        "gauss": float(state["gauss"]),
    }


def _to_numpy(described: Mapping[str, Any]) -> Callable[[], object]:
    numpy = _numpy()
    if numpy is None:
        raise ConfigurationError(
            "the state has numpy's random generator, and numpy is not installed here",
            hint="Install numpy",
        )
    state = {
        "bit_generator": _MERSENNE,
        "state": {
            "key": importlib.import_module("numpy").array(described["words"].tolist(), dtype="uint32"),
            "pos": int(described["position"]),
        },
        "has_gauss": int(described["has_gauss"]),
        "gauss": float(described["gauss"]),
    }
    numpy.RandomState().set_state(state)  # a try
    return lambda: numpy.set_state(state)


def _bytes(state: torch.Tensor) -> torch.Tensor:
    """Return a state as torch takes it: bytes in the memory of the host."""
    return state.detach().to("cpu", torch.uint8).contiguous()


def _optional(number: float | None) -> float | None:
    return None if number is None else float(number)
