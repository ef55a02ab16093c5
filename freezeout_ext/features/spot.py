"""Spot checks: cached batches that are computed anew now and then, and compared."""

from collections.abc import Callable

from torch import Tensor

from .generations import Generation, Generations

# Cached batches between two spot checks: 1, 2, 4, ... and no more than this.
MOST_UNCHECKED = 256


class Schedule:
    """Which of the events counted are due: the first, then 1, 2, 4, ... of them later, at most `MOST_UNCHECKED`."""

    def __init__(self) -> None:
        self.count, self._next = 0, 0

    def due(self) -> bool:
        """Whether the present event is due; counts it only where `pass_on` is called."""
        return self.count >= self._next

    def pass_on(self, *, done: bool) -> None:
        self.count += 1
        if done:
            self._next = self.count + min(self.count, MOST_UNCHECKED)

    def restart(self) -> None:
        self._next = self.count


def spot_check(kept: Generations, now: Generation, forward: Callable, args: tuple, kwargs: dict, keys: Tensor) -> float:
    """-> the largest difference of kept rows from the same ones computed anew, over what rounding explains.

    Raises:
        RuntimeError: it is above 1. Nothing is kept any more.
    """
    computed = now.frontier.computed(forward, args, kwargs)
    worst, place = now.store.compare(keys, computed, now.length(args, kwargs))
    if not worst <= 1:
        sample = int(kept.views.samples(keys[place]))
        kept.close()
        raise RuntimeError(
            f"kept features of sample {sample} differ from the same view computed anew, {worst:.1f} times as far "
            "as rounding explains: the view draws from a generator of its own, inputs are mixed across samples "
            "(mixup, cutmix) or changed at random between loader and model, or the frozen layers are no function "
            "of their input. The cache is closed"
        )
    return worst
