"""Column: one kept tensor of a sample: its shape and dtype, as computed and as it is stored."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

KEPT_DTYPES = (None, torch.bfloat16, torch.float16, torch.int8)


@dataclass(frozen=True)
class Column:
    """One kept tensor of a sample.

    shape: of a row; its first number is 0 where that dimension is the sample's length, which differs.
    dtype: as computed.
    order: the dimensions of a row as they lie in memory, so that a gathered batch has the strides of a computed one.
    kept: the dtype of what is stored, None for `dtype`.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    order: tuple[int, ...]
    kept: torch.dtype | None = None
    padded: bool = False

    @classmethod
    def like(cls, batch: Tensor, kept: torch.dtype | None = None, *, padded: bool = False) -> "Column":
        """The column of one tensor [B, ...]; floating-point ones are stored as `kept`."""
        dims = range(batch.dim() - 1)
        order = tuple(dims) if padded else tuple(sorted(dims, key=lambda d: -batch.stride(d + 1)))
        shape = (0, *batch.shape[2:]) if padded else tuple(batch.shape[1:])
        return cls(shape, batch.dtype, order, kept if batch.is_floating_point() else None, padded)

    @cached_property
    def back(self) -> tuple[int, ...]:
        """The permutation of a gathered batch, as it lies in memory, that makes it one as computed."""
        return 0, *(d + 1 for d in sorted(range(len(self.order)), key=self.order.__getitem__))

    @property
    def stored(self) -> torch.dtype:
        return self.kept or self.dtype

    @property
    def unit(self) -> tuple[int, ...]:
        """The shape of what is stored at once: a row, or one position of it where rows differ in length."""
        return self.shape[1:] if self.padded else tuple(self.shape[d] for d in self.order)

    @property
    def unit_bytes(self) -> int:
        count = 1
        for size in self.unit:
            count *= size
        return count * self.stored.itemsize

    def row_bytes(self, length: int = 1) -> int:
        """Bytes of a row (of this length, where rows differ in it), an int8 row's own factor included."""
        return self.unit_bytes * (length if self.padded else 1) + (4 if self.kept is torch.int8 else 0)


def row_bytes_of(columns: Sequence[Column], length: int = 1) -> int:
    """-> bytes of a row of all columns, of this length where rows differ in it."""
    return sum(column.row_bytes(length) for column in columns)
