"""What stands beside the values of tensors: versions, autocast, the generators of random numbers."""

import random
import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


def version_of(x: Tensor) -> int:
    """-> how often x was written to; -1 for inference tensors, which do not count."""
    return -1 if x.is_inference() else x._version


def autocast_state(device: torch.device) -> tuple[bool, torch.dtype]:
    """-> whether autocast is on there, and its dtype."""
    return torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type)


def generator_states(tensors: Iterable[Tensor] = ()) -> list:
    """-> the states of random's, numpy's and torch's generators, to be compared. None waits for a device.

    Args:
        tensors: of the devices' generators those of these tensors' devices.
    """
    found: list[Any] = [random.getstate(), bytes(torch.get_rng_state().tolist())]
    if numpy := sys.modules.get("numpy"):  # from a numpy that nobody has imported nobody draws
        _, words, *rest = numpy.random.get_state()
        found += [words.tobytes(), *rest]
    for index in {x.device.index for x in tensors if x.is_cuda}:
        found.append(bytes(torch.cuda.get_rng_state(index).tolist()))
    return found


class Generators:
    """The states of all generators that a forward may draw from, to be restored.

    Args:
        devices: those of the devices too.
    """

    def __init__(self, *, devices: bool = True) -> None:
        self._torch, self._python = torch.get_rng_state(), random.getstate()
        self._numpy = numpy.random.get_state() if (numpy := sys.modules.get("numpy")) else None
        self._cuda = torch.cuda.get_rng_state_all() if devices and torch.cuda.is_initialized() else None

    def restore(self) -> None:
        torch.set_rng_state(self._torch)
        random.setstate(self._python)
        if self._numpy is not None:
            sys.modules["numpy"].random.set_state(self._numpy)
        if self._cuda is not None:
            torch.cuda.set_rng_state_all(self._cuda)
