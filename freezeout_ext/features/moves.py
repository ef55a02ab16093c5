"""Moves: whether rows are kept behind the layers that are frozen now, or read on from where they are kept."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace

from torch import nn

from .generation import Generation
from .generations import Generations
from .weighing import Weighing
from .worth import Left, Pace, Times, reason_against

# Forwards that a watch takes besides its own, until one was timed.
WATCHED = 3.0
# Seconds of a forward that the calls around reading take, and those around writing besides.
CALLS = 1e-3


class Moves:
    """Decides once a transition, after a few forwards that run as before and are timed.

    Args:
        kept: what is kept.
        left: -> (the present step, steps that are left); None where nobody knows.
        loading: -> seconds in which a step waits for a sample that is read.

    Attributes:
        watch_seconds: of the last watch, None before one was timed.
        layers_seconds: of a sample in the frozen layers, as far as they were timed.
    """

    def __init__(
        self, kept: Generations, left: Callable[[], tuple[int, Left] | None], loading: Callable[[], float | None]
    ) -> None:
        self._kept, self._left, self._loading = kept, left, loading
        self._pace = Pace()
        self._weighing: Weighing | None = None
        self._decided = False
        self.watch_seconds: float | None = None
        self.layers_seconds = 0.0

    def restart(self) -> None:
        """Other layers are frozen now."""
        self._weighing, self._decided = None, False

    def count(self, samples: int) -> bool:
        """Notes a forward. Returns whether steps turn out to be larger than a decision has taken them for."""
        left = self._left()
        grew = left is not None and self._pace.count(left[0], samples)
        if grew:
            self.restart()
        return grew

    def decide(self, now: Generation | None, frozen: Mapping[str, nn.Module], gathered: float | None) -> str | bool:
        """-> True: rows are to be kept behind these modules; a text: why that would not pay; False: not known yet.

        Args:
            now: what is read meanwhile. gathered: seconds in which a row of it is read, where that is known.
        """
        left = self._left()
        if self._decided or left is None:
            return True
        samples, rows = left[1].times(self._pace.samples), self._kept.owned
        if self._weighing is None:
            reason = reason_against(Times(layers=float("inf")), samples, rows, rows)
            if reason is not None:  # whatever the times
                return reason
            behind = {} if now is None else now.frontier.modules
            running = {name: module for name, module in frozen.items() if name not in behind}
            self._weighing = Weighing(running, self._kept.device, self._kept.dtype)
        found = self._weighing.times()
        if found is None:
            return False
        (layers, forward), calls = found, CALLS / self._weighing.samples
        times = Times(
            layers=layers + ((self._loading() or 0.0) if now is None else 0.0),
            fill=calls,
            gather=calls,
            gathered=0.0 if now is None else (gathered or 0.0) + calls,
            watch=WATCHED * forward if self.watch_seconds is None else self.watch_seconds,
        )
        # Without the times of rows first: to try them takes a while itself.
        reason = reason_against(times, samples, rows, rows)
        if reason is None:
            fill, gather = self._weighing.trial()
            fitting, drops = self._kept.fitting(self._weighing.row_bytes)
            again = now.layers_seconds if now is not None and drops else 0.0
            gathered = 0.0 if now is None else (gathered or gather) + calls
            times = replace(times, fill=fill + calls, gather=gather + calls, gathered=gathered, again=again)
            reason = reason_against(times, samples, rows, fitting)
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
