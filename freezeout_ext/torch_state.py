"""What stands beside the values of tensors: versions, autocast, the generators of random numbers."""

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

try:
    import numpy
except ImportError:
    numpy = None  # type: ignore[assignment]  # None is its absence


def version_of(x: Tensor) -> int:
    """-> how often x was written to; -1 for inference tensors, which do not count."""
    return -1 if x.is_inference() else x._version


def autocast_state(device: torch.device) -> tuple[bool, torch.dtype]:
    """-> whether autocast is on there, and its dtype."""
    return torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type)


def host_states() -> tuple:
    """-> the states of random's and numpy's generators, to be compared."""
    if numpy is None:
        return random.getstate(), ()
    state: Any = numpy.random.get_state()
    _, words, *rest = state
    return random.getstate(), (words.tobytes(), *rest)


def device_states(tensors: Iterable[Tensor]) -> list[bytes]:
    """-> the states of torch's generators that an operation on these may draw from. None waits for a device."""
    found = [torch.get_rng_state().numpy().tobytes() if numpy else bytes(torch.get_rng_state().tolist())]
    for index in {x.device.index for x in tensors if x.is_cuda}:
        found.append(bytes(torch.cuda.get_rng_state(index).tolist()))
    return found


def generator_states(tensors: Iterable[Tensor] = ()) -> list:
    """-> host_states() and device_states(tensors)."""
    return [*host_states(), *device_states(tensors)]


class Generators:
    """The states of all generators that a forward may draw from, to be restored.

    Args:
        devices: those of the devices too.
    """

    def __init__(self, *, devices: bool = True) -> None:
        self._torch, self._python = torch.get_rng_state(), random.getstate()
        self._numpy: Any = numpy.random.get_state() if numpy else None
        self._cuda = torch.cuda.get_rng_state_all() if devices and torch.cuda.is_initialized() else None

    def restore(self) -> None:
        torch.set_rng_state(self._torch)
        random.setstate(self._python)
        if self._numpy is not None:
            numpy.random.set_state(self._numpy)
        if self._cuda is not None:
            torch.cuda.set_rng_state_all(self._cuda)


@contextmanager
def kept_generators(*, devices: bool = False) -> Iterator[None]:
    """Afterwards the generators go on as if nothing had been drawn inside.

    Args:
        devices: those of the devices too.
    """
    before = Generators(devices=devices)
    try:
        yield
    finally:
        before.restore()


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Inside, torch (CPU), numpy and random draw from `seed`. Afterwards they go on as if nothing had been drawn."""
    with kept_generators():
        # Not torch.manual_seed, which would seed the devices too.
        torch.default_generator.manual_seed(seed)
        random.seed(seed)
        if numpy:
            numpy.random.seed(seed % 2**32)
        yield
