"""Whether the layers run in their order, seen at the model's first forward; and the order in which they did."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import pairwise

from torch import nn

from .attach import TransientHook
from .layers import Layer


class OrderCheck:
    """Whether the layers run in their order: layer i's last call comes before layer i + 1's, in the first forward.

    Args:
        model: whose next forward is watched.
        layers: in the order in which they should run.

    Raises:
        ValueError: in that forward, where they run in another order; the message says which.
    """

    def __init__(self, model: nn.Module, layers: Sequence[Layer]) -> None:
        self._model = model
        self._layers = layers
        self._last_call: dict[tuple[int, str], int] = {}  # (layer, name of one of its modules) -> number of the call
        self._running = False
        self._handles: list = []
        self._watch()

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    @contextmanager
    def paused(self) -> Iterator[None]:
        was_open = bool(self._handles)
        self.close()
        try:
            yield
        finally:
            if was_open:
                self._watch()

    def _watch(self) -> None:
        self._handles = [
            self._model.register_forward_pre_hook(TransientHook(self._begin), prepend=True),
            self._model.register_forward_hook(TransientHook(self._end)),
        ]
        for i, layer in enumerate(self._layers):
            for name, module in layer.modules.items():
                if module is not self._model:
                    hook = TransientHook(partial(self._see, (i, name)))
                    self._handles.append(module.register_forward_pre_hook(hook))

    def _begin(self, *_: object) -> None:
        self._running = True
        self._last_call.clear()

    def _see(self, called: tuple[int, str], *_: object) -> None:
        # A checkpointed layer runs again in the backward pass, in the reverse order.
        if self._running:
            self._last_call.pop(called, None)
            self._last_call[called] = len(self._last_call)

    def _end(self, *_: object) -> None:
        self._running = False
        # Insertion order is the order of the last calls.
        last = {i: (place, name) for place, (i, name) in enumerate(self._last_call)}
        for i, j in pairwise(sorted(last)):
            if last[i] > last[j]:
                module = last[i][1]
                named = self._layers[i].name
                of = f"layer {i} ({named})" if module == named else f"{module} of layer {i} ({named})"
                raise ValueError(
                    f"layers must be in the order of execution, but {of} runs after layer {j} "
                    f"({self._layers[j].name}); pass the order that was seen: layers={self._recorded()}"
                )

    def _recorded(self) -> list[str | list[str]]:
        """The modules in the order of their last calls. Neighbours that were one layer stay one entry."""
        entries: list[tuple[int, list[str]]] = []
        for i, name in self._last_call:
            if entries and (entries[-1][0] == i or self._only_shifts(i, name)):
                entries[-1][1].append(name)
            else:
                entries.append((i, [name]))
        for i, layer in enumerate(self._layers):
            uncalled = [name for name in layer.modules if (i, name) not in self._last_call]
            rest = uncalled + [name for name in layer.parameters if not _inside(name, layer.modules)]
            if not rest:
                continue
            home = next((names for j, names in entries if j == i), None)
            if home is None:
                behind = sum(j < i for j, _ in entries)
                entries.insert(behind, (i, rest))
            else:
                home += rest
        return [names[0] if len(names) == 1 else names for _, names in entries]

    def _only_shifts(self, i: int, name: str) -> bool:
        """Whether a module has vectors alone, as a norm: it then belongs to what it runs behind."""
        return all(p.dim() < 2 for p in self._layers[i].modules[name].parameters())


def _inside(name: str, modules: dict[str, nn.Module]) -> bool:
    return any(name.startswith(f"{module}.") for module in modules)
