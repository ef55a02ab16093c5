"""Store: rows of kept tensors by key, on a device, in host memory or in files; what is kept is known on the host."""

import math
import mmap
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from .columns import Column, ColumnRows
from .files import ORIGIN_BIT, Files

# Bytes from which on a buffer lies in large pages.
LARGE = 2**22


class Store:
    """keys -> rows of each column. Rows are written once and never evicted.

    Args:
        columns: what a row holds.
        keys: of 0..keys - 1.
        rows: how many rows there is room for.
        device: where they lie.
        folder: of files that hold the rows in place of memory; what is committed there is there at once.
        fingerprint: of what the rows are of. Files of another one are emptied.
        positions: how many positions there is room for, over all rows, where rows differ in length.
    """

    def __init__(
        self,
        columns: Sequence[Column],
        keys: int,
        rows: int,
        device: torch.device | str,
        *,
        folder: Path | None = None,
        fingerprint: str = "",
        positions: int = 0,
    ) -> None:
        self.columns, self.rows, self.positions = tuple(columns), rows, positions
        self.device = torch.device(device)
        self._row_of = torch.full((keys,), -1, dtype=torch.int32, device="cpu")
        # Of each key: which earlier rows its row was computed from, a number that only the caller understands; 0 is
        # none, -1 is unknown.
        self._origin = torch.zeros(keys, dtype=torch.int64, device="cpu")
        self._padded = any(column.padded for column in columns)
        # Of each row: where its positions start, and how many there are.
        self._spans = torch.zeros((rows if self._padded else 0, 2), dtype=torch.int64, device="cpu")
        self._used = self._used_positions = 0
        self._folder, self._fingerprint = folder, fingerprint
        self.files: Files | None = None
        self._stored: list[ColumnRows] = []
        self._open()

    def __len__(self) -> int:
        return self._used

    @property
    def bytes(self) -> int:
        """What the rows that are kept take."""
        fixed = sum(c.row_bytes() for c in self.columns if not c.padded) * self._used
        return fixed + sum(c.unit_bytes * self._used_positions for c in self.columns if c.padded)

    @property
    def bytes_taken(self) -> int:
        """What its buffers take, filled or not."""
        return sum(stored.bytes_taken for stored in self._stored)

    def has(self, keys: Tensor) -> Tensor:
        """-> bool [B]: which keys are kept; a key below 0 never is."""
        return (torch.index_select(self._row_of, 0, keys.clamp(min=0)) >= 0) & (keys >= 0)

    def keys(self) -> Tensor:
        """-> all keys that are kept."""
        return (self._row_of >= 0).nonzero().squeeze(1)

    def grow(self, rows: int, positions: int = 0) -> None:
        """Room for so many rows, at least as many as now; what is kept stays as it is.

        Raises:
            OSError: there is not enough room on the disk.
        """
        self.rows, self.positions = rows, positions
        self._spans = _longer(self._spans, rows if self._padded else 0)
        origin = self._origin.clone()  # which a file does not hold
        if self.files is not None:
            self.commit()
            self.files.close()
        self._open()
        self._origin = origin

    def _open(self) -> None:
        """Makes buffers of as many rows as there is room for; what was kept in memory is in them."""
        columns = [((self.positions if c.padded else self.rows, *c.unit), c.stored) for c in self.columns]
        factors = [((self.rows if c.kept is torch.int8 else 0,), torch.float32) for c in self.columns]
        before = [*(s.buffer for s in self._stored), *(s.factors for s in self._stored)]
        if self._folder is not None:
            by_position = [c.padded for c in self.columns] + [False] * len(factors)
            self.files = Files(self._folder, [*columns, *factors], self._fingerprint, by_position)
            found = self.files.tensors
        else:
            found = [_empty(shape, dtype, self.device) for shape, dtype in [*columns, *factors]]
            for tensor, old in zip(found, before, strict=False):
                tensor[: len(old)] = old
        roundings = [s.rounding for s in self._stored]
        halves = found[: len(columns)], found[len(columns) :]
        self._stored = [ColumnRows(*each) for each in zip(self.columns, *halves, strict=True)]
        for stored, rounding in zip(self._stored, roundings, strict=False):
            stored.rounding = rounding
        if self.files is not None:
            self._restore(self.files)

    def put(
        self, keys: Tensor, batches: Sequence[Tensor], lengths: Tensor | None = None, origin: Tensor | None = None
    ) -> int:
        """Keeps the rows of keys that are new, as far as there is room. Returns how many.

        Shapes: keys int64 [B], batches [B, ...] a column, lengths int64 [B] on the CPU where rows differ in length,
        origin int64 [B], see `origin`; None: 0.

        Raises:
            Refused: no row of the batch can be kept.
        """
        for column, batch in zip(self.columns, batches, strict=True):
            column.check(batch)
        new = (~self.has(keys) & (keys >= 0)).nonzero().squeeze(1)[: self.rows - self._used]
        if self._padded:
            assert lengths is not None  # of rows that differ in length
            new = new[self._used_positions + lengths[new].cumsum(0) <= self.positions]
        if not len(new):
            return 0
        rows, position = torch.arange(self._used, self._used + len(new), device="cpu"), self._used_positions
        if self._padded and lengths is not None:
            lengths = lengths[new]
            ends = position + lengths.cumsum(0)
            self._spans[rows] = torch.stack([ends - lengths, lengths], 1)
            self._used_positions = int(ends[-1])
        lacks_scales = any(s.rounding is not None and s.rounding.scale is None for s in self._stored)
        for stored, batch in zip(self._stored, batches, strict=True):
            chosen = batch.detach() if len(new) == len(batch) else batch.detach()[new.to(batch.device)]
            stored.write(chosen, self._used, lengths, position)
        if lacks_scales and self.files is not None:
            self.files.save_scales({str(i): s.rounding.state() for i, s in enumerate(self._stored) if s.rounding})
        self._used += len(new)
        self._row_of[keys[new]] = rows.to(torch.int32)
        if origin is not None:
            self._origin[keys[new]] = origin[new]
        if self.files is not None:
            spans = self._spans[rows] if self._padded else torch.zeros((len(rows), 2), dtype=torch.int64, device="cpu")
            # Whether the row was computed from earlier rows.
            marked = rows | (self._origin[keys[new]] != 0).to(torch.int64) << ORIGIN_BIT
            self.files.wrote(torch.cat([keys[new][:, None], marked[:, None], spans], 1))
        return len(new)

    def gather(
        self, keys: Tensor, device: torch.device | str | None = None, *, length: int | None = None
    ) -> list[Tensor]:
        """-> each column's rows [B, ...] as computed, on the device; all keys must be kept.

        length: what rows that differ in length are padded to, with 0; None: to the longest.
        """
        rows = torch.index_select(self._row_of, 0, keys)
        if bool((rows < 0).any()):
            raise KeyError(f"keys must be kept, {int((rows < 0).sum())} of {len(rows)} are not")
        device = self.device if device is None else torch.device(device)
        places = self._places(rows, length) if self._padded else None
        index = rows.to(self.device, non_blocking=True)
        return [stored.read(index, places, device) for stored in self._stored]

    def origin(self, keys: Tensor) -> Tensor:
        """-> int64 [B]: what `put` was given; -1 where that was lost with the process that wrote the file."""
        return self._origin[keys]

    @property
    def is_lossy(self) -> bool:
        """Whether rows are rounded."""
        return any(c.stored != c.dtype for c in self.columns)

    def rounded(self, batches: Sequence[Tensor], lengths: Tensor | None = None) -> list[Tensor]:
        """-> the rows of these batches [B, ...] as they would be read back, had they been put."""
        return [stored.rounded(batch, lengths) for stored, batch in zip(self._stored, batches, strict=True)]

    def lengths(self, keys: Tensor) -> Tensor:
        """-> int64 [B], of rows that differ in length."""
        return self._spans[self._row_of[keys].to(torch.int64), 1]

    def allowed(self, keys: Tensor, batches: Sequence[Tensor]) -> list[Tensor]:
        """-> for each column the largest difference [B] that rounding explains between kept rows and computed ones."""
        rows = self._row_of[keys].to(torch.int64)
        return [stored.allowed(rows, batch) for stored, batch in zip(self._stored, batches, strict=True)]

    def commit(self) -> None:
        """Returns once all rows are on disk, where they lie in files."""
        if self.files is not None:
            self.files.commit()

    def clear(self) -> None:
        """Empties the store; its memory stays."""
        self._row_of.fill_(-1)
        self._origin.zero_()
        self._used = self._used_positions = 0
        for stored in self._stored:
            if stored.rounding is not None:
                stored.rounding.scale = None
        if self.files is not None:
            self.files.clear()

    def close(self) -> None:
        """Frees memory; what lies in files is committed and stays there."""
        if self.files is not None:
            self.commit()
        for stored in self._stored:  # its rounding stays: later rows may have passed through it
            stored.buffer = stored.factors = torch.empty(0, device="cpu")
        self._used = 0
        self._row_of, self._origin, self._spans = (t[:0].clone() for t in (self._row_of, self._origin, self._spans))
        if self.files is not None:
            self.files.close()

    def _places(self, rows: Tensor, length: int | None) -> tuple[Tensor, Tensor]:
        start, count = torch.index_select(self._spans, 0, rows).unbind(1)
        length = int(count.max()) if length is None else length
        if bool((count > length).any()):
            raise ValueError(f"length must be >= that of the longest row, {int(count.max())}, got {length}")
        steps = torch.arange(length, device="cpu")
        positions = torch.where(steps < count[:, None], start[:, None] + steps, start[:, None])
        return positions.to(self.device), count

    def _restore(self, files: Files) -> None:
        """Takes up what lies in files."""
        for i, state in files.scales.items():
            rounding = self._stored[int(i)].rounding
            assert rounding is not None  # the files are of columns like these
            rounding.load(state)
        key, place, *span = files.entries.T
        if not len(key):
            return
        self._row_of.fill_(-1)
        rows = place & ((1 << ORIGIN_BIT) - 1)
        self._row_of[key] = rows.to(torch.int32)
        self._origin[key] = -(place >> ORIGIN_BIT)
        # Rows that were written and never committed lie behind these, and are written again.
        self._used = int(rows.max()) + 1
        if self._padded:
            self._spans[rows] = torch.stack(span, 1)
            self._used_positions = int(sum(span).max())


def _empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """-> uninitialised; in host memory of large pages, in which rows in a random order are found sooner."""
    size = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or size < LARGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=dtype, device=device)
    mapped = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without large pages
        mapped.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(mapped, dtype=dtype).view(shape)  # unmapped with the last tensor that looks into it


def _longer(tensor: Tensor, size: int) -> Tensor:
    longer = _empty((size, *tensor.shape[1:]), tensor.dtype, tensor.device)
    longer[: len(tensor)] = tensor
    return longer
