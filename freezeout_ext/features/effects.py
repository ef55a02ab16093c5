"""Effects: what an operation or a module reads, writes, shares and draws, as far as tensors and generators show it."""

import random
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

try:
    import numpy
except ImportError:
    numpy = None  # type: ignore[assignment]  # None is its absence


def tensors_in(tree: Any) -> list[Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor)]


def written_by(func: Any, args: tuple, kwargs: Mapping) -> list[Tensor]:
    """-> the arguments that an operation writes to, by its schema."""
    schema = getattr(func, "_schema", None)
    if schema is None or not schema.is_mutable:
        return []
    found: list[Tensor] = []
    for i, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[i] if i < len(args) else kwargs.get(argument.name)
            found += tensors_in(value)
    return found


def storage_of(x: Tensor) -> torch.UntypedStorage | None:
    return x.untyped_storage() if x.layout is torch.strided else None


def address_of(x: Tensor) -> int:
    """-> a number that tensors share whose memory is one; 0: it has none."""
    storage = storage_of(x)
    return 0 if storage is None else storage._cdata


def leaves_of(output: Any) -> Iterator[Tensor]:
    """-> the tensors of a model's output, of whatever containers that is made."""
    for leaf in tree_leaves(output):
        if isinstance(leaf, Tensor):
            yield leaf
        elif isinstance(leaf, Mapping):
            yield from leaves_of(list(leaf.values()))
        elif hasattr(leaf, "__dataclass_fields__"):
            yield from leaves_of(list(vars(leaf).values()))


def version_of(x: Tensor) -> int:
    """-> how often x was written to; -1 for inference tensors, which do not count."""
    return -1 if x.is_inference() else x._version


def versions_of(tensors: Iterable[Tensor]) -> list[int]:
    return [version_of(x) for x in tensors]


def host_states() -> tuple:
    """-> the states of random's and numpy's generators."""
    if numpy is None:
        return random.getstate(), ()
    state: Any = numpy.random.get_state()
    _, words, *rest = state
    return random.getstate(), (words.tobytes(), *rest)


def device_states(tensors: Iterable[Tensor]) -> list[bytes]:
    """The generators that an operation on these may draw from; none of them waits for the device."""
    found = [torch.get_rng_state().numpy().tobytes() if numpy else bytes(torch.get_rng_state().tolist())]
    for index in {x.device.index for x in tensors if x.device.type == "cuda"}:
        found.append(bytes(torch.cuda.get_rng_state(index).tolist()))
    return found


class Generators:
    """The states of all generators that a forward may draw from.

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
def seeded(seed: int) -> Iterator[None]:
    """Inside, torch (CPU), numpy and random draw from `seed`. Afterwards they go on as if nothing had been drawn."""
    before = Generators(devices=False)
    # Not torch.manual_seed, which would seed the devices too.
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    if numpy:
        numpy.random.seed(seed % 2**32)
    try:
        yield
    finally:
        before.restore()
