"""Poison: stands in for a value that nobody should read, so that a read shows at once."""

from collections.abc import Sequence

import torch
from torch import Tensor


def poison(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """NaN of this shape (for integers the least value, for bool False), expanded from one element."""
    if dtype.is_floating_point or dtype.is_complex:
        value = float("nan")
    else:
        value = 0 if dtype in (torch.bool, torch.uint8) else torch.iinfo(dtype).min
    return torch.full((), value, dtype=dtype, device=device).expand(tuple(shape))
