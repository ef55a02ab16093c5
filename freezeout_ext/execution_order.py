"""Whether the layers run in their order, seen at the model's first forward."""

from functools import partial
from itertools import pairwise

from torch import nn

from .layers import Layers
from .transient_hook import TransientHook


class OrderCheck:
    """Sees at the model's first forward whether the layers run in their order: by the last call of each."""

    def __init__(self, model: nn.Module, layers: Layers) -> None:
        self._layers = layers
        self._last_call: dict[int, int] = {}
        self._running = False
        self._calls = 0
        self._handles = [
            model.register_forward_pre_hook(TransientHook(self._begin), prepend=True),
            model.register_forward_hook(TransientHook(self._end)),
        ]
        for i, layer in enumerate(layers):
            for module in layer.modules.values():
                if module is not model:
                    self._handles.append(module.register_forward_pre_hook(TransientHook(partial(self._see, i))))

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _begin(self, *_: object) -> None:
        self._running, self._calls = True, 0
        self._last_call.clear()

    def _see(self, i: int, *_: object) -> None:
        # A checkpointed layer runs again in the backward pass, in the reverse order.
        if self._running:
            self._calls += 1
            self._last_call[i] = self._calls

    def _end(self, *_: object) -> None:
        self._running = False
        seen = sorted(self._last_call)
        for i, j in pairwise(seen):
            if self._last_call[i] > self._last_call[j]:
                raise ValueError(
                    f"layers must be in the order of execution, but layer {i} ({self._layers[i].name}) runs after "
                    f"layer {j} ({self._layers[j].name}); pass layers=[...] in the order in which they run"
                )
