"""FeatureCache: the frozen layers' outputs, kept by view of a sample, in place of running them again."""

import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .frontier import Frontier, sliced
from .guard import Guard, fingerprint
from .loader import CacheLoader
from .probe import Forward, Seen, autocast_state, lengths_of, padded_length, right_padded
from .report import CacheReport
from .room import ensure_room, room_for
from .store import KEPT_DTYPES, Column, Store
from .timing import Stopwatch
from .views import Keys, Views
from .watch import Refused, through

logger = logging.getLogger("freezeout_ext")

# Cached batches between two spot checks: 1, 2, 4, ... and no more than this.
MOST_UNCHECKED = 256


class FreezeOutLike(Protocol):
    """Layers have a name and `modules`: name -> module; `layers.given` came frozen and lie in front of all."""

    model: nn.Module
    layers: Any

    @property
    def num_frozen(self) -> int: ...


@dataclass
class Generation:
    """What is kept behind one number of frozen layers."""

    frontier: Frontier
    store: Store
    guard: Guard


class FeatureCache:
    """frontier(key) = frozen layers(view of a sample), computed once a view and read back ever after.

    Hand it to FreezeOut (`cache=`), take batches from `loader()` and run the model inside `samples(keys)`. From the
    first freeze on the frozen layers' outputs are kept; a forward over kept views does not run these layers, and views
    that are kept are not read from the data set where the rest of the model needs no input. Later freezes compute from
    what is kept. Evaluation neither reads nor fills the cache.

    Args:
        dataset: map-style; or a `BatchDataset`, which makes whole batches.
        views: K, how many fixed random views each sample has. They take turns; before the first freeze each epoch shows
            a fresh one.
        store: "device" (where the model is), "host", or the path of a folder, whose rows outlive the process.
        dtype: of kept floating-point features: None as computed, torch.bfloat16, torch.float16, torch.int8 (with a
            scale for each channel and row).
        limit: in bytes; views that do not fit are computed as ever. None: an error where they do not fit.
        seed: of the views and the order.
        measure: False keeps features also where reading them is slower than computing them.

    Raises:
        TypeError, ValueError: iterable data; an argument out of its range; a folder made for another data set.

    A sample's views must depend on torch's, numpy's and random's global generators alone, and on no other sample:
    augmentation across samples (mixup, cutmix) belongs behind the frontier.
    """

    def __init__(
        self,
        dataset: Any,
        *,
        views: int = 4,
        store: str | os.PathLike = "device",
        dtype: torch.dtype | None = None,
        limit: int | None = None,
        seed: int = 0,
        measure: bool = True,
    ) -> None:
        if dtype not in KEPT_DTYPES:
            raise ValueError(f"dtype must be None, torch.bfloat16, torch.float16 or torch.int8, got {dtype}")
        if limit is not None and (isinstance(limit, bool) or limit <= 0):
            raise ValueError(f"limit must be > 0 bytes or None, got {limit}")
        self.views = Views(dataset, views, seed)
        self.store, self.dtype, self.limit, self.measure = store, dtype, limit, measure
        self._folder = None if store in ("device", "host") else Path(store)
        self._freezeout: FreezeOutLike | None = None
        self._model: nn.Module | None = None
        self._paused: Callable[[], AbstractContextManager] = nullcontext
        self._num_frozen = 0
        self._generations: list[Generation] = []
        self._item_store: Store | None = None
        self._rank, self._world_size = 0, 1
        self._keys: Keys | None = None
        self._lengths: Tensor | None = None
        self._absent = torch.zeros(self.views.num_keys, dtype=torch.bool)
        self._refused: str | None = None
        self._aliases = self._gave_up = self._closed = False
        self._notes: list[str] = []
        self._hits = self._pushed = self._misses = self._read = self._skipped = self._checks = self._ran = 0
        self._difference = 0.0
        self._cached_steps = self._next_check = self._cached_plans = self._next_plan = 0
        self._watches: dict[str, Stopwatch] = {}
        if self._folder is not None:
            self._claim_folder()

    def __repr__(self) -> str:
        return f"FeatureCache({self.views.num_samples} samples, views={self.views.count}, store={str(self.store)!r})"

    # For the user

    def loader(
        self,
        batch_size: int,
        *,
        shuffle: bool = True,
        drop_last: bool = False,
        collate_fn: Callable[[list], Any] | None = None,
        seed: int | None = None,
        rank: int | None = None,
        world_size: int | None = None,
        key_name: str = "keys",
        **arguments: Any,
    ) -> CacheLoader:
        """Batches (inputs, targets, keys), or dicts with the entry `key_name`; see `CacheLoader`.

        Args:
            rank, world_size: which part of the samples; None: those of torch.distributed.
            arguments: of torch's DataLoader (num_workers, pin_memory, persistent_workers, ...).
        """
        spread = torch.distributed.is_available() and torch.distributed.is_initialized()
        self._rank = (torch.distributed.get_rank() if spread else 0) if rank is None else rank
        self._world_size = (torch.distributed.get_world_size() if spread else 1) if world_size is None else world_size
        return CacheLoader(
            self, batch_size, shuffle=shuffle, drop_last=drop_last, seed=self.views.seed if seed is None else seed,
            collate_fn=collate_fn, rank=self._rank, world_size=self._world_size, key_name=key_name, arguments=arguments,
        )  # fmt: skip

    @contextmanager
    def samples(self, keys: Keys | Tensor | Sequence[int], *, lengths: Tensor | None = None) -> Iterator[None]:
        """Inside, a forward of the model in training mode is one over the views with these keys.

        Args:
            lengths: int64 [B], of samples that are padded behind in dimension 1; None: from a forward's
                `attention_mask`, where there is one.

        Raises:
            ValueError: a key twice; a key that is none of this data set's; another number of keys than of samples.
        """
        if self._closed:
            raise RuntimeError("samples() must not be called after close()")
        if self._model is None:
            raise RuntimeError("samples() needs a model: pass the cache to FreezeOut(cache=...)")
        self._keys, self._lengths, self._ran = Keys(self._checked(keys)), lengths, 0
        try:
            with through({"": self._model}, self._forward):
                yield
        finally:
            self._keys = self._lengths = None
        if not self._ran and self._num_frozen and torch.is_grad_enabled():
            self._note(f"no forward of the {type(self._model).__name__} that freezes ran inside samples()")

    def report(self) -> CacheReport:
        """-> what is kept, saved and refused."""
        now = self._current()
        prefix, gather = (
            self._watch_of(name).median() if name in self._watches else None for name in ("prefix", "gather")
        )
        owned = self.views.num_samples // self._world_size * self.views.count
        return CacheReport(
            num_frozen=now.frontier.num_frozen if now else 0,
            kept=tuple(now.frontier.names) if now else (),
            views=self.views.count,
            rows=len(now.store) if now else 0,
            of_rows=owned,
            bytes=self.bytes,
            where=str(self.store),
            hits=self._hits,
            pushed=self._pushed,
            misses=self._misses,
            samples_read=self._read,
            samples_skipped=self._skipped,
            seconds_saved=None if prefix is None or gather is None else self._hits * (prefix - gather),
            gather_ms=None if gather is None else 1e3 * gather,
            prefix_ms=None if prefix is None else 1e3 * prefix,
            checks=self._checks,
            largest_difference=self._difference,
            notes=tuple(dict.fromkeys(self._notes + ([f"not kept: {self._refused}"] if self._refused else []))),
        )

    @property
    def bytes(self) -> int:
        """What kept rows take, those of targets included."""
        stores = [g.store for g in self._generations] + ([self._item_store] if self._item_store else [])
        return sum(store.bytes for store in stores)

    def close(self) -> None:
        """Frees what is kept; what lies in a folder is brought to disk and stays there."""
        self._drop(self._generations)
        if self._item_store is not None:
            self._item_store.close()
            self._item_store = None
        self._closed = True

    def state_dict(self) -> dict:
        """What the views are of; what lies in a folder is on disk when this returns."""
        for generation in self._generations:
            generation.store.commit()
        if self._item_store is not None:
            self._item_store.commit()
        return {"samples": self.views.num_samples, "views": self.views.count, "seed": self.views.seed}

    def load_state_dict(self, state_dict: dict) -> None:
        """
        Raises:
            ValueError: the state is of other views; nothing was changed.
        """
        here = {"samples": self.views.num_samples, "views": self.views.count, "seed": self.views.seed}
        if dict(state_dict) != here:
            raise ValueError(f"state_dict must be of the same views, got {dict(state_dict)}, here {here}")

    # For FreezeOut

    def attach(self, freezeout: FreezeOutLike) -> None:
        """Whose frozen layers' outputs are kept. How many are frozen is read where it matters, so nothing is missed.

        Raises:
            ValueError: the cache is another FreezeOut's.
        """
        if self._freezeout is not None:
            raise ValueError("cache must be of one FreezeOut: close() the other one first, or make another cache")
        self._freezeout, self._model = freezeout, freezeout.model
        # Within, the frozen modules run as they are.
        self._paused = getattr(freezeout, "prefix_paused", nullcontext)

    def detach(self) -> None:
        """FreezeOut was closed: nothing is frozen any more."""
        self._drop(self._generations)
        self._freezeout, self._model, self._num_frozen, self._refused = None, None, 0, None

    def _follow(self) -> None:
        """Notices that layers were frozen or thawed."""
        if self._freezeout is None:
            return
        num_frozen = len(self._freezeout.layers.given) + self._freezeout.num_frozen
        if num_frozen == self._num_frozen:
            return
        stale = [g for g in self._generations if g.frontier.num_frozen > num_frozen]
        if stale:
            self._note(f"thawed to {num_frozen} layers: what was kept behind more was dropped")
            self._drop(stale)
        self._num_frozen = num_frozen
        self._refused, self._gave_up, self._aliases = None, False, False
        self._watches.clear()
        self._next_check, self._next_plan = self._cached_steps, self._cached_plans

    def _frozen_modules(self) -> dict[str, nn.Module]:
        layers = [*self._freezeout.layers.given, *self._freezeout.layers][: self._num_frozen]
        return {name: module for layer in layers for name, module in layer.modules.items()}

    # For the loader

    def keys(self, samples: Tensor, epoch: int) -> Tensor:
        """-> keys of the views that this epoch shows: fresh ones as long as none can be kept."""
        self._follow()
        return self.views.keys(samples, epoch) if self._can_keep else -1 - samples

    def skippable(self, keys: Tensor) -> Tensor:
        self._follow()
        now, found = self._current(), torch.zeros(len(keys), dtype=torch.bool)
        if now is None or self._gave_up or now.guard.changed() is not None:
            return found
        for generation in self._generations:
            found |= generation.store.has(keys)
        # Where something that trains runs in front of the frontier, a batch is computed whole or not at all.
        return found if now.frontier.sliceable or bool(now.store.has(keys).all()) else torch.zeros_like(found)

    def needless(self) -> Callable[[Any], bool] | None:
        now = self._current()
        return None if now is None or self._gave_up else now.frontier.needless

    def planned(self, keys: Tensor) -> bool:
        if not bool(self.skippable(keys).all()):
            return False
        self._cached_plans += 1
        if self._cached_plans <= self._next_plan:
            return False
        self._next_plan = self._cached_plans + min(self._cached_plans, MOST_UNCHECKED)
        return True

    def delivered(self, keys: Tensor, skipped: Tensor, samples_read: int) -> None:
        kept = keys >= 0
        self._absent[keys[kept]] = skipped[kept]
        self._read += samples_read
        self._skipped += int(skipped.sum())

    def item_store(self, columns: list[Column], keys: int) -> Store | None:
        if self._item_store is not None:
            self._item_store.close()
        folder = None if self._folder is None else self._part() / "items"
        rows = self._owned()
        needed = rows * sum(column.row_bytes() for column in columns)
        if self.limit is not None and needed > self.limit // 4:
            self._note(f"targets take {needed:,} bytes, too much beside the features: all samples are read")
            self._item_store = None
        else:
            self._item_store = Store(columns, keys, rows, "cpu", folder=folder, fingerprint="items")
        return self._item_store

    # One forward

    def _forward(self, name: str, model: nn.Module, original: Callable, args: tuple, kwargs: dict) -> Any:
        self._follow()
        if not (model.training and torch.is_grad_enabled() and self._num_frozen):
            return original(*args, **kwargs)
        self._ran += 1
        keys = self._keys.tensor
        self._check_batch(keys, args, kwargs)
        self._check_weights()
        absent = self._absent[keys.clamp(min=0)] & (keys >= 0)
        now = self._current()
        if (self._gave_up and not bool(absent.any())) or bool((keys < 0).any()):
            return self._as_ever(original, args, kwargs, absent)
        if (now is None or now.frontier.num_frozen != self._num_frozen) and self._refused is None:
            return self._watched(original, args, kwargs, keys, absent)
        if now is None or now.frontier.autocast != autocast_state(args, kwargs):
            if now is not None:
                self._note("a forward under another autocast than the one that was watched ran as ever")
            return self._as_ever(original, args, kwargs, absent)
        have = now.store.has(keys)
        if bool(have.all()):
            return self._cached(now, original, args, kwargs, keys, absent)
        return self._filling(now, original, args, kwargs, keys, have, absent)

    def _as_ever(self, original: Callable, args: tuple, kwargs: dict, absent: Tensor) -> Any:
        self._need_inputs(absent)
        return original(*args, **kwargs)

    def _cached(self, now, original, args, kwargs, keys, absent) -> Any:
        length = _length(args, kwargs, now.frontier)
        self._cached_steps += 1
        if self._cached_steps > self._next_check and not bool(absent.any()):
            self._next_check = self._cached_steps + min(self._cached_steps, MOST_UNCHECKED)
            self._spot_check(now, original, args, kwargs, keys)
            if now not in self._generations:
                return self._forward("", self._model, original, args, kwargs)
        watch = self._watch_of("gather")
        watch.start()
        rows = now.store.gather(keys, self._device(), length=length)
        watch.stop(len(keys))
        self._hits += len(keys)
        with self._paused(), now.frontier.replaced(rows, length):
            output = original(*args, **kwargs)
        self._weigh()
        return output

    def _filling(self, now, original, args, kwargs, keys, have, absent) -> Any:
        """Some views are new: their rows are computed and kept, as far as there is room."""
        frontier, length = now.frontier, _length(args, kwargs, now.frontier)
        groups = self._groups(now, keys, have)
        if not bool(have.any()) and len(groups) == 1:
            return self._whole(now, groups[0][0], original, args, kwargs, keys, absent)
        if not frontier.sliceable:
            return self._whole(now, None, original, args, kwargs, keys, absent)
        parts = []
        for base, places in groups:
            if base is None:
                self._need_inputs(absent[places])
            some = sliced((args, kwargs), places, len(keys))
            with self._from(base, keys[places], some):
                watch = self._watch_of("prefix")
                watch.start()
                computed = frontier.computed(original, *some)
                watch.stop(len(places) if base is None else 0)
            self._count(base, len(places))
            self._keep(now, keys[places], computed, some[1], places)
            parts.append((places, computed))
        if bool(have.any()):
            here = have.nonzero().squeeze(1)
            parts.insert(0, (here, now.store.gather(keys[here], self._device(), length=length)))
            self._hits += len(here)
        rows = [_merged(len(keys), [(places, of[i]) for places, of in parts]) for i in range(len(frontier.columns))]
        with self._paused(), frontier.replaced(rows, length):
            return original(*args, **kwargs)

    def _groups(self, now: Generation, keys: Tensor, have: Tensor) -> list[tuple[Generation | None, Tensor]]:
        """The places of keys that are missing, by the latest earlier generation that holds them."""
        missing, found = ~have, []
        for base in reversed(self._generations[: self._generations.index(now)]):
            here = missing & base.store.has(keys)
            if bool(here.any()):
                found.append((base, here.nonzero().squeeze(1)))
                missing = missing & ~here
        if bool(missing.any()):
            found.append((None, missing.nonzero().squeeze(1)))
        return found

    def _whole(self, now, base, original, args, kwargs, keys, absent) -> Any:
        """The forward as ever, from kept rows of fewer layers where `base` has them; its frontier is kept."""
        if base is None:
            self._need_inputs(absent)
        watch = self._watch_of("prefix")
        with self._from(base, keys, (args, kwargs)):
            watch.start()
            with now.frontier.recorded(on_last=lambda: watch.stop(len(keys) if base is None else 0)) as rows:
                output = original(*args, **kwargs)
        self._count(base, len(keys))
        if rows:
            self._keep(now, keys, rows, kwargs)
        return output

    def _watched(self, original, args, kwargs, keys, absent) -> Any:
        """The first forward behind a transition: shows what must be kept, and is checked."""
        base = self._base(keys)
        if len(keys) < 2 or (base is None and bool(absent.any())):
            # One sample shows nothing about batches, and without inputs nothing can be watched: as before the freeze.
            now = self._current()
            if base is not None:
                return self._cached(base, original, args, kwargs, keys, absent)
            if now is None:
                return self._as_ever(original, args, kwargs, absent)
            return self._filling(now, original, args, kwargs, keys, now.store.has(keys), absent)
        forward = Forward(
            self._model, original, args, kwargs, self._frozen_modules(), len(keys), self._lengths_of(kwargs),
            lambda part: self._from(base, keys if part is None else keys[part], (args, kwargs)),
        )  # fmt: skip
        output, frontier = forward.watched(self._num_frozen, self.dtype, aliases=self._aliases)
        if isinstance(frontier, Seen) and not self._aliases:
            self._aliases = True  # the next forward is watched once more
        elif isinstance(frontier, Refused):
            self._refused = str(frontier)
            logger.warning("features are not kept behind %d layers: %s", self._num_frozen, frontier)
        else:
            self._begin(frontier)
            self._keep(self._generations[-1], keys, forward.rows, kwargs)
            self._count(base, len(keys))
        return output

    # Weights, inputs, batches

    def _check_weights(self, *, thorough: bool = False) -> None:
        for generation in list(self._generations):
            changed = generation.guard.changed(thorough=thorough)
            if changed is not None:
                self._note(
                    f"{changed} was changed: what was kept behind {generation.frontier.num_frozen} layers is dropped"
                )
                generation.store.clear()  # a folder must not bring it back
                self._drop([generation])

    def _checked(self, keys: Keys | Tensor | Sequence[int]) -> Tensor:
        if isinstance(keys, Keys):
            keys = keys.tensor
        if isinstance(keys, Tensor) and keys.device.type != "cpu":
            self._note("keys were on the device: a synchronisation at every step; hand over the loader's own")
        keys = torch.as_tensor(keys, dtype=torch.int64).cpu()
        if keys.dim() != 1 or not len(keys):
            raise ValueError(f"keys must be one for each sample of a batch, got shape {tuple(keys.shape)}")
        if len(keys.unique()) != len(keys):
            twice, count = keys.unique(return_counts=True)
            raise ValueError(f"keys must be different in a batch, got {twice[count > 1].tolist()[:5]} more than once")
        least, most = int(keys.min()), int(keys.max())
        if least < -self.views.num_samples or most >= self.views.num_keys:
            raise ValueError(
                f"keys must be of this cache's data set, in {-self.views.num_samples}..{self.views.num_keys - 1}, "
                f"got {least if least < 0 else most}"
            )
        return keys

    def _check_batch(self, keys: Tensor, args: tuple, kwargs: dict) -> None:
        sizes = {len(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.dim()}
        if sizes and len(keys) not in sizes:
            raise ValueError(f"keys must be one for each sample, got {len(keys)} for a batch of {min(sizes)}")

    def _need_inputs(self, absent: Tensor) -> None:
        if bool(absent.any()):
            raise RuntimeError(
                f"{int(absent.sum())} samples of this batch were not read, since their features were kept, and cannot be used "
                f"in this forward: {self._notes[-1] if self._notes else 'they were dropped since'}"
            )

    def _lengths_of(self, kwargs: Mapping) -> Tensor | None:
        return lengths_of(kwargs) if self._lengths is None else self._lengths.to("cpu", torch.int64)

    def _device(self) -> torch.device:
        return next(iter(self._model.parameters())).device

    # Generations

    @property
    def _can_keep(self) -> bool:
        return bool(self._num_frozen) and not self._gave_up and not (self._refused and not self._generations)

    def _current(self) -> Generation | None:
        return self._generations[-1] if self._generations else None

    def _base(self, keys: Tensor) -> Generation | None:
        """The latest generation that holds all of these keys."""
        return next((g for g in reversed(self._generations) if bool(g.store.has(keys).all())), None)

    @contextmanager
    def _from(self, base: Generation | None, keys: Tensor, inputs: tuple) -> Iterator[None]:
        """Kept rows of fewer layers in place of these, the other frozen modules as they are."""
        with ExitStack() as stack:
            if base is not None:
                stack.enter_context(self._paused())
                length = _length(*inputs, base.frontier)
                rows = base.store.gather(keys, self._device(), length=length)
                stack.enter_context(base.frontier.replaced(rows, length, whole=False))
            yield

    def _begin(self, frontier: Frontier) -> None:
        """A new generation, empty, or what its folder holds."""
        length = frontier.length or 0
        row_bytes = sum(column.row_bytes(length) for column in frontier.columns)
        rows, taken = self._owned(), sum(g.store.bytes_taken for g in self._generations)
        if self._item_store is not None:
            taken += self._item_store.bytes_taken
        device = self._device() if self.store == "device" else torch.device("cpu")
        room = room_for(rows * row_bytes, device, self._folder, self.limit, taken)
        if room < rows * row_bytes and self._generations:
            self._note("what was kept behind fewer layers is dropped to make room, and computed from inputs again")
            self._drop(self._generations)
            taken = self._item_store.bytes_taken if self._item_store is not None else 0
            room = room_for(rows * row_bytes, device, self._folder, self.limit, taken)
        if self.limit is None:
            ensure_room(rows * row_bytes, room, device, self._folder, self)
        elif room < rows * row_bytes:
            rows = room // row_bytes
            self._note(
                f"limit: {rows:,} of {self._owned():,} views fit ({self._owned() * row_bytes:,} bytes would hold all)"
            )
        modules = dict(frontier.modules)
        guard = Guard(modules, {name: _table(self._model, name) for name in frontier.states})
        folder = None if self._folder is None else self._part() / f"frozen-{frontier.num_frozen}"
        store = Store(
            frontier.columns, self.views.num_keys, rows, device, folder=folder, positions=rows * length,
            fingerprint=self._fingerprint(frontier, guard),
        )  # fmt: skip
        if store.files is not None and store.files.was_emptied is not None:
            what = (
                "is of other weights or layers, and was emptied"
                if store.files.was_emptied
                else f"holds {len(store):,} rows"
            )
            self._note(f"the folder {folder.name} {what}")
        self._generations.append(Generation(frontier, store, guard))
        logger.info(
            "features of %s are kept: %s bytes a view, %s for %s views, on %s",
            ", ".join(frontier.names), f"{row_bytes:,}", f"{rows * row_bytes:,}", f"{rows:,}", self.store,
        )  # fmt: skip

    def _keep(
        self, now: Generation, keys: Tensor, rows: list[Tensor], kwargs: Mapping, part: Tensor | None = None
    ) -> None:
        lengths = None
        if now.frontier.length is not None:
            lengths = self._lengths_of(kwargs)
            if part is not None and self._lengths is not None:
                lengths = lengths[part]
            try:
                right_padded(kwargs, lengths)
            except Refused as reason:
                return self._note(f"a batch was not kept: {reason}")
        kept = now.store.put(keys, rows, lengths)
        if not kept and len(now.store) < now.store.rows:
            self._note("a batch was not kept: its samples have another shape or dtype than those of the first one")
        self._retire()

    def _retire(self) -> None:
        """Frees generations whose rows are all in a later one."""
        *before, last = self._generations
        for generation in before:
            if len(generation.store) <= len(last.store) and bool(last.store.has(generation.store.keys()).all()):
                self._drop([generation])

    def _drop(self, generations: Sequence[Generation]) -> None:
        for generation in list(generations):
            self._generations.remove(generation)
            generation.store.close()

    # Checks

    def _spot_check(self, now: Generation, original, args, kwargs, keys: Tensor) -> None:
        """Computes a cached batch anew.

        Raises:
            RuntimeError: it differs by more than rounding.
        """
        self._check_weights(thorough=True)
        if now not in self._generations or not now.frontier.sliceable:
            return
        length = _length(args, kwargs, now.frontier)
        computed = now.frontier.computed(original, args, kwargs)
        kept = now.store.gather(keys, self._device(), length=length)
        lengths = now.store.lengths(keys) if now.frontier.length is not None else None
        for column, a, b, allowed in zip(
            now.store.columns, kept, computed, now.store.allowed(keys, computed), strict=True
        ):
            if column.padded:
                valid = torch.arange(b.shape[1]) < lengths[:, None]
                b = b.masked_fill(~valid.to(b.device).view(*valid.shape, *[1] * (b.dim() - 2)), 0)
            apart = (a.double() - b.double()).abs().flatten(1).amax(1)
            over = (apart / allowed.double().clamp(min=torch.finfo(torch.float64).tiny)).where(apart > 0, 0)
            worst = float(over.nan_to_num(torch.inf).max())
            self._difference = max(self._difference, worst)
            if not worst <= 1:
                key = int(keys[int(over.argmax())])
                self.close()
                raise RuntimeError(
                    f"kept features of sample {int(self.views.samples(torch.tensor(key)))} differ from the same view computed "
                    f"anew, {worst:.1f} times as far as rounding explains. Either the view is not drawn from the global "
                    "generators alone, or inputs are mixed across samples (mixup, cutmix) or changed between loader and "
                    "model by chance; or the frozen layers are no function of their input. The cache is closed"
                )
        self._checks += 1

    def _count(self, base: Generation | None, samples: int) -> None:
        if base is None:
            self._misses += samples
        else:
            self._pushed += samples

    def _watch_of(self, name: str) -> Stopwatch:
        if name not in self._watches:
            self._watches[name] = Stopwatch(self._device())
        return self._watches[name]

    def _weigh(self) -> None:
        """Gives up where reading is slower than computing."""
        prefix, gather = self._watch_of("prefix").median(), self._watch_of("gather").median()
        if self.measure and prefix is not None and gather is not None and gather > prefix:
            self._gave_up = True
            self._note(
                f"given up until the next freeze: reading a sample's features takes {1e6 * gather:.0f} us, computing them "
                f"{1e6 * prefix:.0f} us"
            )

    def _owned(self) -> int:
        """How many views this process may see."""
        return -(-self.views.num_samples // self._world_size) * self.views.count

    def _note(self, text: str) -> None:
        if text not in self._notes:
            self._notes.append(text)
            logger.info("features: %s", text)

    # Folders

    def _part(self) -> Path:
        return self._folder if self._world_size == 1 else self._folder / f"rank-{self._rank}-of-{self._world_size}"

    def _claim_folder(self) -> None:
        here = {"samples": self.views.num_samples, "views": self.views.count, "seed": self.views.seed}
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / "views.json"
        found = json.loads(path.read_text()) if path.exists() else here
        if found != here:
            raise ValueError(f"store must be of the same views: {self._folder} is of {found}, this cache of {here}")
        path.write_text(json.dumps(here))

    def _fingerprint(self, frontier: Frontier, guard: Guard) -> str:
        return f"{frontier.names} {frontier.columns} {frontier.autocast} {fingerprint(guard.tensors())}"


def _length(args: tuple, kwargs: Mapping, frontier: Frontier) -> int | None:
    return None if frontier.length is None else padded_length(args, kwargs)


def _merged(batch_size: int, parts: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """One batch of rows from parts (places [b], rows [b, ...]), with the strides of the first."""
    like = parts[0][1]
    order = sorted(range(1, like.dim()), key=lambda d: -like.stride(d))
    whole = like.new_empty((batch_size, *(like.shape[d] for d in order)))
    whole = whole.permute(0, *(1 + order.index(d) for d in range(1, like.dim())))
    for places, rows in parts:
        whole[places.to(whole.device)] = rows
    return whole


def _table(model: nn.Module, name: str) -> tuple[dict, str]:
    path, _, key = name.rpartition(".")
    module = model.get_submodule(path)
    return (module._parameters if key in module._parameters else module._buffers), key
