"""SavedBytes: what autograd keeps for the backward pass."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class SavedBytes:
    """by_owner[o] = bytes of the storages that autograd saved for backward, and that owner o was the last to save.

    Parameters and buffers are not counted, nor is a storage twice.

    Args:
        owner: asked at each tensor that is saved, such as for the layer that runs.
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
