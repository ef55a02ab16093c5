"""Channel slices of NHWC buffers: element (pixel, channel) is at base[skip + pixel * stride + channel]."""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class Rows(NamedTuple):
    """A channels-last image [N, C, H, W], or a channel slice of one, as a matrix of N * H * W rows."""

    base: Tensor | None  # None of no image; starts where the storage starts, so that its pointer is aligned to 16 bytes
    skip: int | torch.SymInt  # elements to channel 0 of pixel 0
    stride: int  # elements from one pixel to the next

    @classmethod
    def of(cls, name: str, x: Tensor) -> "Rows":
        n, c, h, w = x.shape
        strides = x.stride()
        known = [(n, strides[0], h * w), (h, strides[2], w), (w, strides[3], 1)]
        stride = next((s // pixels for size, s, pixels in reversed(known) if size > 1), c)
        if (c > 1 and strides[1] != 1) or any(size > 1 and s != stride * pixels for size, s, pixels in known):
            raise ValueError(
                f"{name} must be channels-last, or a channel slice of a channels-last buffer, "
                f"got shape {tuple(x.shape)} with strides {strides}"
            )
        return cls(x.as_strided((1,), (1,), 0), x.storage_offset(), stride)


def vector_width(channels: int, *rows: Rows | None) -> int:
    """gcd of 16, the channels, the skips and the strides: so many elements move in one access."""
    return math.gcd(16, channels, *(n for r in rows if r is not None for n in (r.skip, r.stride)))


def check_tensor(name: str, found: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    if tuple(found.shape) != shape or found.dtype != dtype or found.device != device:
        raise ValueError(
            f"{name} must have shape {shape}, {dtype}, on {device}, "
            f"got {tuple(found.shape)}, {found.dtype}, on {found.device}"
        )


def check_affine(name: str, affine: tuple[Tensor, Tensor], channels: int, device: torch.device) -> None:
    for part, vector in zip(("scale", "shift"), affine, strict=True):
        check_tensor(f"{name} {part}", vector, (channels,), torch.float32, device)


def check_input(x: Tensor) -> None:
    if x.dim() != 4 or x.dtype not in DTYPES:
        raise ValueError(f"x must be [N, C, H, W] in bfloat16, float16 or float32, got {tuple(x.shape)} in {x.dtype}")
    if not x.is_cuda and not triton.knobs.runtime.interpret:
        raise ValueError(f"x must be on a CUDA device (or TRITON_INTERPRET=1 set before the import), got {x.device}")


@triton.jit
def multiple(i, VEC: tl.constexpr):
    """i, which is a multiple of VEC: said in a way that the compiler's alignment analysis sees."""
    return i // VEC * VEC


@triton.jit
def relu(b_x):
    """max(x, 0), NaN where x is NaN, as torch has it."""
    return tl.maximum(b_x, 0.0, propagate_nan=tl.PropagateNan.ALL)
