"""1x1 and 3x3 convolutions of channels-last images, with what comes before and after them in the same kernel."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from .layout import (
    Rows,
    check_affine,
    check_input,
    check_tensor,
    multiple,
    relu,
    vector_width,
)

Affine = tuple[Tensor, Tensor]  # scale, shift: float32, one a channel
Second = tuple[Tensor, Tensor, Tensor]  # scale, shift, the image to write


class Config(NamedTuple):
    """The block shapes of one launch: pixels, output channels, input channels a step."""

    block_p: int
    block_k: int
    block_c: int
    num_stages: int = 3
    num_warps: int = 4


@triton.jit(
    do_not_specialize=[
        "n_pixels", "n_in", "n_out", "height", "width", "height_out", "width_out", "skip_x", "stride_x",
        "skip_residual", "stride_residual", "skip_y", "stride_y", "skip_second", "stride_second",
    ]
)  # fmt: skip
def _conv_kernel(
    p_x,  # [N * height * width, n_in], rows of stride_x
    p_weight,  # [n_out, KERNEL, KERNEL, n_in]
    p_in_scale, p_in_shift,  # [n_in] float32, or None
    p_bias,  # [n_out] float32, or None
    p_residual,  # as y, or None
    p_y,  # [n_pixels, n_out], n_pixels = N * height_out * width_out
    p_scale, p_shift,  # [n_out] float32, or None
    p_second,  # as y, or None
    n_pixels, n_in, n_out, height, width, height_out, width_out,
    skip_x, stride_x, skip_residual, stride_residual, skip_y, stride_y, skip_second, stride_second,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    RELU: tl.constexpr,
    PRECISION: tl.constexpr,  # of a float32 product: "ieee" or "tf32"
    UPCAST: tl.constexpr,  # the interpreter multiplies bfloat16 wrongly
    VEC_IN: tl.constexpr,
    VEC_OUT: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    n_in = multiple(n_in, VEC_IN)
    n_out = multiple(n_out, VEC_OUT)
    n_blocks_k = tl.cdiv(n_out, BLOCK_K)
    i_p = tl.program_id(0) // n_blocks_k * BLOCK_P + tl.arange(0, BLOCK_P)
    i_k = tl.program_id(0) % n_blocks_k * BLOCK_K + tl.arange(0, BLOCK_K)
    in_k = i_k < n_out
    i_image = i_p // (height_out * width_out)
    i_h = i_p // width_out % height_out * STRIDE - KERNEL // 2
    i_w = i_p % width_out * STRIDE - KERNEL // 2
    i_h = tl.where(i_p < n_pixels, i_h, height)  # outside, at every tap
    i_first_tap = (i_image * height + i_h) * width + i_w

    b_acc = tl.zeros((BLOCK_P, BLOCK_K), tl.float32)
    # One loop, so that loads are pipelined across taps and channel blocks: all taps of a channel block in a row, while
    # the caches hold it. Its divisors are constants: no division is left in a step.
    for i_step in range(KERNEL * KERNEL * tl.cdiv(n_in, BLOCK_C)):
        i_tap = i_step % (KERNEL * KERNEL)
        i_c = i_step // (KERNEL * KERNEL) * BLOCK_C + tl.arange(0, BLOCK_C)
        in_c = i_c < n_in
        i_y = i_h + i_tap // KERNEL
        i_x = i_w + i_tap % KERNEL
        inside = (i_y >= 0) & (i_y < height) & (i_x >= 0) & (i_x < width)
        i_pixel = (i_first_tap + (i_tap // KERNEL * width + i_tap % KERNEL)).to(tl.int64)
        at_x = multiple(skip_x, VEC_IN) + i_pixel * multiple(stride_x, VEC_IN)
        b_x = tl.load(p_x + at_x[:, None] + i_c[None, :], mask=inside[:, None] & in_c[None, :], other=0.0)
        if p_in_scale is not None:
            b_scale = tl.load(p_in_scale + i_c, mask=in_c, other=0.0)
            b_shift = tl.load(p_in_shift + i_c, mask=in_c, other=0.0)
            b_x = relu(b_x.to(tl.float32) * b_scale[None, :] + b_shift[None, :]).to(b_x.dtype)
        at_weight = (i_k * (KERNEL * KERNEL) + i_tap) * n_in
        b_weight = tl.load(p_weight + at_weight[None, :] + i_c[:, None], mask=in_k[None, :] & in_c[:, None], other=0.0)
        if UPCAST:
            b_x = b_x.to(tl.float32)
            b_weight = b_weight.to(tl.float32)
        b_acc = tl.dot(b_x, b_weight, b_acc, input_precision=PRECISION)

    inside_y = (i_p < n_pixels)[:, None] & in_k[None, :]
    i_row = i_p.to(tl.int64)
    if p_bias is not None:
        b_acc += tl.load(p_bias + i_k, mask=in_k, other=0.0)[None, :]
    if p_residual is not None:
        at_residual = multiple(skip_residual, VEC_OUT) + i_row * multiple(stride_residual, VEC_OUT)
        b_acc += tl.load(p_residual + at_residual[:, None] + i_k[None, :], mask=inside_y, other=0.0).to(tl.float32)
    if RELU:
        b_acc = relu(b_acc)
    at_y = multiple(skip_y, VEC_OUT) + i_row * multiple(stride_y, VEC_OUT)
    tl.store(p_y + at_y[:, None] + i_k[None, :], b_acc.to(p_y.dtype.element_ty), mask=inside_y)
    if p_second is not None:
        b_scale = tl.load(p_scale + i_k, mask=in_k, other=0.0)
        b_shift = tl.load(p_shift + i_k, mask=in_k, other=0.0)
        b_second = relu(b_acc * b_scale[None, :] + b_shift[None, :])
        at_second = multiple(skip_second, VEC_OUT) + i_row * multiple(stride_second, VEC_OUT)
        tl.store(p_second + at_second[:, None] + i_k[None, :], b_second.to(p_second.dtype.element_ty), mask=inside_y)


def conv2d(
    x: Tensor,  # [N, C, H, W]
    weight: Tensor,  # [K, C, size, size], channels-last; size 1 or 3
    *,
    out: Tensor,  # [N, K, H', W'], H' = ceil(H / stride)
    stride: int = 1,
    prologue: Affine | None = None,  # [C] each
    bias: Tensor | None = None,  # [K] float32
    residual: Tensor | None = None,  # as out
    relu: bool = False,
    second: Second | None = None,  # [K], [K], as out
    tf32: bool = False,
    config: Config,
) -> Tensor:
    """out = relu(conv2d(relu(scale * x + shift)) + bias + residual), out_second = relu(scale' * out + shift').

    The padding of conv2d is size // 2. Prologue, bias, residual, relu and second each only where given. Sums are
    float32. Images are of one dtype, channels-last or channel slices of channels-last buffers.

    Args:
        out: may be `residual`, or another slice of x's buffer.
        prologue: of a 1x1 convolution: a 3x3 one would run it nine times an element, and its zeros come behind it. The
            result is rounded to x's dtype, as in memory.
        second: is computed from the unrounded first output.
        tf32: float32 images multiply in TF32, else in float32.
        config: one of `configs`, compared with the reference before it is used (`choose`).

    Raises:
        ValueError: a shape, dtype, device or layout that is not as stated.
    """
    _check(x, weight, out, stride, config, prologue, bias, residual, second)
    if out.numel() == 0:
        return out
    n, c, h, w = x.shape
    k, size = weight.shape[0], weight.shape[2]
    r_x, r_y = Rows.of("x", x), Rows.of("out", out)
    r_residual = None if residual is None else Rows.of("residual", residual)
    r_second = None if second is None else Rows.of("second out", second[2])
    none = Rows(None, 0, 0)
    h_out, w_out = out.shape[2:]
    n_pixels = n * h_out * w_out
    in_scale, in_shift = prologue or (None, None)
    scale, shift = second[:2] if second else (None, None)
    grid = (triton.cdiv(n_pixels, config.block_p) * triton.cdiv(k, config.block_k),)
    _conv_kernel[grid](
        r_x.base, weight, in_scale, in_shift, bias, (r_residual or none).base, r_y.base, scale, shift,
        (r_second or none).base, n_pixels, c, k, h, w, h_out, w_out,
        *r_x[1:], *(r_residual or none)[1:], *r_y[1:], *(r_second or none)[1:],
        KERNEL=size, STRIDE=stride, RELU=relu, PRECISION="tf32" if tf32 else "ieee",
        UPCAST=triton.knobs.runtime.interpret and x.dtype == torch.bfloat16,
        VEC_IN=vector_width(c, r_x), VEC_OUT=vector_width(k, r_y, r_residual, r_second),
        BLOCK_P=config.block_p, BLOCK_K=config.block_k, BLOCK_C=config.block_c,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return out


def _check(
    x: Tensor,
    weight: Tensor,
    out: Tensor,
    stride: int,
    config: Config,
    prologue: Affine | None,
    bias: Tensor | None,
    residual: Tensor | None,
    second: Second | None,
) -> None:
    check_input(x)
    n, c, h, w = x.shape
    size = 3 if weight.shape[-1] == 3 else 1
    k, h_out, w_out = weight.shape[0], (h - 1) // stride + 1, (w - 1) // stride + 1
    check_tensor("weight", weight, (k, c, size, size), x.dtype, x.device)
    if not weight.is_contiguous(memory_format=torch.channels_last):
        raise ValueError(f"weight must be contiguous in channels_last, got strides {weight.stride()}")
    for name, image in (("out", out), ("residual", residual), ("second out", second and second[2])):
        if image is not None:
            check_tensor(name, image, (n, k, h_out, w_out), x.dtype, x.device)
    if prologue is not None and size == 3:
        raise ValueError("prologue must be None of a 3x3 convolution")
    for name, affine, channels in (("prologue", prologue, c), ("second", second and second[:2], k)):
        if affine is not None:
            check_affine(name, affine, channels, x.device)
    if bias is not None:
        check_tensor("bias", bias, (k,), torch.float32, x.device)
    # https://github.com/pytorch/pytorch/issues/173068
    if config.num_warps > 4:
        raise ValueError(f"config must have num_warps <= 4 (3x3 convs with 8 were miscompiled), got {config}")


def conv2d_reference(
    x: Tensor,
    weight: Tensor,
    *,
    out: Tensor,
    stride: int = 1,
    prologue: Affine | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    relu: bool = False,
    second: Second | None = None,
) -> Tensor:
    """out = relu(conv2d(relu(scale * x + shift)) + bias + residual), out_second = relu(scale' * out + shift').

    float64 inside, but the prologue's result as it is in memory.
    """
    if prologue is not None:
        scale, shift = prologue
        x = (x.float() * scale[:, None, None] + shift[:, None, None]).relu().to(x.dtype)
    y = F.conv2d(x.double(), weight.double(), stride=stride, padding=weight.shape[-1] // 2)
    if bias is not None:
        y = y + bias.double()[:, None, None]
    if residual is not None:
        y = y + residual.double()
    y = y.relu() if relu else y
    if second is not None:
        scale, shift, out_second = second
        out_second.copy_((y * scale.double()[:, None, None] + shift.double()[:, None, None]).relu())
    return out.copy_(y)


def configs(n_in: int, n_out: int, size: int, dtype: torch.dtype, tf32: bool) -> list[Config]:
    """The candidates for a `size` x `size` conv of n_in to n_out channels: few, since each is compiled and timed."""
    block_k = min(64, max(16, triton.next_power_of_2(n_out)))
    block_c = min(32, max(16, triton.next_power_of_2(n_in)))
    if dtype == torch.float32 and not tf32:
        return [Config(64, min(32, block_k), 16)]
    if dtype == torch.float32:
        return [Config(128, block_k, block_c, 3), Config(64, block_k, 16)]
    found = [Config(128, block_k, block_c, 4), Config(64, block_k, block_c, 4)]
    if n_out > 64:
        found.append(Config(64, 128, 32, 4))
    if size == 1 and 0 < n_in % 32 <= 16 < n_in:
        found.append(Config(128, block_k, 16, 4))  # spares half of a last block
    if size == 3 and n_in > 32 and block_k > 16:  # few output channels leave the tensor cores idle anyway
        found.append(Config(128, block_k, 64, 3))
    return found
