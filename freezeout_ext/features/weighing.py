"""Weighing: the first forwards behind a transition run as before and are timed, and so is writing and reading rows."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .columns import Column
from .store import Store
from .through import through
from .timing import Stopwatch, seconds_of

# Forwards that are timed before anything is decided.
TIMED = 3


class Weighing:
    """What frozen modules cost now, and what keeping their outputs would.

    Args:
        modules: name -> frozen module that runs now.
        kept: the dtype of rows.

    Attributes:
        samples: of the forward that was timed last.
        row_bytes: of what the last module gave.
    """

    def __init__(self, modules: Mapping[str, nn.Module], device: torch.device, kept: torch.dtype | None) -> None:
        self._modules, self._device, self._kept = modules, device, kept
        self._layers, self._forward = Stopwatch(device, TIMED), Stopwatch(device, TIMED)
        self._outputs: list[Tensor] = []
        self._inside = False
        self.samples = 0
        self.row_bytes = 0

    @contextmanager
    def timed(self, samples: int) -> Iterator[None]:
        """Around a forward over so many samples."""
        self.samples = samples
        with through(self._modules, self._call):
            self._forward.start()
            yield
            self._forward.stop(samples)
            self._layers.stop(samples)

    def times(self) -> tuple[float, float] | None:
        """-> seconds of a sample in the modules, and of a whole forward; None before they are known."""
        layers, forward = self._layers.least(), self._forward.median()
        return None if layers is None or forward is None else (layers, forward * self.samples)

    def trial(self) -> tuple[float, float]:
        """-> seconds to write and to read a row like the last module's outputs."""
        outputs, self._outputs = self._outputs, []
        if not outputs:
            return 0.0, 0.0
        columns, n = [Column.like(x, self._kept) for x in outputs], self.samples
        self.row_bytes = sum(column.row_bytes() for column in columns)
        store = Store(columns, 3 * n, 3 * n, self._device)
        keys = torch.arange(3 * n, device="cpu").split(n)

        def fill(part: Tensor) -> None:
            store.put(part, [x.clone() for x in outputs])  # see Frontier.recorded

        filled = [seconds_of(partial(fill, part), self._device) for part in keys]
        mixed = keys[1].flip(0)
        gathered = [seconds_of(lambda: store.gather(mixed), self._device) for _ in range(TIMED)]
        return sum(filled[1:]) / 2 / n, sorted(gathered)[1] / n

    def _call(self, name: str, module: nn.Module, original: Any, args: tuple, kwargs: dict) -> Any:
        if self._inside:
            return original(*args, **kwargs)
        self._inside = True
        try:
            self._layers.start()
            output = original(*args, **kwargs)
            self._layers.pause()
        finally:
            self._inside = False
        self._outputs = [
            x.detach() for x in tree_leaves(output) if isinstance(x, Tensor) and x.dim() and len(x) == self.samples
        ]
        return output
