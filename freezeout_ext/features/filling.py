"""Filling: rows that are missing are computed in a forward, from inputs or from rows of fewer layers, and kept."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from .frontier import merged, sliced
from .generations import Generation, Generations
from .keys import Unread
from .probe import lengths_of
from .timing import Stopwatch
from .watch import Refused


class Filling:
    """Computes rows that are missing, and keeps them as far as there is room.

    Args:
        kept: what is kept.
        unread: which inputs no batch brought.
        watch: name -> what takes the time of "prefix".

    Attributes:
        lengths: of the present batch, where the user gave them.
        hits, pushed, misses: see CacheReport.
    """

    def __init__(self, kept: Generations, unread: Unread, watch: Callable[[str], Stopwatch]) -> None:
        self._kept, self._unread, self._watch = kept, unread, watch
        self.lengths: Tensor | None = None
        self.hits = self.pushed = self.misses = 0

    def run(self, now: Generation, original, args, kwargs, keys: Tensor, have: Tensor, absent: Tensor) -> Any:
        """A forward over views of which some (~have) are new."""
        parts, length = [], now.length(args, kwargs)
        if bool(have.any()):
            here = have.nonzero().squeeze(1)
            parts.append((here, now.store.gather(keys[here], self._kept.device, length=length)))
            self.hits += len(here)
        for base, places in self._kept.groups(now, keys, have):
            if base is None:
                self._unread.refuse(absent[places])
            some = sliced((args, kwargs), places, len(keys))
            with self._kept.standing_in(base, keys[places], some):
                watch = self._watch("prefix")
                watch.start()
                computed = now.frontier.computed(original, *some)
                watch.stop(len(places) if base is None else 0)
            origin = None if base is None else base.origin(keys[places], now.frontier)
            self.keep(now, origin, keys[places], computed, some[1], places)
            parts.append((places, computed))
        with now.frontier.replaced(merged(len(keys), parts), length):
            return original(*args, **kwargs)

    def keep(
        self, now: Generation, origin: Tensor | None, keys: Tensor, rows: list[Tensor], kwargs: Mapping,
        part: Tensor | slice,
    ) -> None:  # fmt: skip
        """Keeps the rows of a batch, or of its part.

        Args:
            origin: of rows that come from earlier ones, see `Generation`; None: they were computed from inputs.
        """
        if origin is None:
            self.misses += len(keys)
        else:
            self.pushed += len(keys)
        try:
            lengths = None
            if now.frontier.length is not None:
                lengths = lengths_of(kwargs, None if self.lengths is None else self.lengths[part])
                if lengths is None:
                    raise Refused("it has no attention_mask, and its lengths were not given")
            now.store.put(keys, rows, lengths, origin)
        except Refused as reason:
            self._kept.note(f"a batch was not kept: {reason}")
        self._kept.retire()
