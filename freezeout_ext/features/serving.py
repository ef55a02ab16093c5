"""Serving: what a loader is told of its batches: which views, and what of them need not be read."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .auto import Choice
from .forwards import Forwards
from .generations import Generations
from .spot import Schedule
from .timing import Stopwatch


class Serving:
    """What a `CacheLoader` asks of its cache.

    Args:
        kept: what is kept.
        forwards: how forwards run.
        choice: of the number of views.
        loading: takes how long a sample is waited for.
        follow: notices that layers were frozen or thawed.

    Attributes:
        read: samples that were read from the data set.
        skipped: samples that were not read since their features were kept.
        whole_due: which cached batches are loaded whole for a spot check.
    """

    def __init__(
        self, kept: Generations, forwards: Forwards, choice: Choice, loading: Stopwatch, follow: Callable[[], None]
    ) -> None:
        self.views, self.kept = kept.views, kept
        self.read = self.skipped = 0
        self.whole_due = Schedule()
        self._forwards, self._choice, self._loading, self._follow = forwards, choice, loading, follow

    def begins(self) -> None:
        """An epoch begins: views are views, and the frozen weights are by value what rows were computed with.

        Raises:
            ValueError: a view is not the same in two reads.
        """
        self.views.check()
        self._follow()
        self.kept.drop_changed(thorough=True)

    @property
    def is_idle(self) -> bool:
        """Whether all views are fresh and nothing is to be kept of them."""
        self._follow()
        return self._forwards.is_idle and not (self._choice.is_open and self._forwards.num_frozen)

    def shows_fresh(self, epoch: int) -> bool:
        """Whether an epoch shows fresh views now: it does as long as none can be kept."""
        self._follow()
        if self._forwards.num_frozen and self._choice.is_open:
            self._choice.at(epoch)
        return not self._forwards.num_frozen or self._forwards.rests

    def skippable(self, keys: Tensor) -> Tensor:
        """-> bool [B]: whose inputs no forward needs."""
        self._follow()
        now, found = self.kept.latest, torch.zeros(len(keys), dtype=torch.bool, device="cpu")
        if now is None or self._forwards.rests:
            return found
        for generation in self.kept:
            found |= generation.store.has(keys)
        return torch.zeros_like(found) if now.guard.changed() is not None else found

    def needless(self) -> Callable[[Any], bool] | None:
        """-> which entries of a batch no forward needs, by name or place; None where all are needed."""
        now = self.kept.latest
        return None if now is None or self._forwards.rests else now.frontier.needless

    def planned(self) -> bool:
        """Whether this batch, which could be skipped, is to be loaded whole for a spot check."""
        due = self.whole_due.due()
        self.whole_due.pass_on(done=due)
        return due

    def delivered(self, keys: Tensor, skipped: Tensor | None, read: int, seconds: float) -> None:
        """Notes a batch before it is handed out.

        Args:
            skipped: bool [B], which inputs it lacks; None: these are fresh views, all of them read.
            read: how many samples were read.
            seconds: that were waited for them.
        """
        self._loading.add(seconds, read)
        self.read += read
        if skipped is None:
            return
        self._forwards.unread.note(keys, skipped)
        self.skipped += int(skipped.sum())
        self._follow()
        if self._choice.is_open and self._forwards.num_frozen:
            fills = bool((keys >= 0).all()) and not any(bool(g.store.has(keys).any()) for g in self.kept)
            self._choice.handed_out(len(keys), fills=fills)

    def taken_back(self) -> None:
        """The loader goes on: the step on the batch that was handed out last is over."""
        if self._choice.is_open and self._forwards.num_frozen:
            self._choice.step_ended()
