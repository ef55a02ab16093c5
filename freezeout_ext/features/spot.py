"""Spot checks: cached batches that are computed anew now and then, and compared."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from .columns import masked
from .frontier import merged, sliced
from .generations import Generation, Generations
from .store import Store
from .timing import Stopwatch

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
            self._next = _next_due(self.count)

    def restart(self) -> None:
        self._next = self.count


def due_among(before: int, count: int) -> int:
    """-> how many of `count` events are due, with `before` counted ahead of them and the first one due."""
    found, at = 0, before
    while at < before + count:
        found, at = found + 1, _next_due(at + 1)
    return found


def _next_due(count: int) -> int:
    return count + min(count, MOST_UNCHECKED)


def spot_check(
    kept: Generations, now: Generation, forward: Callable, args: tuple, kwargs: dict, keys: Tensor, watch: Stopwatch
) -> float | None:
    """-> the largest difference of kept rows from the same ones computed anew, over what rounding explains.

    Rows that were computed from rounded rows of fewer layers are computed anew in the same way, rounded wherever they
    were. How far that is from computing without rounding is allowed besides: a value between two rounded ones may fall
    to the other side. None: nobody knows any more how a row was computed.

    Args:
        watch: takes the time of the frozen layers.

    Raises:
        RuntimeError: it is above 1. Nothing is kept any more.
    """
    origin, exact = now.store.origin(keys), None
    if bool((origin < 0).any()):
        return None
    watch.start()
    computed = now.frontier.computed(forward, args, kwargs)
    watch.stop(len(keys))
    if bool(origin.any()):
        exact, parts = computed, []
        for passed in origin.unique().tolist():
            places = (origin == passed).nonzero().squeeze(1)
            some = sliced((args, kwargs), places, len(keys))
            through = [g for g in kept.begun if passed >> g.number & 1]
            parts.append((places, _passed(through, now, forward, some, keys[places])))
        computed = merged(len(keys), parts)
    worst, place = compared(now.store, keys, computed, now.length(args, kwargs), exact)
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


def _passed(
    through: Sequence[Generation], now: Generation, forward: Callable, inputs: tuple[tuple, dict], keys: Tensor
) -> list[Tensor]:
    """-> rows behind `now`, computed from inputs and rounded behind each generation that they passed through."""
    args, kwargs = inputs
    lengths = None if now.frontier.length is None else now.store.lengths(keys)
    standing_in: AbstractContextManager = nullcontext()
    for generation in through:
        with standing_in:
            rows = generation.frontier.computed(forward, args, kwargs)
        rows = generation.store.rounded(rows, lengths)
        standing_in = generation.frontier.replaced(rows, generation.length(args, kwargs))
    with standing_in:
        return now.frontier.computed(forward, args, kwargs)


def compared(
    store: Store,
    keys: Tensor,
    batches: Sequence[Tensor],
    length: int | None = None,
    others: Sequence[Tensor] | None = None,
) -> tuple[float, int]:
    """-> the largest difference between kept rows and computed ones over what rounding explains, and its place.

    others: the same rows computed otherwise; how far they are from `batches` is explained too.
    """
    kept, worst, place = store.gather(keys, batches[0].device, length=length), 0.0, 0
    explained = store.allowed(keys, batches)
    for i, (column, a, b) in enumerate(zip(store.columns, kept, batches, strict=True)):
        lengths = store.lengths(keys) if column.padded else None
        allowed = explained[i].double()
        if others is not None:
            allowed = allowed + _apart(others[i], b, lengths)
        apart = _apart(a, b, lengths)
        over = apart / allowed.clamp(min=torch.finfo(torch.float64).tiny)
        over = over.where(apart != 0, 0).nan_to_num(torch.inf, torch.inf)
        if float(over.max()) > worst:
            worst, place = float(over.max()), int(over.argmax())
    return worst, place


def _apart(a: Tensor, b: Tensor, lengths: Tensor | None) -> Tensor:
    """-> float64 [B], the largest difference in each row, but for its padding."""
    difference = (a.double() - b.double()).abs()
    if lengths is not None:
        difference = masked(difference, lengths)
    return difference.flatten(1).amax(1) if difference.dim() > 1 else difference
