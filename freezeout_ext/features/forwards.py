"""Forwards: how one forward over known keys runs: from what is kept, filling it, watched, or as ever."""

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..torch_state import autocast_state
from .filling import Filling
from .frontier import shapes_of
from .generations import Generation, Generations
from .keys import Unread
from .moves import Moves
from .probe import Forward, unwatchable
from .spot import Schedule, spot_check
from .timing import Stopwatch, seconds_of
from .watch import Refused

logger = logging.getLogger("freezeout_ext")


class Forwards:
    """Runs the model's forward over the samples `keys`.

    Args:
        kept: what is kept.
        moves: decides where rows are kept; None: behind all frozen layers, also where reading is slower than computing.

    Attributes:
        frozen: name -> module of what is frozen.
        num_frozen: how many layers these are.
        keys: of the present batch.
        filling: computes and keeps the rows that are missing.
        unread: which inputs no batch brought.
        given: rows that the next forward runs on, whatever its keys are; see FeatureCache.given.
        refused: why nothing is kept behind the present number of layers.
        count: of forwards in training.
        watches: forwards that were watched.
        checks, difference: see CacheReport.
    """

    def __init__(self, kept: Generations, moves: Moves | None) -> None:
        self._kept, self._moves = kept, moves
        self.frozen: dict[str, nn.Module] = {}
        self.num_frozen = 0
        self.keys: Tensor | None = None
        self.unread = Unread(kept.views.num_keys)
        self.given: tuple[Tensor, ...] | None = None
        self.refused: str | None = None
        self.checks = self.count = self.watches = 0
        self.difference = 0.0
        self._checks_due = Schedule()
        self._watches: dict[str, Stopwatch] = {}
        self.filling = Filling(kept, self.unread, self._watch)

    def moved(self, num_frozen: int, frozen: dict[str, nn.Module]) -> None:
        """Other layers are frozen now."""
        if num_frozen < self.num_frozen:
            self._watches.clear()
        self.num_frozen, self.frozen, self.refused = num_frozen, frozen, None
        self._checks_due.restart()
        if self._moves is not None:
            self._moves.restart()

    def comes(self, samples: int) -> None:
        """A forward in training over so many samples comes next."""
        if self._moves is not None:
            self._moves.count(samples)

    @property
    def moves(self) -> bool:
        """Whether rows may yet be kept behind the layers that are frozen now."""
        now = self._kept.latest
        return self.refused is None and (now is None or now.frontier.num_frozen != self.num_frozen)

    @property
    def rests(self) -> bool:
        """Whether nothing is read or kept until other layers freeze, but for batches that lack inputs."""
        now = self._kept.latest
        return not self.moves and (now is None or now.given_up)

    @property
    def is_idle(self) -> bool:
        """Whether no forward reads or keeps anything, whatever its keys are."""
        return (not self.num_frozen or self.rests) and not self.unread.ever and self.given is None

    def as_ever(self, keys: Tensor) -> bool:
        """Whether a forward over these keys neither reads nor keeps anything."""
        return not self.num_frozen or self.rests or bool((keys < 0).any())

    def from_inputs(self, keys: Tensor) -> bool:
        """Whether all frozen modules run in a forward over these keys, and nobody watches."""
        now = self._kept.latest
        if self.as_ever(keys):
            return True
        if now is None or self.moves or len(now.store) >= self._kept.owned:
            return False
        return not any(bool(g.store.has(keys).any()) for g in self._kept)

    def seconds(self, name: str) -> float | None:
        """-> median seconds a sample of "gather" or "prefix"."""
        return self._watches[name].median() if name in self._watches else None

    def run(self, name: str, model: nn.Module, original: Callable, args: tuple, kwargs: dict) -> Any:
        """original(*args, **kwargs), from what is kept where that is right."""
        if not (model.training and torch.is_grad_enabled()):
            return original(*args, **kwargs)
        keys, now = self.keys, self._kept.latest
        if self.given is not None and now is not None:
            if now.frontier.autocast != autocast_state(self._kept.device):
                raise RuntimeError("a step on given rows must run under the autocast under which they were computed")
            self.count += 1
            with now.frontier.replaced(self.given):
                return original(*args, **kwargs)
        assert keys is not None  # forwards go through here inside samples()
        absent = self.unread.among(keys)
        self._check_batch(keys, args, kwargs)
        if not self.num_frozen:
            self.unread.refuse(absent)  # a batch that was fetched before all was thawed
            return original(*args, **kwargs)
        self.count += 1
        self._kept.drop_changed()
        if self.as_ever(keys) and not bool(absent.any()):
            return original(*args, **kwargs)
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
        verdict = True if self._moves is None else self._moves.decide(now, self.frozen, self.seconds("gather"))
        if isinstance(verdict, str):
            self.refused = verdict
            self._kept.note(f"not kept behind {self.num_frozen} layers: {verdict}")
            return True
        reason = unwatchable(self._kept.model, self.frozen)
        if reason is not None:
            self._refuse(reason)
        return verdict or reason is not None

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

    def _as_before(self, now: Generation | None, original, args, kwargs, keys: Tensor, absent: Tensor) -> Any:
        """From what is kept, be it behind fewer layers than are frozen now."""
        other, changed = None if now is None else self._other(now, args, kwargs), self._kept.changed
        if now is None and changed is not None:
            self.unread.refuse(absent, f"{changed}; change frozen layers between a step and the next batch")
        if other is not None:
            self._kept.note(f"a forward {other} ran as ever")
            advice = "let all forwards in training run under one autocast, over samples of one shape"
            self.unread.refuse(absent, f"it runs {other}; {advice}")
        if now is None or other is not None:
            self.unread.refuse(absent)
            return original(*args, **kwargs)
        have = now.store.has(keys)
        if not bool(have.all()):
            return self.filling.run(now, original, args, kwargs, keys, have, absent)
        check = self._checks_due.due() and not bool(absent.any())
        self._checks_due.pass_on(done=check)
        if check:
            self._kept.drop_changed(thorough=True)
            if now not in self._kept:
                return self.run("", self._kept.model, original, args, kwargs)
            difference = spot_check(self._kept, now, original, args, kwargs, keys, self._watch("prefix"))
            if difference is not None:
                self.difference, self.checks = max(self.difference, difference), self.checks + 1
        length, watch = now.length(args, kwargs), self._watch("gather")
        watch.start()
        rows = now.store.gather(keys, self._kept.device, length=length)
        watch.stop(len(keys))
        self.filling.hits += len(keys)
        with now.frontier.replaced(rows, length):
            output = original(*args, **kwargs)
        self._weigh(now)
        return output

    def _other(self, now: Generation, args: tuple, kwargs: dict) -> str | None:
        """-> in what a forward differs from the one that was watched, so that rows may be others; None: in nothing."""
        if now.frontier.autocast != autocast_state(self._kept.device):
            return "under another autocast than the one that was watched"
        if now.frontier.shapes not in (None, shapes_of(args, kwargs)):
            return "over samples of another shape than those that were watched"
        return None

    def _watched(self, now: Generation | None, original, args, kwargs, keys: Tensor, absent: Tensor) -> Any:
        """A forward behind a transition that shows what must be kept, and is checked."""
        base = next((g for g in reversed([*self._kept]) if bool(g.store.has(keys).all())), None)
        if base is not None and self._other(base, args, kwargs) is not None:
            base = None
        if len(keys) < 2 or (base is None and bool(absent.any())):
            # One sample shows nothing about batches, and without inputs nothing can be watched.
            return self._as_before(now, original, args, kwargs, keys, absent)

        def under(part: Tensor | None) -> AbstractContextManager:
            some = keys if part is None else keys[part]
            return self._kept.standing_in(base, some, (args, kwargs))

        device = self._kept.device
        forward = Forward(
            self._kept.model, device, original, args, kwargs, self.frozen, len(keys), self.filling.lengths, under
        )
        self.watches += 1
        found: list = []
        seconds = seconds_of(lambda: found.extend(forward.watched(self.num_frozen, self._kept.dtype)), device)
        output, frontier = found
        if isinstance(frontier, Refused):
            self._refuse(str(frontier))
            return output
        origin = None if base is None else base.origin(keys, frontier)  # before room is made
        begun = self._kept.begin(frontier)
        if self._moves is not None:
            self._moves.watch_seconds, begun.layers_seconds = seconds, self._moves.layers_seconds
        self._watches.clear()
        self.filling.keep(begun, origin, keys, forward.rows, kwargs, slice(None))
        return output

    def _refuse(self, reason: str) -> None:
        self.refused = reason
        self._kept.note(f"not kept behind {self.num_frozen} layers: {reason}")
        logger.warning("features are not kept behind %d layers: %s", self.num_frozen, reason)

    def _watch(self, name: str) -> Stopwatch:
        if name not in self._watches:
            waits = name == "gather" and self._kept.folder is not None
            self._watches[name] = Stopwatch(self._kept.device, waits=waits)
        return self._watches[name]

    def _weigh(self, now: Generation) -> None:
        prefix, gather = self.seconds("prefix"), self.seconds("gather")
        if self._moves is not None and prefix is not None and gather is not None and gather > prefix:
            now.given_up = True
            self._kept.note(
                f"given up until the next freeze: reading a sample's features takes {1e6 * gather:.0f} us, computing "
                f"them {1e6 * prefix:.0f} us"
            )

    def _check_batch(self, keys: Tensor, args: tuple, kwargs: dict) -> None:
        sizes = {len(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.dim()}
        if sizes and len(keys) not in sizes:
            raise ValueError(f"keys must be one for each sample, got {len(keys)} for a batch of {min(sizes)}")
