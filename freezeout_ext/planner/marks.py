"""LayerMarks: where each layer begins in the forward pass and ends in the backward pass, on any clock."""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn

from ..layers import Layers


class LayerMarks:
    """begins[i] = now() as layer i's first module is called; ends[i] = now() as its inputs have their gradients.

    Layer i's forward is begins[i + 1] - begins[i]. What runs between two layers counts to the first of them.
    Layer i's backward is ends[i] - ends[i + 1].
    LayerMarks is a context manager. The model has the hooks only inside.

    Args:
        now: reads the clock. The reading is a number, or something that `difference` takes.
        difference: (later, earlier) -> float, asked for after the step.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Layers,
        now: Callable[[], Any],
        difference: Callable[[Any, Any], float] = lambda later, earlier: later - earlier,
    ) -> None:
        self.now, self._difference = now, difference
        self._model, self._layers = model, layers
        self.begins: dict[int, Any] = {}
        self.ends: dict[int, Any] = {}
        self.current = 0  # the layer that runs, in the forward pass

    def __enter__(self) -> "LayerMarks":
        self._handles = [
            module.register_forward_pre_hook(partial(self._begin, i), with_kwargs=True, prepend=True)
            for i, layer in enumerate(self._layers)
            for module in layer.modules.values()
            if module is not self._model
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def forward_intervals(self, start: Any, end: Any) -> tuple[float, ...]:
        """Forward of each layer.

        Args:
            start: when the model was called.
            end: when the model returned.
        """
        edges = [end]
        for i in reversed(range(len(self._layers))):
            # A layer without a module of its own runs inside the one before it.
            edges.append(start if i == 0 else self.begins.get(i, edges[-1]))
        return tuple(self._difference(edges[j], edges[j + 1]) for j in reversed(range(len(edges) - 1)))

    def backward_intervals(self, start: Any, end: Any, first: int = 0) -> tuple[float, ...]:
        """Backward of layers first .. L.

        Args:
            start: when the backward pass started.
            end: when the backward pass ended.
            first: the layer where the backward pass stops.
        """
        edges = [start]
        for i in reversed(range(first + 1, len(self._layers))):
            edges.append(self.ends.get(i, edges[-1]))
        edges.append(end)
        return tuple(self._difference(edges[j + 1], edges[j]) for j in reversed(range(len(edges) - 1)))

    def _begin(self, i: int, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if i in self.begins:
            return
        self.begins[i], self.current = self.now(), i
        for value in (*args, *kwargs.values()):
            if isinstance(value, Tensor) and value.requires_grad:
                value.register_hook(partial(self._end, i))

    def _end(self, i: int, grad: Tensor) -> None:
        self.ends[i] = self.now()
