"""Moves: whether rows are kept behind the layers that are frozen now, or read on from where they are kept."""

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .columns import Column, row_bytes_of
from .frontier import through
from .generations import Generation, Generations
from .store import Store
from .timing import Stopwatch, seconds_of
from .worth import TIMED, Left, Pace, Times, reason_against


class Moves:
    """Decides once a transition, after a few forwards that run as before and are timed.

    Args:
        kept: what is kept.
        loading: -> seconds in which a step waits for a sample that is read.

    Attributes:
        watch_seconds: of the last watch, None before one was timed.
        layers_seconds: of a sample in the frozen layers, as far as they were timed.
    """

    def __init__(self, kept: Generations, loading: Callable[[], float | None]) -> None:
        self._kept, self._loading = kept, loading
        self._pace = Pace()
        self._weighing: Weighing | None = None
        self._decided = False
        self.watch_seconds: float | None = None
        self.layers_seconds = 0.0

    def restart(self) -> None:
        """Other layers are frozen now."""
        self._weighing, self._decided = None, False

    def count(self, samples: int) -> None:
        """Notes a forward over so many samples."""
        self._pace.count(self._kept.attached.step_count, samples)

    def decide(self, now: Generation | None, frozen: Mapping[str, nn.Module], gathered: float | None) -> str | bool:
        """-> True: rows are to be kept behind these modules; a text: why that would not pay; False: not known yet.

        Args:
            now: what is read meanwhile.
            gathered: seconds in which a row of it is read, where that is known.
        """
        if self._decided:
            return True
        freezeout = self._kept.attached
        left = Left.of(freezeout.schedule, freezeout.step_count, freezeout.num_frozen)
        samples, rows = left.times(self._pace.samples), self._kept.owned
        if self._weighing is None:
            reason = reason_against(Times(layers=float("inf")), samples, rows, rows)
            if reason is not None and self._pace.samples:  # whatever the times
                return reason
            behind = {} if now is None else now.frontier.modules
            running = {name: module for name, module in frozen.items() if name not in behind}
            self._weighing = Weighing(running, self._kept.device)
        found = self._weighing.times()
        if found is None or not self._pace.samples:
            return False
        layers, forward = found
        reads = None if now is None else gathered or 0.0
        times = partial(
            Times.measured, self._weighing.samples, layers=layers, wait=self._loading() or 0.0, forward=forward,
            watch=self.watch_seconds,
        )  # fmt: skip
        # Without the times of rows first: to try them takes a while itself.
        reason = reason_against(times(gathered=reads), samples, rows, rows)
        if reason is None:
            row_bytes, fill, gather = trial(self._weighing.outputs, self._kept.dtype, self._kept.device)
            fitting, drops = self._kept.fitting(row_bytes)
            again = now.layers_seconds if now is not None and drops else 0.0
            reads = None if now is None else gathered or gather
            reason = reason_against(
                times(gathered=reads, fill=fill, gather=gather, again=again), samples, rows, fitting
            )
        self._weighing = None
        if reason is not None:
            return reason
        self._decided = True
        self.layers_seconds = layers + (0.0 if now is None else now.layers_seconds)
        return True

    def timed(self, samples: int) -> AbstractContextManager:
        """Around a forward that runs as before, where `decide` does not know yet."""
        assert self._weighing is not None  # see `decide`
        return self._weighing.timed(samples)


class Weighing:
    """What frozen modules cost now.

    Args:
        modules: name -> frozen module that runs now.

    Attributes:
        samples: of the forward that was timed last.
        outputs: of the last module in that forward.
    """

    def __init__(self, modules: Mapping[str, nn.Module], device: torch.device) -> None:
        self._modules = modules
        self._layers, self._forward = Stopwatch(device, TIMED), Stopwatch(device, TIMED)
        self._inside = False
        self.samples = 0
        self.outputs: list[Tensor] = []

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
        self.outputs = [
            x.detach() for x in tree_leaves(output) if isinstance(x, Tensor) and x.dim() and len(x) == self.samples
        ]
        return output


def trial(outputs: Sequence[Tensor], kept: torch.dtype | None, device: torch.device) -> tuple[int, float, float]:
    """-> bytes of a row like these outputs [B, ...], and seconds to write one and to read one.

    Args:
        kept: the dtype of rows.
        device: where they lie.
    """
    if not outputs:
        return 0, 0.0, 0.0
    columns, n = [Column.like(x, kept) for x in outputs], len(outputs[0])
    store = Store(columns, TIMED * n, TIMED * n, device)
    keys = torch.arange(TIMED * n, device="cpu").split(n)

    def fill(part: Tensor) -> None:
        store.put(part, [x.clone() for x in outputs])  # see Frontier.computed

    filled = [seconds_of(partial(fill, part), device) for part in keys]
    mixed = keys[1].flip(0)
    gathered = [seconds_of(lambda: store.gather(mixed, outputs[0].device), device) for _ in range(TIMED)]
    return row_bytes_of(columns), statistics.fmean(filled[1:]) / n, statistics.median(gathered) / n
