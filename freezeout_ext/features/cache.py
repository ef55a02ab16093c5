"""FeatureCache: the frozen layers' outputs, kept by view of a sample, in place of running them again."""

import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ..arguments import check_count, check_flag, check_kind
from .auto import DECISION, Choice
from .columns import KEPT_DTYPES
from .files import claim, read_json
from .forwards import Forwards
from .frontier import through
from .generations import FreezeOutLike, Generations
from .guard import unseen
from .keys import Keys, checked_keys
from .loader import CacheLoader
from .moves import Moves
from .report import CacheReport
from .serving import Serving
from .timing import Stopwatch
from .views import Views, rank_and_processes

logger = logging.getLogger("freezeout_ext")


class FeatureCache:
    """frontier(key) = frozen layers(view of a sample), computed once a view and read back ever after.

    Pass the cache to FreezeOut (`cache=`), take batches from `loader()` and run the model inside `samples(keys)`.
    From the first freeze on the frozen layers' outputs are kept.
    A forward over kept views does not run the frozen layers.
    Where the rest of the model needs no input, kept views are not read from the data set either.
    Later freezes compute from what is kept.
    Evaluation neither reads nor fills the cache.

    Args:
        dataset: map-style; or a `BatchDataset`, which makes whole batches.
        views: K, how many fixed random views each sample has. The views take turns. Before the first freeze each epoch
            shows a fresh view. "auto": K is decided once the first view of each sample is kept, from the memory, the
            epochs that are left, and measured times; see `report().notes`.
        store: "device" (where the model is), "host", or the path of a folder, whose rows outlive the process.
        dtype: of kept floating-point features. None: as computed. Else torch.bfloat16, torch.float16, or torch.int8
            with a scale for each channel and row.
        limit: in bytes. Views that do not fit are computed each time. None: views that do not fit are an error.
        seed: of the views and the order.
        measure: False always keeps features behind all frozen layers, even where keeping is slower than computing.
            What runs then does not depend on the clock.

    Raises:
        TypeError: the data is iterable, or an argument is of another kind.
        ValueError: an argument is out of its range, or the folder was made for another data set.

    A sample's views must depend on torch's, numpy's and random's global generators alone, and on no other sample.
    Augmentation across samples (mixup, cutmix) belongs behind the frontier.
    """

    def __init__(
        self,
        dataset: Any,
        *,
        views: int | str = 4,
        store: str | os.PathLike = "device",
        dtype: torch.dtype | None = None,
        limit: int | None = None,
        seed: int = 0,
        measure: bool = True,
    ) -> None:
        if dtype not in KEPT_DTYPES:
            raise ValueError(f"dtype must be None, torch.bfloat16, torch.float16 or torch.int8, got {dtype}")
        if limit is not None:
            check_count("limit", limit, 1)
        check_kind("store", store, (str, os.PathLike), '"device", "host" or a path')
        if not os.fspath(store):
            raise ValueError('store must be "device", "host" or a path, got an empty one')
        check_count("seed", seed, -(2**63), 2**63 - 1)
        check_flag("measure", measure)
        self.views = Views(dataset, views, seed)
        self._notes: list[str] = []
        self._kept = Generations(self.views, os.fspath(store), dtype, limit, self._note)
        loading = Stopwatch(torch.device("cpu"), calls=1)
        moves = Moves(self._kept, loading.median) if measure else None
        self._forwards = Forwards(self._kept, moves)
        self._paused: Callable[[], AbstractContextManager] = nullcontext
        self._untraced: Callable | None = None
        self._was_checked = False
        self._choice = Choice(self._kept, self._forwards, loading.median)
        self._serving = Serving(self._kept, self._forwards, self._choice, loading, self._follow)
        folder = self._kept.folder
        if folder is not None:
            claim(folder, self._described() | {"sample": self.views.digest()})
            if self.views.auto and (found := read_json(folder / DECISION)):
                self._choice.load_state_dict(found)
                self._note(f"views: {self.views.count} of each sample, as was decided for {folder}")

    def __repr__(self) -> str:
        return f"FeatureCache({self.views.num_samples} samples, views={self.views.asked!r}, store={self._kept.where!r})"

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
            rank: of this process, which decides its part of the samples; None: torch.distributed's.
            world_size: how many processes there are; None: torch.distributed's.
            key_name: see `CacheLoader`.
            arguments: of torch's DataLoader (num_workers, pin_memory, persistent_workers, ...).
        """
        here, processes = rank_and_processes()
        rank = here if rank is None else rank
        world_size = processes if world_size is None else world_size
        self._kept.rank, self._kept.world_size = rank, world_size
        return CacheLoader(
            self._serving, batch_size, shuffle=shuffle, drop_last=drop_last, collate_fn=collate_fn, rank=rank,
            world_size=world_size, key_name=key_name, arguments=arguments,
            seed=self.views.seed if seed is None else seed,
        )  # fmt: skip

    @contextmanager
    def samples(self, keys: Keys | Tensor | Sequence[int], *, lengths: Tensor | None = None) -> Iterator[None]:
        """Inside, a forward of the model in training mode runs over the views with these keys.

        Args:
            keys: int64 [B], as the loader gives them.
            lengths: int64 [B], of samples that are padded at their end, in dimension 1. None: the lengths are those of
                the forward's `attention_mask`, where there is one.

        Raises:
            ValueError: a key comes twice, a key is not of this data set, or there are not as many keys as samples.
            RuntimeError: no FreezeOut has this cache, or a spot check failed.
        """
        self._check_open("samples")
        check_kind("lengths", lengths, Tensor, "a tensor", optional=True)
        if self._kept.freezeout is None:
            raise RuntimeError("samples() needs a model: pass the cache to FreezeOut(cache=...)")
        forwards, model = self._forwards, self._kept.model
        checked, before = checked_keys(keys, self.views), forwards.count
        self._follow()
        if model.training and torch.is_grad_enabled():
            forwards.comes(len(checked))
        if forwards.is_idle and self._was_checked:
            yield
            return
        forwards.keys, forwards.filling.lengths, self._was_checked = checked, lengths, True
        try:
            # The frozen prefix must not watch a forward in which its modules do not run.
            pause = nullcontext if forwards.from_inputs(forwards.keys) else self._paused
            with pause(), through({"": model}, self._run()):
                yield
        finally:
            forwards.keys = forwards.filling.lengths = None
        if forwards.count == before and forwards.num_frozen and torch.is_grad_enabled():
            self._note(f"no forward in training of the {type(model).__name__} ran inside samples()")

    def report(self) -> CacheReport:
        """-> what is kept, saved and refused."""
        kept, forwards = self._kept, self._forwards
        now, prefix, gather = kept.latest, forwards.seconds("prefix"), forwards.seconds("gather")
        return CacheReport(
            num_frozen=now.frontier.num_frozen if now else 0,
            kept=tuple(now.frontier.names) if now else (),
            views=kept.views.count,
            rows=len(now.store) if now else 0,
            of_rows=kept.owned,
            bytes=kept.bytes,
            where=kept.where,
            hits=forwards.filling.hits,
            pushed=forwards.filling.pushed,
            misses=forwards.filling.misses,
            samples_read=self._serving.read,
            samples_skipped=self._serving.skipped,
            seconds_saved=None if prefix is None or gather is None else forwards.filling.hits * (prefix - gather),
            gather_ms=None if gather is None else 1e3 * gather,
            prefix_ms=None if prefix is None else 1e3 * prefix,
            checks=forwards.checks,
            largest_difference=forwards.difference,
            notes=tuple(self._notes),
        )

    @property
    def bytes(self) -> int:
        """What kept rows take, those of targets included."""
        return self._kept.bytes

    def close(self) -> None:
        """Frees what is kept. Rows in a folder are brought to disk and stay there."""
        self._kept.close()

    def state_dict(self) -> dict:
        """What the views are of, and how many there are. Rows in a folder are on disk when state_dict returns."""
        self._kept.commit()
        if not self.views.auto or self._kept.freezeout is None:
            return self._described()
        return self._described() | {"auto": self._choice.state_dict()}

    def load_state_dict(self, state_dict: dict) -> None:
        """
        Raises:
            ValueError: the state is of other views; nothing was changed.
        """
        check_kind("state_dict", state_dict, Mapping, "a dict")
        state, here = dict(state_dict), self._described()
        auto = state.pop("auto", None)
        if state != here:
            raise ValueError(f"state_dict must be of the same views, got {state}, here {here}")
        if auto is not None:
            self._choice.load_state_dict(auto)

    # For FreezeOut

    def attach(self, freezeout: FreezeOutLike) -> None:
        """From now on the outputs of freezeout's frozen layers are kept.

        The number of frozen layers is read wherever it matters, so no change of it is missed.

        Raises:
            ValueError: the cache is another FreezeOut's.
        """
        self._check_open("attach")
        if self._kept.freezeout is not None:
            raise ValueError("cache must be of one FreezeOut: close() the other one first, or make another cache")
        self._kept.freezeout = freezeout
        prefix = getattr(freezeout, "_prefix", None)
        self._paused = getattr(prefix, "paused", nullcontext)
        self._kept.changes = getattr(prefix, "changes", unseen)

    def detach(self) -> None:
        """FreezeOut was closed: nothing is frozen any more."""
        self._kept.detach()
        self._forwards.moved(0, {})

    # For captured steps: gathered rows are an input of such a step, and the frozen layers are no part of the step.

    @property
    def takes_part(self) -> bool:
        """Whether a forward now, inside samples(), would read or keep features."""
        self._follow()
        return self._forwards.keys is not None and not self._forwards.as_ever(self._forwards.keys)

    def rows(self) -> tuple[Tensor, ...] | None:
        """-> the gathered rows that a forward now reads; None where the forward must keep, watch or check."""
        return self._forwards.rows()

    @contextmanager
    def given(self, rows: tuple[Tensor, ...]) -> Iterator[None]:
        """Inside, forwards run on `rows`, such as the static inputs of a captured step."""
        self._forwards.given = rows
        try:
            yield
        finally:
            self._forwards.given = None

    def _run(self) -> Callable:
        """Forwards.run. No compiler may trace it, since each step may do something else."""
        if self._untraced is None and "torch._dynamo" in sys.modules:
            self._untraced = torch.compiler.disable(self._forwards.run)
        return self._untraced or self._forwards.run

    def _described(self) -> dict:
        return {"samples": self.views.num_samples, "views": self.views.asked, "seed": self.views.seed}

    def _follow(self) -> None:
        """Notices that layers were frozen or thawed."""
        freezeout = self._kept.freezeout
        if freezeout is None or self._kept.closed:
            return
        num_frozen = len(freezeout.layers.given) + freezeout.num_frozen
        if num_frozen != self._forwards.num_frozen:
            self._kept.thaw_to(num_frozen)
            layers = [*freezeout.layers.given, *freezeout.layers][:num_frozen]
            self._forwards.moved(num_frozen, {name: m for layer in layers for name, m in layer.modules.items()})
            self._serving.whole_due.restart()

    def _check_open(self, name: str) -> None:
        if self._kept.closed:
            raise RuntimeError(f"{name}() must not be called after close()")

    def _note(self, text: str) -> None:
        if text not in self._notes:
            self._notes.append(text)
            logger.info("features: %s", text)
