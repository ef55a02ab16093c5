"""Serving: what a loader is told of its batches: which views, what of them need not be read, what is kept besides."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .auto import Choice
from .columns import Column
from .forwards import Forwards
from .generations import Generations
from .spot import Schedule
from .store import Store
from .timing import Stopwatch


class Serving:
    """What a `CacheLoader` asks of its cache.

    Args:
        kept, forwards: of the cache.
        choice: of the number of views.
        loading: takes how long a sample is waited for.
        follow: notices that layers were frozen or thawed. Returns the FreezeOut, None where none has the cache.

    Attributes:
        read, skipped: samples that were read from the data set, and that were not since their features were kept.
        whole_due: which cached batches are loaded whole for a spot check.
    """

    def __init__(
        self,
        kept: Generations,
        forwards: Forwards,
        choice: Choice,
        loading: Stopwatch,
        follow: Callable[[], Any],
    ) -> None:
        self.views = kept.views
        self.read = self.skipped = 0
        self.whole_due = Schedule()
        self._kept, self._forwards, self._choice = kept, forwards, choice
        self._loading, self._follow = loading, follow

    def begins(self) -> None:
        """An epoch begins: views are views, and the frozen weights are by value what rows were computed with.

        Raises:
            ValueError: a view is not the same in two reads.
        """
        self.views.check()
        self._follow()
        self._kept.drop_changed(thorough=True)

    @property
    def is_idle(self) -> bool:
        """Whether all views are fresh and nothing is to be kept of them."""
        self._follow()
        return self._forwards.is_idle and not (self._choice.is_open and self._forwards.num_frozen)

    def keys(self, samples: Tensor, epoch: int) -> Tensor:
        """-> keys of the views that this epoch shows: fresh ones as long as none can be kept."""
        freezeout, forwards = self._follow(), self._forwards
        if not forwards.num_frozen:
            return -1 - samples
        if self._choice.is_open:
            self._choice.at(epoch, freezeout)
        hopeless = forwards.gave_up or (forwards.refused is not None and self._kept.latest is None)
        return -1 - samples if hopeless else self.views.keys(samples, epoch)

    def skippable(self, keys: Tensor) -> Tensor:
        """-> bool [B]: whose inputs no forward needs."""
        self._follow()
        now, found = self._kept.latest, torch.zeros(len(keys), dtype=torch.bool, device="cpu")
        if now is None or self._forwards.gave_up:
            return found
        for generation in self._kept:
            found |= generation.store.has(keys)
        if not bool(found.any()) or now.guard.changed() is not None:
            return torch.zeros_like(found)
        # Where something that trains runs in front of the frontier, a batch is computed whole or not at all.
        return found if now.frontier.sliceable or bool(now.store.has(keys).all()) else torch.zeros_like(found)

    def needless(self) -> Callable[[Any], bool] | None:
        """-> which entries of a batch no forward needs, by name or place; None where all are needed."""
        now = self._kept.latest
        return None if now is None or self._forwards.gave_up else now.frontier.needless

    def planned(self) -> bool:
        """Whether this batch, which could be skipped, is to be loaded whole for a spot check."""
        due = self.whole_due.due()
        self.whole_due.pass_on(done=due)
        return due

    def delivered(self, keys: Tensor, skipped: Tensor, samples_read: int, seconds: float) -> None:
        """Notes which inputs a batch lacks, before it is handed out, and how long it was waited for."""
        self._loading.add(seconds, samples_read)
        self._forwards.unread.note(keys, skipped)
        self.read += samples_read
        self.skipped += int(skipped.sum())
        freezeout = self._follow()
        if self._choice.is_open and self._forwards.num_frozen and freezeout is not None:
            fills = bool((keys >= 0).all()) and not any(bool(g.store.has(keys).any()) for g in self._kept)
            self._choice.handed_out(len(keys), freezeout.step_count, fills=fills)

    def delivered_whole(self, samples: int, seconds: float) -> None:
        """Notes a batch of fresh views, and how long it was waited for."""
        self._loading.add(seconds, samples)
        self.read += samples

    def taken_back(self) -> None:
        """The loader goes on: the step on the batch that was handed out last is over."""
        if self._choice.is_open and self._forwards.num_frozen:
            self._choice.step_ended()

    def item_store(self, columns: list[Column], keys: int) -> Store | None:
        """-> where the entries that are still needed are kept, None where there is no room."""
        return self._kept.open_items(columns, keys)
