"""Store: rows of kept tensors by key, on a device, in host memory or in files; what is kept is known on the host."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from .columns import Column
from .files import Files
from .rounding import BOUNDS, Rounding

# Of a row's number in the journal: set where the row was computed from earlier rows.
ORIGIN_BIT = 48


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
        self._origin = torch.zeros(keys, dtype=torch.int16, device="cpu")
        self._padded = any(column.padded for column in columns)
        # Of each row: where its positions start, and how many there are.
        self._spans = torch.zeros((rows if self._padded else 0, 2), dtype=torch.int64, device="cpu")
        self._used = self._used_positions = 0
        self._rounding = [
            Rounding(c.unit, channel_first=not c.padded) if c.kept is torch.int8 else None for c in columns
        ]
        self.files: Files | None = None
        if folder is None:
            found = [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in self._layout()]
        else:
            self.files = Files(folder, self._layout(), fingerprint)
            found = self.files.tensors
        self._buffers, self._factors = found[: len(columns)], found[len(columns) :]
        if self.files is not None:
            self._restore()

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
        return sum(t.numel() * t.element_size() for t in (*self._buffers, *self._factors))

    def has(self, keys: Tensor) -> Tensor:
        """-> bool [B]: which keys are kept; a key below 0 never is."""
        return (torch.index_select(self._row_of, 0, keys.clamp(min=0)) >= 0) & (keys >= 0)

    def keys(self) -> Tensor:
        """-> all keys that are kept."""
        return (self._row_of >= 0).nonzero().squeeze(1)

    def grow(self, rows: int, positions: int = 0) -> None:
        """Room for so many rows, at least as many as now; what is kept stays as it is."""
        self.rows, self.positions = rows, positions
        self._spans = _longer(self._spans, rows if self._padded else 0)
        count = len(self.columns)
        if self.files is None:
            sizes = [shape[0] for shape, _ in self._layout()]
            self._buffers = [_longer(t, size) for t, size in zip(self._buffers, sizes[:count], strict=True)]
            self._factors = [_longer(t, size) for t, size in zip(self._factors, sizes[count:], strict=True)]
        else:
            self.files.grow(self._layout())
            self._buffers, self._factors = self.files.tensors[:count], self.files.tensors[count:]

    def put(
        self, keys: Tensor, batches: Sequence[Tensor], lengths: Tensor | None = None, origin: Tensor | None = None
    ) -> int:
        """Keeps the rows of keys that are new, as far as there is room. Returns how many.

        Shapes: keys int64 [B], batches [B, ...] a column, lengths int64 [B] on the CPU where rows differ in length,
        origin int16 [B], see `origin`; None: 0.
        A batch whose rows have another shape or dtype than the column is not kept.
        """
        for column, batch in zip(self.columns, batches, strict=True):
            tail = (0, *batch.shape[2:]) if column.padded else tuple(batch.shape[1:])
            if tail != column.shape or batch.dtype != column.dtype:
                return 0
        new = (~self.has(keys) & (keys >= 0)).nonzero().squeeze(1)[: self.rows - self._used]
        if self._padded:
            assert lengths is not None  # of rows that differ in length
            new = new[self._used_positions + lengths[new].cumsum(0) <= self.positions]
        if not len(new):
            return 0
        rows = torch.arange(self._used, self._used + len(new), device="cpu")
        if self._padded and lengths is not None:
            count = lengths[new]
            ends = self._used_positions + count.cumsum(0)
            self._spans[rows] = torch.stack([ends - count, count], 1)
            self._used_positions = int(ends[-1])
        for i, (column, batch) in enumerate(zip(self.columns, batches, strict=True)):
            self._write(i, column, batch.detach(), new, rows, lengths)
        self._used += len(new)
        self._row_of[keys[new]] = rows.to(torch.int32)
        if origin is not None:
            self._origin[keys[new]] = origin[new]
        if self.files is not None:
            spans = self._spans[rows] if self._padded else torch.zeros((len(rows), 2), dtype=torch.int64, device="cpu")
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
        if len(rows) and int(rows.min()) < 0:
            raise KeyError(f"keys must be kept, {int((rows < 0).sum())} of {len(keys)} are not")
        device = self.device if device is None else torch.device(device)
        index = rows.to(self.device, non_blocking=True)
        places = self._places(rows, length) if self._padded else None
        return [self._read(i, column, index, places, device) for i, column in enumerate(self.columns)]

    def origin(self, keys: Tensor) -> Tensor:
        """-> int16 [B]: what `put` was given; -1 where that was lost with the process that wrote the file."""
        return self._origin[keys]

    @property
    def is_lossy(self) -> bool:
        """Whether rows are rounded."""
        return any(c.stored != c.dtype for c in self.columns)

    def rounded(self, batches: Sequence[Tensor], lengths: Tensor | None = None) -> list[Tensor]:
        """-> the rows of these batches [B, ...] as they would be read back, had they been put."""
        found = []
        for column, batch, rounding in zip(self.columns, batches, self._rounding, strict=True):
            if column.padded:
                assert lengths is not None  # of rows that differ in length
                valid = torch.arange(batch.shape[1], device="cpu") < lengths[:, None]
                batch = batch.masked_fill(~valid.to(batch.device).view(*valid.shape, *[1] * (batch.dim() - 2)), 0)
            if rounding is None:
                found.append(batch.to(column.stored).to(column.dtype))
                continue
            here = batch.flatten(0, 1) if column.padded else batch.permute(0, *(d + 1 for d in column.order))
            row_of = None
            if column.padded:
                row_of = torch.arange(len(batch), device=batch.device).repeat_interleave(batch.shape[1])
            q, factors = rounding.encode(here, row_of, len(batch))
            here = rounding.decode(q, factors if row_of is None else factors[row_of], column.dtype)
            found.append(here.view(batch.shape) if column.padded else here.permute(column.back))
        return found

    def lengths(self, keys: Tensor) -> Tensor:
        """-> int64 [B], of rows that differ in length."""
        return self._spans[self._row_of[keys].to(torch.int64), 1]

    def allowed(self, keys: Tensor, batches: Sequence[Tensor]) -> list[Tensor]:
        """-> for each column the largest difference [B] that rounding explains between kept rows and computed ones."""
        rows, found = self._row_of[keys].to(torch.int64), []
        for column, batch, rounding, factors in zip(self.columns, batches, self._rounding, self._factors, strict=True):
            largest = batch.abs().flatten(1).amax(1).to(torch.float32) if batch.dim() > 1 else batch.abs()
            bound = BOUNDS[column.kept] if column.dtype.is_floating_point else 0.0
            if column.kept is torch.int8:
                assert rounding is not None and rounding.scale is not None  # its rows were written
                steps = factors[rows.to(self.device)].to(batch.device) * rounding.scale.max().to(batch.device)
                found.append(steps / 2 + BOUNDS[None] * largest)
            else:
                # What was computed in half precision differs by a unit where its kernel chose another order.
                found.append(largest * max(bound, 4 * torch.finfo(batch.dtype).eps if bound else 0.0))
        return found

    def commit(self) -> None:
        """Returns once all rows are on disk, where they lie in files."""
        if self.files is not None:
            self.files.commit()

    def clear(self) -> None:
        """Empties the store; its memory stays."""
        self._row_of.fill_(-1)
        self._origin.zero_()
        self._used = self._used_positions = 0
        for rounding in self._rounding:
            if rounding is not None:
                rounding.scale = None
        if self.files is not None:
            self.files.clear()

    def close(self) -> None:
        """Frees memory; what lies in files is committed and stays there."""
        if self.files is not None:
            self.commit()
        self._buffers, self._factors, self._used = [], [], 0
        self._row_of, self._spans = self._row_of[:0], self._spans[:0]
        if self.files is not None:
            self.files.close()

    def _layout(self) -> list[tuple[tuple[int, ...], torch.dtype]]:
        """-> shape and dtype of each column, and of each column's factors."""
        columns = [((self.positions if c.padded else self.rows, *c.unit), c.stored) for c in self.columns]
        return [*columns, *(((self.rows if r else 0,), torch.float32) for r in self._rounding)]

    # One column

    def _write(self, i: int, column: Column, batch: Tensor, new: Tensor, rows: Tensor, lengths: Tensor | None) -> None:
        chosen = batch if len(new) == len(batch) else batch[new.to(batch.device)]
        if column.padded:
            assert lengths is not None  # of rows that differ in length
            chosen = torch.cat([row[:length] for row, length in zip(chosen, lengths[new].tolist(), strict=True)])
            first = int(self._spans[rows[0], 0])
            where = slice(first, first + len(chosen))
            row_of = torch.arange(len(new), device="cpu").repeat_interleave(lengths[new]).to(batch.device)
        else:
            chosen = chosen.permute(0, *(d + 1 for d in column.order))
            where, row_of = slice(int(rows[0]), int(rows[-1]) + 1), None
        rounding = self._rounding[i]
        if rounding is not None:
            is_first = rounding.scale is None
            chosen, factors = rounding.encode(chosen, row_of, len(new))
            self._factors[i][int(rows[0]) : int(rows[-1]) + 1].copy_(factors)
            if is_first and self.files is not None:
                self._save_scales()
        self._buffers[i][where].copy_(chosen)

    def _read(self, i: int, column: Column, index: Tensor, places: tuple | None, device: torch.device) -> Tensor:
        if column.padded:
            assert places is not None  # of rows that differ in length
            positions, valid = places
            found, shape = self._rows(i, positions.flatten(), device), positions.shape
        else:
            found, shape = self._rows(i, index, device), index.shape
        rounding = self._rounding[i]
        if rounding is not None:
            factors = self._factors[i][index].to(device, non_blocking=True)
            factors = factors.repeat_interleave(shape[1]) if column.padded else factors
            found = rounding.decode(found, factors, column.dtype)
        elif found.dtype != column.dtype:
            found = found.to(column.dtype)
        if column.padded:
            found = found.view(*shape, *found.shape[1:])
            return found.masked_fill_(~valid.to(device).view(*shape, *[1] * (found.dim() - 2)), 0)
        return found.permute(column.back)

    def _rows(self, i: int, index: Tensor, device: torch.device) -> Tensor:
        if device == self.device or device.type != "cuda":
            return torch.index_select(self._buffers[i], 0, index).to(device)
        # torch reuses pinned memory once the copy from there has run.
        staged = torch.empty(
            (len(index), *self._buffers[i].shape[1:]), dtype=self._buffers[i].dtype, device="cpu", pin_memory=True
        )
        return torch.index_select(self._buffers[i], 0, index, out=staged).to(device, non_blocking=True)

    def _places(self, rows: Tensor, length: int | None) -> tuple[Tensor, Tensor]:
        start, count = self._spans[rows.to(torch.int64)].unbind(1)
        length = int(count.max()) if length is None else length
        if bool((count > length).any()):
            raise ValueError(f"length must be >= that of the longest row, {int(count.max())}, got {length}")
        steps = torch.arange(length, device="cpu")
        valid = steps < count[:, None]
        positions = torch.where(valid, start[:, None] + steps, start[:, None])
        return positions.to(self.device), valid

    # Files

    def _save_scales(self) -> None:
        scales = {str(i): r.state() for i, r in enumerate(self._rounding) if r is not None and r.scale is not None}
        assert self.files is not None  # the rows lie in them
        self.files.save_scales(scales)

    def _restore(self) -> None:
        assert self.files is not None  # the rows lie in them
        for i, state in self.files.scales.items():
            rounding = self._rounding[int(i)]
            assert rounding is not None  # the files are of columns like these
            rounding.load(state)
        entries = self.files.entries
        if not len(entries):
            return
        rows = entries[:, 1] & ((1 << ORIGIN_BIT) - 1)
        self._row_of[entries[:, 0]] = rows.to(torch.int32)
        self._origin[entries[:, 0]] = -(entries[:, 1] >> ORIGIN_BIT).to(torch.int16)
        # Rows that were written and never committed lie behind these, and are written again.
        self._used = int(rows.max()) + 1
        if self._padded:
            self._spans[rows] = entries[:, 2:]
            self._used_positions = int(entries[:, 2:].sum(1).max())


def _longer(tensor: Tensor, size: int) -> Tensor:
    longer = tensor.new_empty((size, *tensor.shape[1:]))
    longer[: len(tensor)] = tensor
    return longer
