"""Bytes of a training step that do not depend on the allocator: what is kept for backward, gradients, state."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn


class SavedBytes:
    """total = bytes of the distinct storages that autograd saved for backward, parameters and buffers not counted."""

    def __init__(self, model: nn.Module) -> None:
        self._seen = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
        self.total = 0

    @contextmanager
    def watch(self) -> Iterator[None]:
        with torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor):
            yield

    def _pack(self, tensor: Tensor) -> Tensor:
        # The graph keeps every saved storage alive until backward: no address comes twice.
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._seen:
            self._seen.add(storage.data_ptr())
            self.total += storage.nbytes()
        return tensor


@dataclass(frozen=True)
class Memory:
    """Bytes that a training step holds.

    weights: parameters and buffers.
    gradients: of the parameters that train.
    state: of the optimizers.
    saved: tensors kept for backward, as `FreezeOut.count_memory` counted them last; None: not counted.
    """

    weights: int
    gradients: int
    state: int
    saved: int | None

    def __str__(self) -> str:
        saved = "saved for backward not counted" if self.saved is None else f"{_mib(self.saved)} saved for backward"
        held = f"{_mib(self.weights)} weights, {_mib(self.gradients)} gradients, {_mib(self.state)} optimizer state"
        return f"{held}, {saved}"


def held_memory(model: nn.Module, optimizers: Iterable[torch.optim.Optimizer], saved: int | None) -> Memory:
    """-> Memory of the model as it stands, whether or not its gradients exist right now."""
    parameters = list(model.parameters())
    return Memory(
        weights=nbytes((*parameters, *model.buffers())),
        gradients=nbytes(p for p in parameters if p.requires_grad),
        state=nbytes(v for o in optimizers for state in o.state.values() for v in state.values()),
        saved=saved,
    )


def nbytes(values: Iterable) -> int:
    return sum(v.numel() * v.element_size() for v in values if isinstance(v, Tensor))


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"
