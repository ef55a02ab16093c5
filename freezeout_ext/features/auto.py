"""Auto: how many views of each sample are worth keeping, by measured times and by what repeated views cost."""

import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from math import log
from typing import Any

import torch

from .columns import row_bytes_of
from .files import write_whole
from .forwards import Forwards
from .generations import Generation, Generations
from .store import Store
from .timing import Stopwatch, seconds_of
from .views import MOST_VIEWS, rank_and_processes

# What showing each view 8 times costs in accuracy against fresh views, given as training time: a fresh cosine that is
# shorter by exp(price) loses as much. The price depends on the part of the layers that is frozen.
# Source: docs/measured.md, "Fine-tuning between classes".
PRICES = (4 / 9, 0.46), (6 / 9, 0.12)
SHOWN = 8
# What was decided, beside the rows in a folder.
DECISION = "decided.json"
STEPS = 4  # as few as are timed
TRIALS = 5


@dataclass(frozen=True)
class Measured:
    """What was measured of a run whose first views are kept. Times are seconds a sample."""

    prefix: float  # time of the frozen layers
    wait: float  # time for the loader, where nothing is kept
    rest: float  # time of the rest of the step
    gather: float  # time of reading what is kept
    before: float  # epochs before anything was kept
    epochs: float  # epochs since then, to the run's end
    left: float  # those of `epochs` that are still to come
    frozen: float  # the part of the layers that is frozen
    fit: int  # how many views there is room for


def best_views(m: Measured) -> int:
    """-> the K with the least ln(seconds(K)) + price * (times that each view is shown - 1) / (SHOWN - 1).

    K = 0: nothing is kept, and each epoch shows fresh views.
    K is at most `fit`, `epochs` and MOST_VIEWS.
    """
    return min(range(min(m.fit, int(m.epochs), MOST_VIEWS) + 1), key=lambda views: score(m, views))


def score(m: Measured, views: int) -> float:
    """-> ln of the run's seconds, with the time that would make up for repeated views; see `best_views`."""
    price = _price(m.frozen) * (m.epochs / views - 1) / (SHOWN - 1) if views else 0.0
    return log(seconds(m, views)) + price


def seconds(m: Measured, views: int) -> float:
    """-> seconds a sample of the whole run.

    The first epochs fill one view each, and all further epochs read. Backward counts as 2x forward.
    """
    filling = min(views, m.epochs) if views else m.epochs
    before = m.before * (m.wait + 3 * m.prefix + m.rest)
    return before + filling * (m.wait + m.prefix) + (m.epochs - filling) * m.gather + m.epochs * m.rest


def _price(frozen: float) -> float:
    (few, high), (most, low) = PRICES
    part = min(1.0, max(0.0, (frozen - few) / (most - few)))
    return high + part * (low - high)


class Choice:
    """Decides the number of views.

    One epoch keeps the first view of each sample. The first batch of the next epoch decides.
    Where too little was measured by then, the epoch after that decides.

    Args:
        kept: what is kept, with its views.
        forwards: measure the frozen layers.
        loading: -> seconds in which a step waits for a sample that is read.
    """

    def __init__(self, kept: Generations, forwards: Forwards, loading: Callable[[], float | None]) -> None:
        self._kept, self._forwards, self._loading = kept, forwards, loading
        self._views = kept.views
        self._tried: int | None = None
        self._step: Stopwatch | None = None  # of steps in which nothing was read
        self._steps_before: int | None = None
        self._samples = self._batch = 0
        self._measured: Measured | None = None

    @property
    def is_open(self) -> bool:
        return self._views.auto and not self._views.decided

    def handed_out(self, samples: int, *, fills: bool) -> None:
        """Notes a batch that was handed out.

        Args:
            fills: whether none of the batch was kept before.
        """
        if self._step is None:
            self._step, self._steps_before = Stopwatch(self._kept.device, STEPS), self._kept.attached.step_count
        self._samples += samples
        self._batch = samples
        if fills:
            self._step.start()

    def step_ended(self) -> None:
        """Notes that the step on the batch that was handed out last is over."""
        if self._step is not None:
            self._step.stop(self._batch)

    def at(self, epoch: int) -> None:
        """Decides, where enough was measured. Every process calls `at` at the same batch."""
        if self._views.first_epoch is None:
            self._views.first_epoch = epoch
        if epoch in (self._views.first_epoch, self._tried):
            return
        self._tried = epoch
        measured = _of_all(self._known(), self._kept.world_size)
        if measured is None:
            return
        views = best_views(measured)
        said = (
            f"{measured.left:.1f} epochs were left; a sample takes {1e6 * (measured.prefix + measured.wait):.0f} us to "
            f"load and compute, {1e6 * measured.gather:.0f} us to read, {1e6 * measured.rest:.0f} us for the rest of "
            f"its step; {measured.fit} views would fit"
        )
        if not views:
            self._measured = None
            self._kept.note(f"views: none are worth keeping until the next freeze: {said}")
            if self._kept.latest is not None:
                self._kept.latest.given_up = True
            return
        self._views.decide(views)
        self._views.first_epoch = epoch - 1  # later than at first where nothing was kept then
        self._kept.note(f"views: {views} of each sample: {said}")
        now, items = self._kept.latest, self._kept.items
        if now is not None:
            now.store.grow(self._kept.owned, self._kept.owned * (now.frontier.length or 0))
        if items is not None:
            items.grow(self._kept.owned)
        if self._kept.folder is not None and self._kept.rank == 0:
            write_whole(self._kept.folder / DECISION, self.state_dict())

    def state_dict(self) -> dict:
        measured = self._known() if self.is_open else self._measured
        return {
            "count": self._views.count if self._views.decided else None,
            "first_epoch": self._views.first_epoch,
            "measured": None if measured is None else asdict(measured),
        }

    def load_state_dict(self, state: dict) -> None:
        self._views.first_epoch = state["first_epoch"]
        self._measured = None if state["measured"] is None else Measured(**state["measured"])
        if state["count"] is not None:
            self._views.decide(state["count"])

    def _known(self) -> Measured | None:
        """What was measured. It stays the same then, so that a resumed run decides as this one."""
        if self._measured is None:
            self._measured = self._measure()
        return self._measured

    def _measure(self) -> Measured | None:
        freezeout = self._kept.attached
        now, prefix, began = self._kept.latest, self._forwards.seconds("prefix"), self._steps_before
        step = None if self._step is None else self._step.median()
        if now is None or prefix is None or began is None or step is None or not len(now.store):
            return None
        steps = freezeout.step_count - began
        if steps <= 0:
            return None
        mine = self._kept.views.num_samples // self._kept.world_size
        steps_per_epoch = steps / self._samples * mine
        left = max(0.0, (freezeout.schedule.total_steps - freezeout.step_count) / steps_per_epoch)
        return Measured(
            prefix=prefix,
            wait=self._loading() or 0.0,
            rest=max(0.0, step - prefix),
            gather=self._gather_seconds(now.store),
            before=began / steps_per_epoch,
            epochs=left + len(now.store) / mine,
            left=left,
            frozen=self._forwards.num_frozen / (len(freezeout.layers.given) + len(freezeout.layers)),
            fit=self._fit(now),
        )

    def _fit(self, now: Generation) -> int:
        """-> how many views of all samples there is room for, those that are kept included; at least one."""
        kept = self._kept
        stores = [now.store] if kept.items is None else [now.store, kept.items]
        per_row = sum(row_bytes_of(store.columns, now.frontier.length or 0) for store in stores)
        one = kept.owned // self._views.count * per_row
        # In memory the old rows stay until they have been copied.
        here = 0 if kept.folder is None else sum(store.bytes_taken for store in stores)
        return max(1, (kept.room(MOST_VIEWS * one) + here) // max(1, one))

    def _gather_seconds(self, store: Store) -> float:
        """-> seconds a sample, the median of some batches of rows in a random order."""
        device, waits, keys = self._kept.device, self._kept.folder is not None, store.keys()
        order = torch.randperm(len(keys), generator=torch.Generator("cpu").manual_seed(0), device="cpu")
        return statistics.median(
            seconds_of(partial(store.gather, keys[some], device), device, waits=waits) / len(some)
            for some in order[: TRIALS * self._batch].split(self._batch)
        )


def _of_all(measured: Measured | None, processes: int) -> Measured | None:
    """-> what the first process has measured, with the least room that any process has."""
    if processes == 1 or rank_and_processes()[1] != processes:
        return measured
    found: list[Any] = [None] * processes
    torch.distributed.all_gather_object(found, measured)
    if found[0] is None:
        return None
    return Measured(**{**asdict(found[0]), "fit": min(each.fit for each in found if each is not None)})
