"""Forwards: how one forward over known keys runs: from what is kept, filling it, watched, or as ever."""

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .filling import Filling
from .frontier import shapes_of
from .generations import Generation, Generations
from .keys import Unread
from .moves import Moves
from .probe import Forward, Seen, autocast_state, unwatchable
from .spot import Schedule, spot_check
from .timing import Stopwatch, seconds_of
from .watch import Refused

logger = logging.getLogger("freezeout_ext")


class Forwards:
    """Runs the model's forward over the samples `keys`.

    Args:
        generations: what is kept.
        moves: decides where rows are kept; None: behind all frozen layers, also where reading is slower than computing.
        note: takes what happened, for the report.

    Attributes:
        frozen: name -> module of what is frozen, and how many layers these are.
        keys: of the present batch.
        filling: computes and keeps the rows that are missing.
        unread: which of its inputs were not read.
        given: rows that the next forward runs on, whatever its keys are; see FeatureCache.given.
        refused: why nothing is kept behind the present number of layers.
        checks, difference: see CacheReport.
        watches: forwards that were watched.
    """

    def __init__(self, generations: Generations, moves: Moves | None, *, note: Callable[[str], None]) -> None:
        self._kept, self._moves, self._note = generations, moves, note
        self.frozen: dict[str, nn.Module] = {}
        self.num_frozen = 0
        self.keys: Tensor | None = None
        self.unread = Unread(generations.views.num_keys)
        self.given: tuple[Tensor, ...] | None = None
        self.refused: str | None = None
        self.checks = self.count = self.watches = 0
        self.difference = 0.0
        self._aliases = self._postponed = False
        self._checks_due = Schedule()
        self._watches: dict[str, Stopwatch] = {}
        self.filling = Filling(generations, self.unread, note, self._watch)

    def moved(self, num_frozen: int, frozen: dict[str, nn.Module]) -> None:
        """Other layers are frozen now."""
        if num_frozen < self.num_frozen:
            self._watches.clear()
        self.num_frozen, self.frozen = num_frozen, frozen
        self.refused, self._aliases, self._postponed = None, False, False
        self._checks_due.restart()
        if self._moves is not None:
            self._moves.restart()

    @property
    def moves(self) -> bool:
        """Whether rows may yet be kept behind the layers that are frozen now."""
        now = self._kept.latest
        return self.refused is None and (now is None or now.frontier.num_frozen != self.num_frozen)

    @property
    def is_idle(self) -> bool:
        """Whether no forward reads or keeps anything, whatever its keys are."""
        nothing = self._kept.latest is None and self.refused is not None
        return (nothing or not self.num_frozen) and not self.unread.ever and self.given is None

    def comes(self, samples: int) -> None:
        """A forward in training over so many samples comes next."""
        if self._moves is not None and self._moves.count(samples) and self._postponed:
            self.refused, self._postponed = None, False

    @property
    def gave_up(self) -> bool:
        """Whether what is kept is not read."""
        now = self._kept.latest
        return now is not None and now.given_up and not self.moves

    def seconds(self, name: str) -> float | None:
        """-> median seconds a sample of "gather" or "prefix"."""
        return self._watches[name].median() if name in self._watches else None

    def run(self, name: str, model: nn.Module, original: Callable, args: tuple, kwargs: dict) -> Any:
        """original(*args, **kwargs), from what is kept where that is right."""
        if not (model.training and torch.is_grad_enabled()):
            return original(*args, **kwargs)
        if self.given is not None and self.num_frozen:
            self.count += 1
            return self._from_given(original, args, kwargs)
        keys = self.keys
        assert keys is not None  # forwards go through here inside samples()
        absent = self.unread.among(keys)
        self._check_batch(keys, args, kwargs)
        if not self.num_frozen:
            # A batch that lacks inputs was fetched before all was thawed.
            return self._as_ever(original, args, kwargs, absent)
        self.count += 1
        self._kept.drop_changed()
        if bool((keys < 0).any()) or (self.gave_up and not bool(absent.any())):
            return self._as_ever(original, args, kwargs, absent)
        now = self._kept.latest
        if self.moves and not self._decided(now):
            assert self._moves is not None  # who wants to see more
            with self._moves.timed(len(keys)):
                return self._as_before(now, original, args, kwargs, keys, absent)
        if self.moves:
            return self._watched(now, original, args, kwargs, keys, absent)
        return self._as_before(now, original, args, kwargs, keys, absent)

    def _decided(self, now: Generation | None) -> bool:
        """Whether it is known if rows are kept behind the present layers; `refused` says why they are not."""
        moves = self._moves
        verdict = True if moves is None else moves.decide(now, self.frozen, self.seconds("gather"))
        if isinstance(verdict, str):
            self._postpone(verdict)
        elif verdict or (moves is not None and not moves.is_timing):
            reason = unwatchable(self._kept.attached, self.frozen)
            if reason is not None:
                self._refuse(reason)
                return True
        return bool(verdict)

    def as_ever(self, keys: Tensor) -> bool:
        """Whether a forward over these keys neither reads nor keeps anything."""
        nothing = self._kept.latest is None and self.refused is not None
        return not self.num_frozen or self.gave_up or nothing or bool((keys < 0).any())

    def from_inputs(self, keys: Tensor) -> bool:
        """Whether all frozen modules run in a forward over these keys, and nobody watches."""
        now = self._kept.latest
        if self.as_ever(keys):
            return True
        if now is not None and len(now.store) >= self._kept.owned:
            return False  # all are kept
        return now is not None and not self.moves and not any(bool(g.store.has(keys).any()) for g in self._kept)

    def rows(self) -> tuple[Tensor, ...] | None:
        """-> kept rows of the present batch, for `given`; None where its forward must run through `run` itself."""
        keys, now = self.keys, self._kept.latest
        assert keys is not None  # see `run`
        if self.as_ever(keys) or now is None or self.moves:
            return None
        self._kept.drop_changed()
        if now not in self._kept or not bool(now.store.has(keys).all()) or now.frontier.length is not None:
            return None
        if self._checks_due.due() and not bool(self.unread.among(keys).any()):
            return None
        self._checks_due.pass_on(done=False)
        self.filling.hits += len(keys)
        return tuple(now.store.gather(keys, self._kept.device))

    # The ways

    def _from_given(self, original: Callable, args: tuple, kwargs: dict) -> Any:
        now, given = self._kept.latest, self.given
        assert now is not None and given is not None  # `rows` gathered them
        if now.frontier.autocast != autocast_state(self._kept.device):
            raise RuntimeError("a step on given rows must run under the autocast under which they were computed")
        with now.frontier.replaced(given):
            return original(*args, **kwargs)

    def _as_ever(self, original: Callable, args: tuple, kwargs: dict, absent: Tensor) -> Any:
        self.unread.refuse(absent)
        return original(*args, **kwargs)

    def _as_before(self, now: Generation | None, original, args, kwargs, keys: Tensor, absent: Tensor) -> Any:
        """From what is kept, be it behind fewer layers than are frozen now."""
        if now is not None and now.frontier.autocast != autocast_state(self._kept.device):
            self._note("a forward under another autocast than the one that was watched ran as ever")
            now = None
        elif now is not None and self._is_of_another_shape(now, args, kwargs):
            self._note("a forward over samples of another shape than those that were watched ran as ever")
            now = None
        if now is None:
            return self._as_ever(original, args, kwargs, absent)
        return self._from_kept(now, original, args, kwargs, keys, absent)

    def _is_of_another_shape(self, now: Generation, args: tuple, kwargs: dict) -> bool:
        """Whether rows of samples of this shape may be others. Of padded samples they are not."""
        padded = now.frontier.length is not None or self.filling.lengths_of(kwargs) is not None
        return not padded and now.frontier.shapes != shapes_of(args, kwargs)

    def _from_kept(self, now: Generation, original, args, kwargs, keys: Tensor, absent: Tensor) -> Any:
        have = now.store.has(keys)
        if not bool(have.all()):
            return self.filling.run(now, original, args, kwargs, keys, have, absent)
        check = self._checks_due.due() and not bool(absent.any())
        self._checks_due.pass_on(done=check)
        if check:
            self._kept.drop_changed(thorough=True)
            if now not in self._kept:
                return self.run("", self._kept.attached, original, args, kwargs)
            self._spot_check(now, original, args, kwargs, keys)
        length, watch = now.length(args, kwargs), self._watch("gather")
        watch.start()
        rows = now.store.gather(keys, self._kept.device, length=length)
        watch.stop(len(keys))
        self.filling.hits += len(keys)
        with now.frontier.replaced(rows, length):
            output = original(*args, **kwargs)
        self._weigh(now)
        return output

    def _watched(self, now: Generation | None, original, args, kwargs, keys: Tensor, absent: Tensor) -> Any:
        """A forward behind a transition that shows what must be kept, and is checked."""
        base = self._kept.with_all(keys)
        if len(keys) < 2 or (base is None and bool(absent.any())):
            # One sample shows nothing about batches, and without inputs nothing can be watched.
            return self._as_before(now, original, args, kwargs, keys, absent)

        def under(part: Tensor | None) -> AbstractContextManager:
            some = keys if part is None else keys[part]
            return self._kept.standing_in(base, some, (args, kwargs))

        lengths = self.filling.lengths_of(kwargs)
        forward = Forward(
            self._kept.attached, self._kept.device, original, args, kwargs, self.frozen, len(keys), lengths, under
        )
        self.watches += 1
        found: list = []
        seconds = seconds_of(
            lambda: found.extend(forward.watched(self.num_frozen, self._kept.dtype, aliases=self._aliases)),
            self._kept.device,
        )
        output, frontier = found
        if isinstance(frontier, Seen) and not self._aliases:
            self._aliases = True  # the next forward is watched once more
        elif isinstance(frontier, Refused):
            self._refuse(str(frontier))
        else:
            begun = self._kept.begin(frontier)
            if self._moves is not None:
                self._moves.watch_seconds, begun.layers_seconds = seconds, self._moves.layers_seconds
            self._watches.clear()
            self.filling.keep(begun, base, keys, forward.rows, kwargs)
            self.filling.count(base, len(keys))
        return output

    def _refuse(self, reason: str) -> None:
        self.refused = reason
        self._note(f"not kept behind {self.num_frozen} layers: {reason}")
        logger.warning("features are not kept behind %d layers: %s", self.num_frozen, reason)

    def _postpone(self, reason: str) -> None:
        """Another transition, or larger steps, may change it."""
        self.refused, self._postponed = reason, True
        self._note(f"not kept behind {self.num_frozen} layers: {reason}")

    def _spot_check(self, now: Generation, original, args, kwargs, keys: Tensor) -> None:
        if not now.frontier.sliceable:
            return
        try:
            difference = spot_check(self._kept, now, original, args, kwargs, keys, self._watch("prefix"))
        except RuntimeError:
            if self._kept.latest is None:
                self.num_frozen = 0
            raise
        if difference is not None:
            self.difference, self.checks = max(self.difference, difference), self.checks + 1

    def _watch(self, name: str) -> Stopwatch:
        if name not in self._watches:
            waits = name == "gather" and self._kept.folder is not None
            self._watches[name] = Stopwatch(self._kept.device, waits=waits)
        return self._watches[name]

    def _weigh(self, now: Generation) -> None:
        prefix, gather = self.seconds("prefix"), self.seconds("gather")
        if self._moves is not None and prefix is not None and gather is not None and gather > prefix:
            now.given_up = True
            self._note(
                f"given up until the next freeze: reading a sample's features takes {1e6 * gather:.0f} us, computing "
                f"them {1e6 * prefix:.0f} us"
            )

    def _check_batch(self, keys: Tensor, args: tuple, kwargs: dict) -> None:
        sizes = {len(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.dim()}
        if sizes and len(keys) not in sizes:
            raise ValueError(f"keys must be one for each sample, got {len(keys)} for a batch of {min(sizes)}")
