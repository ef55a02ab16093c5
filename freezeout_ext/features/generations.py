"""Generations: what is kept behind each number of frozen layers, where it lies, and until when it holds."""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .columns import row_bytes_of
from .frontier import Frontier
from .guard import Changes, Guard, fingerprint, unseen
from .probe import padded_length
from .room import room_for
from .store import Store
from .views import Views

logger = logging.getLogger("freezeout_ext")

# The last generation whose number is a bit of an int64 above 0.
LAST = 61


class FreezeOutLike(Protocol):
    """What a cache needs of FreezeOut.

    Each layer has a name, and `modules`: name -> module.
    `layers.given` are the modules that were frozen from the start. They lie in front of all layers.
    """

    model: nn.Module
    layers: Any
    step_count: int
    schedule: Any  # of its `total_steps`, `next_milestone(step)` and `num_frozen(step)`

    @property
    def num_frozen(self) -> int: ...


@dataclass(eq=False)
class Generation:
    """What is kept behind one number of frozen layers."""

    number: int  # how many generations there were before
    frontier: Frontier
    store: Store
    guard: Guard
    given_up: bool = False  # reading takes longer than computing
    layers_seconds: float = 0.0  # of a sample in the layers in front, as far as they were timed

    def origin(self, keys: Tensor, frontier: Frontier) -> Tensor:
        """-> int64 [B]: which generations rows have passed through, and were rounded in, that come from these rows.

        Bit i stands for generation number i. -1: nobody knows.

        Args:
            frontier: behind which the new rows are.
        """
        before = self.store.origin(keys)
        if not self.store.is_lossy:
            return before
        lost = self.frontier.length is not None and frontier.length is None  # the lengths of its samples
        return torch.full_like(before, -1) if lost or self.number > LAST else before | 1 << self.number

    def length(self, args: tuple, kwargs: Mapping) -> int | None:
        """-> what a batch is padded to, None where rows are all as long."""
        return None if self.frontier.length is None else padded_length(args, kwargs)


class Generations:
    """The latest is read first; earlier ones serve what has not passed through the layers that froze since.

    Args:
        views: whose rows these are.
        where: "device", "host" or the path of a folder.
        dtype: of kept features.
        limit: in bytes, over all generations and items.
        note: takes what happened, for the report.

    Attributes:
        freezeout: that has the cache.
        rank, world_size: of this process.
        items: the store of what batches hold besides features.
        closed: whether the cache is closed.
        begun: all generations by their number, those included that were dropped.
        changed: what of the frozen layers was changed, so that rows were dropped and none were kept since.
        changes: see `Guard`.
    """

    def __init__(
        self, views: Views, where: str, dtype: torch.dtype | None, limit: int | None, note: Callable[[str], None]
    ) -> None:
        self.views, self.where, self.dtype, self.limit, self.note = views, where, dtype, limit, note
        self.folder = None if where in ("device", "host") else Path(where)
        self.rank, self.world_size, self.closed = 0, 1, False
        self.changed: str | None = None
        self.items: Store | None = None
        self.freezeout: FreezeOutLike | None = None
        self.changes: Changes = unseen
        self._parameter: Tensor | None = None
        self._all: list[Generation] = []
        self.begun: list[Generation] = []

    def __iter__(self) -> Iterator[Generation]:
        return iter(tuple(self._all))

    @property
    def latest(self) -> Generation | None:
        return self._all[-1] if self._all else None

    @property
    def attached(self) -> FreezeOutLike:
        """The FreezeOut, which has the cache wherever something is frozen."""
        assert self.freezeout is not None
        return self.freezeout

    @property
    def model(self) -> nn.Module:
        return self.attached.model

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        if self._parameter is None:  # to look for a parameter takes as long as a small layer
            self._parameter = next(self.model.parameters())
        return self._parameter.device

    @property
    def owned(self) -> int:
        """How many views this process may see."""
        return -(-self.views.num_samples // self.world_size) * self.views.count

    def stores(self) -> list[Store]:
        return [g.store for g in self._all] + ([] if self.items is None else [self.items])

    @property
    def bytes(self) -> int:
        """What kept rows take, those of targets included."""
        return sum(store.bytes for store in self.stores())

    # Rows

    def groups(self, now: Generation, keys: Tensor, have: Tensor) -> list[tuple[Generation | None, Tensor]]:
        """The places of keys that `now` lacks (~have), by the latest earlier generation that holds them."""
        missing = ~have
        found: list[tuple[Generation | None, Tensor]] = []
        for base in reversed(self._all[: self._all.index(now)]):
            here = missing & base.store.has(keys)
            if bool(here.any()):
                found.append((base, here.nonzero().squeeze(1)))
                missing = missing & ~here
        if bool(missing.any()):
            found.append((None, missing.nonzero().squeeze(1)))
        return found

    def standing_in(
        self, base: Generation | None, keys: Tensor, inputs: tuple[tuple, dict]
    ) -> AbstractContextManager[None]:
        """Inside, kept rows of fewer layers take the place of these layers. The other frozen modules run."""
        if base is None:
            return nullcontext()
        length = base.length(*inputs)
        return base.frontier.replaced(base.store.gather(keys, self.device, length=length), length)

    # Life

    def begin(self, frontier: Frontier) -> Generation:
        """A new generation, empty, or what its folder holds.

        Raises:
            MemoryError, OSError: there is no room for all views, and no limit that says how many to keep.
        """
        for earlier in self:
            before = earlier.frontier
            if (before.autocast, before.shapes) != (frontier.autocast, frontier.shapes):
                self.note(f"dropped behind {before.num_frozen} layers: what was of another autocast or another shape")
                self._drop(earlier)
        length, folder, of = frontier.length or 0, None, ""
        row_bytes = row_bytes_of(frontier.columns, length)
        rows = self._rows(row_bytes)
        guard = Guard(self.model, frontier.modules, frontier.states, self.changes)
        if self.folder is not None:
            folder = self.part() / f"frozen-{frontier.num_frozen}"
            of = f"{frontier.names} {frontier.autocast} {fingerprint(guard.tensors())}"
        store = Store(
            frontier.columns, self.views.num_keys, rows, self._store_device(), folder=folder, positions=rows * length,
            fingerprint=of,
        )  # fmt: skip
        if folder is not None and store.files is not None and store.files.was_emptied is not None:
            emptied = store.files.was_emptied
            found = "was of other weights, and was emptied" if emptied else f"holds {len(store):,} rows"
            self.note(f"the folder {folder.name} {found}")
            if store.files.damaged:
                self.note(f"{store.files.damaged:,} of its rows were damaged on the disk, and are computed anew")
        self.begun.append(Generation(len(self.begun), frontier, store, guard))
        self._all.append(self.begun[-1])
        self.changed = None
        logger.info(
            "features of %s are kept: %s bytes a view, %s for %s views, on %s",
            ", ".join(frontier.names), f"{row_bytes:,}", f"{rows * row_bytes:,}", f"{rows:,}", self.where,
        )  # fmt: skip
        return self._all[-1]

    def retire(self) -> None:
        """Frees generations whose rows are all in the latest one."""
        *before, last = self._all
        for generation in before:
            if len(generation.store) <= len(last.store) and bool(last.store.has(generation.store.keys()).all()):
                self._drop(generation)

    def thaw_to(self, num_frozen: int) -> None:
        for generation in self:
            if generation.frontier.num_frozen > num_frozen:
                self.note(f"thawed to {num_frozen} layers: what was kept behind more was dropped")
                self._drop(generation)

    def drop_changed(self, *, thorough: bool = False) -> None:
        """Empties what was computed with other weights than the present ones; `thorough`: compares all values."""
        for generation in self:
            changed = generation.guard.changed(thorough=thorough)
            if changed is not None:
                self.changed = changed
                self.note(f"{changed}: what was kept behind {generation.frontier.num_frozen} layers was dropped")
                generation.store.clear()  # a folder must not bring it back
                self._drop(generation)

    def commit(self) -> None:
        for store in self.stores():
            store.commit()

    def detach(self) -> None:
        """FreezeOut was closed."""
        self._drop_all()
        self.begun.clear()
        self.freezeout = self._parameter = None

    def close(self) -> None:
        self._drop_all()
        self.begun.clear()
        self._parameter, self.closed = None, True
        self.close_items()

    def _drop_all(self) -> None:
        for generation in self:
            self._drop(generation)

    def _drop(self, generation: Generation) -> None:
        self._all.remove(generation)
        generation.store.close()

    def close_items(self) -> None:
        if self.items is not None:
            self.items.close()
            self.items = None

    # Room

    def fitting(self, row_bytes: int) -> tuple[int, bool]:
        """-> how many rows of so many bytes there would be room for, and whether earlier ones must make it."""
        wanted = self.owned * row_bytes
        room, drops = self.room(wanted), False
        if room < wanted and self._all:
            room, drops = min(wanted, room + sum(g.store.bytes_taken for g in self._all)), True
        return (room // row_bytes if row_bytes else self.owned), drops

    def _rows(self, row_bytes: int) -> int:
        """How many rows there is room for; earlier generations make room."""
        rows, drops = self.fitting(row_bytes)
        if drops:
            self.note("what was kept behind fewer layers was dropped to make room, and is computed from inputs again")
            self._drop_all()
            rows, _ = self.fitting(row_bytes)
        if rows == self.owned:
            return rows
        wanted = self.owned * row_bytes
        if self.limit is None and not self.views.auto:
            where = self.folder or ("host memory" if self._store_device().type == "cpu" else self.device)
            raise MemoryError(
                f"features of {self.views.num_samples} samples need {wanted:,} bytes on {where}, "
                f"{self.room(wanted):,} of what is free may be taken: pass limit=, fewer views=, dtype=torch.int8 or "
                "another store="
            )
        self.note(f"room: {rows:,} of {self.owned:,} views fit, {wanted:,} bytes would hold all")
        return rows

    def room(self, wanted: int) -> int:
        """-> how many of these bytes may be taken."""
        taken = sum(store.bytes_taken for store in self.stores())
        return room_for(wanted, self._store_device(), self.folder, self.limit, taken)

    def _store_device(self) -> torch.device:
        return self.device if self.where == "device" else torch.device("cpu")

    def part(self) -> Path:
        """The folder of this process."""
        assert self.folder is not None  # asked for only then
        return self.folder if self.world_size == 1 else self.folder / f"rank-{self.rank}-of-{self.world_size}"
