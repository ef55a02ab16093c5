"""Bytes of a training step that do not depend on the allocator: what is kept for backward, gradients, state."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn


class SavedBytes:
    """by_owner[o] = bytes of the storages that autograd saved for backward while owner o ran.

    Parameters and buffers do not count. Each storage counts once, for the owner that saved it last.

    Args:
        model: whose parameters and buffers are left out.
        owner: () -> who saves, asked at each tensor that is saved; such as the number of the layer that runs.
    """

    def __init__(self, model: nn.Module, owner: Callable[[], int] = lambda: 0) -> None:
        self._owner = owner
        self._held = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
        self._saved: dict[int, tuple[int, int]] = {}  # address -> (owner, bytes)

    @contextmanager
    def watch(self) -> Iterator[None]:
        with torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor):
            yield

    @property
    def by_owner(self) -> dict[int, int]:
        found: dict[int, int] = {}
        for owner, count in self._saved.values():
            found[owner] = found.get(owner, 0) + count
        return found

    @property
    def total(self) -> int:
        return sum(self.by_owner.values())

    def _pack(self, tensor: Tensor) -> Tensor:
        # The graph keeps every saved storage alive until backward: no address comes twice.
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._held:
            self._saved[storage.data_ptr()] = self._owner(), storage.nbytes()
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

    @property
    def held(self) -> int:
        """Without what is saved for backward."""
        return self.weights + self.gradients + self.state

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
