"""Column: one kept tensor of a sample, as computed and as it is stored; ColumnRows: what is stored of it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .rounding import BOUNDS, Rounding
from .watch import Refused

KEPT_DTYPES = (None, torch.bfloat16, torch.float16, torch.int8)


@dataclass(frozen=True)
class Column:
    """One kept tensor of a sample."""

    shape: tuple[int, ...]  # of a row; its first number is 0 where that dimension is the sample's length
    dtype: torch.dtype  # as computed
    order: tuple[int, ...]  # of a row's dimensions in memory: a gathered batch has the strides of a computed one
    kept: torch.dtype | None = None  # the dtype of what is stored, None for `dtype`
    padded: bool = False  # whether rows differ in length

    @classmethod
    def like(cls, batch: Tensor, kept: torch.dtype | None = None, *, padded: bool = False) -> "Column":
        """The column of one tensor [B, ...]; floating-point ones are stored as `kept`."""
        dims = range(batch.dim() - 1)
        order = tuple(dims) if padded else tuple(sorted(dims, key=lambda d: -batch.stride(d + 1)))
        shape = (0, *batch.shape[2:]) if padded else tuple(batch.shape[1:])
        return cls(shape, batch.dtype, order, kept if batch.is_floating_point() else None, padded)

    def check(self, batch: Tensor) -> None:
        """
        Raises:
            Refused: the rows of a batch [B, ...] cannot be kept in this column.
        """
        tail = (0, *batch.shape[2:]) if self.padded else tuple(batch.shape[1:])
        if tail != self.shape or batch.dtype != self.dtype:
            raise Refused("its samples have another shape or dtype than those of the first one")
        if self.kept is torch.float16 and bool((batch.abs() > torch.finfo(torch.float16).max).any()):
            raise Refused("it has values above 65504, which float16 cannot hold: pass dtype=torch.bfloat16")

    @cached_property
    def back(self) -> tuple[int, ...] | None:
        """The permutation of a gathered batch, as it lies in memory, that makes it one as computed; None: none."""
        back = sorted(range(len(self.order)), key=self.order.__getitem__)
        return None if back == [*range(len(back))] else (0, *(d + 1 for d in back))

    @property
    def stored(self) -> torch.dtype:
        return self.kept or self.dtype

    @property
    def unit(self) -> tuple[int, ...]:
        """The shape of what is stored at once: a row, or one position of it where rows differ in length."""
        return self.shape[1:] if self.padded else tuple(self.shape[d] for d in self.order)

    @property
    def unit_bytes(self) -> int:
        return math.prod(self.unit) * self.stored.itemsize

    def row_bytes(self, length: int = 1) -> int:
        """Bytes of a row (of this length, where rows differ in it), an int8 row's own factor included."""
        return self.unit_bytes * (length if self.padded else 1) + (4 if self.kept is torch.int8 else 0)


def row_bytes_of(columns: Sequence[Column], length: int = 1) -> int:
    """-> bytes of a row of all columns, of this length where rows differ in it."""
    return sum(column.row_bytes(length) for column in columns)


def masked(rows: Tensor, lengths: Tensor) -> Tensor:
    """-> padded rows [B, L, ...] with 0 for padding; lengths int64 [B] on the CPU."""
    padding = torch.arange(rows.shape[1], device="cpu") >= lengths[:, None]
    return rows.masked_fill(padding.to(rows.device).view(*padding.shape, *[1] * (rows.dim() - 2)), 0)


class ColumnRows:
    """What is stored of one column, on one device: row behind row, or position behind position of rows that differ.

    Args:
        buffer: [R, *unit].
        factors: float32 [rows], of int8 rows; else [0].
    """

    def __init__(self, column: Column, buffer: Tensor, factors: Tensor) -> None:
        self.column, self.buffer, self.factors = column, buffer, factors
        self.rounding = Rounding(column.unit, channel_first=not column.padded) if column.kept is torch.int8 else None

    @property
    def bytes_taken(self) -> int:
        return self.buffer.nbytes + self.factors.nbytes

    def write(self, batch: Tensor, first: int, lengths: Tensor | None, position: int) -> None:
        """Stores the rows of a batch [B, ...] as rows first, first + 1, ...; padded ones from `position` on."""
        row_of, count = None, len(batch)
        if self.column.padded:
            assert lengths is not None  # of rows that differ in length
            batch = torch.cat([row[:length] for row, length in zip(batch, lengths.tolist(), strict=True)])
            row_of = torch.arange(count, device="cpu").repeat_interleave(lengths).to(batch.device)
        else:
            batch, position = self._as_it_lies(batch), first
        if self.rounding is not None:
            batch, factors = self.rounding.encode(batch, row_of, count)
            self.factors[first : first + count].copy_(factors)
        self.buffer[position : position + len(batch)].copy_(batch)

    def read(self, index: Tensor, places: tuple[Tensor, Tensor] | None, device: torch.device) -> Tensor:
        """-> rows [B, ...] as computed.

        Args:
            index: of the rows, on the device of the buffer.
            places: of rows that differ in length, positions [B, L] on the device of the buffer; and lengths [B] on the
                CPU.
        """
        column, per_row = self.column, 1
        if column.padded:
            assert places is not None  # of rows that differ in length
            positions, lengths = places
            per_row = positions.shape[1]
        found = self._selected(positions.flatten() if column.padded else index, device)
        if self.rounding is not None:
            factors = torch.index_select(self.factors, 0, index).to(device, non_blocking=True)
            found = self.rounding.decode(found, factors.repeat_interleave(per_row), column.dtype)
        elif found.dtype != column.dtype:
            found = found.to(column.dtype)
        if column.padded:
            return masked(found.view(len(index), per_row, *found.shape[1:]), lengths)
        return found if column.back is None else found.permute(column.back)

    def rounded(self, batch: Tensor, lengths: Tensor | None) -> Tensor:
        """-> a batch [B, ...] as it would be read back.

        Args:
            lengths: of rows that differ in length, on the CPU.
        """
        column, row_of = self.column, None
        if column.padded:
            assert lengths is not None  # of rows that differ in length
            batch = masked(batch, lengths)
        if self.rounding is None:
            return batch.to(column.stored).to(column.dtype)
        if column.padded:
            row_of = torch.arange(len(batch), device=batch.device).repeat_interleave(batch.shape[1])
        here = batch.flatten(0, 1) if column.padded else self._as_it_lies(batch)
        q, factors = self.rounding.encode(here, row_of, len(batch))
        here = self.rounding.decode(q, factors if row_of is None else factors[row_of], column.dtype)
        return here.view(batch.shape) if column.back is None else here.permute(column.back)

    def allowed(self, rows: Tensor, batch: Tensor) -> Tensor:
        """-> the largest difference [B] that rounding explains between the rows and the same ones computed."""
        column = self.column
        largest = batch.abs().flatten(1).amax(1).to(torch.float32) if batch.dim() > 1 else batch.abs()
        if self.rounding is not None:
            assert self.rounding.scale is not None  # its rows were written
            steps = self.factors[rows.to(self.factors.device)].to(batch.device)
            return steps * self.rounding.scale.max().to(batch.device) / 2 + BOUNDS[None] * largest
        if not column.dtype.is_floating_point:
            return largest * 0.0
        # What was computed in half precision differs by a unit where its kernel chose another order.
        return largest * max(BOUNDS[column.kept], 4 * torch.finfo(batch.dtype).eps)

    def _as_it_lies(self, batch: Tensor) -> Tensor:
        return batch.permute(0, *(d + 1 for d in self.column.order))

    def _selected(self, index: Tensor, device: torch.device) -> Tensor:
        if device.type != "cuda" or self.buffer.device.type != "cpu":
            return torch.index_select(self.buffer, 0, index).to(device)
        # torch reuses pinned memory once the copy from there has run.
        staged = torch.empty(
            (len(index), *self.buffer.shape[1:]), dtype=self.buffer.dtype, device="cpu", pin_memory=True
        )
        return torch.index_select(self.buffer, 0, index, out=staged).to(device, non_blocking=True)
