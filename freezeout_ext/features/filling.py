"""Filling: rows that are missing are computed in a forward, from inputs or from rows of fewer layers, and kept."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .frontier import merged, sliced
from .generations import Generation, Generations
from .keys import Unread
from .probe import lengths_of, right_padded
from .timing import Stopwatch
from .watch import Refused


class Filling:
    """Computes rows that are missing, and keeps them as far as there is room.

    Args:
        kept: what is kept.
        unread: which inputs no batch brought.
        note: takes what happened, for the report.
        watch: name -> what takes the time of "prefix".

    Attributes:
        lengths: of the present batch, where the user gave them.
        hits, pushed, misses: see CacheReport.
    """

    def __init__(
        self, kept: Generations, unread: Unread, note: Callable[[str], None], watch: Callable[[str], Stopwatch]
    ) -> None:
        self._kept, self._unread, self._note, self._watch = kept, unread, note, watch
        self.lengths: Tensor | None = None
        self.hits = self.pushed = self.misses = 0

    def run(self, now: Generation, original, args, kwargs, keys: Tensor, have: Tensor, absent: Tensor) -> Any:
        """A forward over views of which some (~have) are new."""
        frontier, length = now.frontier, now.length(args, kwargs)
        groups = self._kept.groups(now, keys, have)
        if not bool(have.any()) and len(groups) == 1:
            return self._whole(now, groups[0][0], original, args, kwargs, keys, absent)
        if not frontier.sliceable:
            return self._whole(now, None, original, args, kwargs, keys, absent)
        parts = []
        for base, places in groups:
            if base is None:
                self._unread.refuse(absent[places])
            some = sliced((args, kwargs), places, len(keys))
            with self._kept.standing_in(base, keys[places], some):
                watch = self._watch("prefix")
                watch.start()
                computed = frontier.computed(original, *some)
                watch.stop(len(places) if base is None else 0)
            self.count(base, len(places))
            self.keep(now, base, keys[places], computed, some[1], places)
            parts.append((places, computed))
        if bool(have.any()):
            here = have.nonzero().squeeze(1)
            parts.insert(0, (here, now.store.gather(keys[here], self._kept.device, length=length)))
            self.hits += len(here)
        rows = [merged(len(keys), [(places, of[i]) for places, of in parts]) for i in range(len(frontier.columns))]
        with frontier.replaced(rows, length):
            return original(*args, **kwargs)

    def _whole(self, now, base: Generation | None, original, args, kwargs, keys: Tensor, absent: Tensor) -> Any:
        """The forward as ever, from kept rows of fewer layers where `base` has them; its frontier is kept."""
        if base is None:
            self._unread.refuse(absent)
        watch = self._watch("prefix")
        with self._kept.standing_in(base, keys, (args, kwargs)):
            watch.start()
            with now.frontier.recorded(on_last=lambda: watch.stop(len(keys) if base is None else 0)) as rows:
                output = original(*args, **kwargs)
        self.count(base, len(keys))
        if rows:
            self.keep(now, base, keys, rows, kwargs)
        return output

    def keep(
        self, now: Generation, base: Generation | None, keys: Tensor, rows: list[Tensor], kwargs: Mapping,
        part: Tensor | None = None,
    ) -> None:  # fmt: skip
        """Keeps the rows of a batch, or of its part with these places."""
        lengths = None
        if now.frontier.length is not None:
            lengths = self.lengths_of(kwargs)
            if lengths is None:
                return self._note("a batch was not kept: it has no attention_mask, and its lengths were not given")
            if part is not None and self.lengths is not None:
                lengths = lengths[part]
            try:
                right_padded(kwargs, lengths)
            except Refused as reason:
                return self._note(f"a batch was not kept: {reason}")
        kept = now.store.put(keys, rows, lengths, now.origin(base, keys))
        if not kept and len(now.store) < now.store.rows:
            self._note("a batch was not kept: its samples have another shape or dtype than those of the first one")
        self._kept.retire()

    def count(self, base: Generation | None, samples: int) -> None:
        """Notes samples whose rows were computed, from `base` or from inputs."""
        if base is None:
            self.misses += samples
        else:
            self.pushed += samples

    def lengths_of(self, kwargs: Mapping) -> Tensor | None:
        """-> int64 [B] on the CPU, of samples that are padded; None where nobody says."""
        return lengths_of(kwargs) if self.lengths is None else self.lengths.to("cpu", torch.int64)
