"""BatchNorm with constant statistics, add and ReLU in one pass over channels-last images."""

import triton
import triton.language as tl
from torch import Tensor

from .layout import Rows, check_affine, check_input, check_tensor, multiple, relu, vector_width

BLOCK = 4096  # elements a program: 32 a thread, four 16-byte loads in flight in bfloat16


@triton.jit(
    do_not_specialize=[
        "n_pixels", "n_channels", "skip_x", "stride_x", "skip_residual", "stride_residual",
        "skip_y", "stride_y", "skip_sum", "stride_sum",
    ]
)  # fmt: skip
def _affine_relu_kernel(
    p_x,  # [n_pixels, n_channels], rows of stride_x
    p_scale,  # [n_channels] float32
    p_shift,  # [n_channels] float32
    p_residual,  # as x, or None
    p_y,  # as x
    p_sum,  # as x, or None
    n_pixels, n_channels,
    skip_x, stride_x, skip_residual, stride_residual, skip_y, stride_y, skip_sum, stride_sum,
    RELU: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    i_p = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    i_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_c = i_c < multiple(n_channels, VEC)
    inside = (i_p < n_pixels)[:, None] & in_c[None, :]
    b_scale = tl.load(p_scale + i_c, mask=in_c)
    b_shift = tl.load(p_shift + i_c, mask=in_c)
    at_x = multiple(skip_x, VEC) + i_p * multiple(stride_x, VEC)
    b_x = tl.load(p_x + at_x[:, None] + i_c[None, :], mask=inside).to(tl.float32)
    if p_residual is not None:
        at_residual = multiple(skip_residual, VEC) + i_p * multiple(stride_residual, VEC)
        b_x += tl.load(p_residual + at_residual[:, None] + i_c[None, :], mask=inside).to(tl.float32)
    if p_sum is not None:
        at_sum = multiple(skip_sum, VEC) + i_p * multiple(stride_sum, VEC)
        tl.store(p_sum + at_sum[:, None] + i_c[None, :], b_x.to(p_sum.dtype.element_ty), mask=inside)
    b_y = b_x * b_scale[None, :] + b_shift[None, :]
    if RELU:
        b_y = relu(b_y)
    at_y = multiple(skip_y, VEC) + i_p * multiple(stride_y, VEC)
    tl.store(p_y + at_y[:, None] + i_c[None, :], b_y.to(p_y.dtype.element_ty), mask=inside)


def affine_relu(
    x: Tensor,  # [N, C, H, W]
    scale: Tensor,  # [C] float32
    shift: Tensor,  # [C] float32
    *,
    out: Tensor,  # [N, C, H, W]
    residual: Tensor | None = None,  # [N, C, H, W]
    out_sum: Tensor | None = None,  # [N, C, H, W]
    relu: bool = True,
) -> Tensor:
    """out = relu(scale[c] * (x + residual) + shift[c]), out_sum = x + residual; one pass, float32 inside.

    All images are of one dtype, channels-last or channel slices of channels-last buffers. `out` and `out_sum` may be
    `x` or `residual`. A BatchNorm in eval mode is scale = gamma / sqrt(var + eps), shift = beta - mean * scale.

    Raises:
        ValueError: a shape, dtype, device or layout that is not as stated.
    """
    check_input(x)
    check_affine("affine", (scale, shift), x.shape[1], x.device)
    for name, image in (("out", out), ("residual", residual), ("out_sum", out_sum)):
        if image is not None:
            check_tensor(name, image, tuple(x.shape), x.dtype, x.device)
    if x.numel() == 0:
        return out
    n, c, h, w = x.shape
    r_x, r_y = Rows.of("x", x), Rows.of("out", out)
    r_residual = None if residual is None else Rows.of("residual", residual)
    r_sum = None if out_sum is None else Rows.of("out_sum", out_sum)
    block_c = min(64, triton.next_power_of_2(c))
    block_p = BLOCK // block_c
    grid = (triton.cdiv(n * h * w, block_p), triton.cdiv(c, block_c))
    none = Rows(None, 0, 0)
    _affine_relu_kernel[grid](
        r_x.base, scale, shift, (r_residual or none).base, r_y.base, (r_sum or none).base,
        n * h * w, c, *r_x[1:], *(r_residual or none)[1:], *r_y[1:], *(r_sum or none)[1:],
        RELU=relu, VEC=vector_width(c, r_x, r_residual, r_y, r_sum), BLOCK_P=block_p, BLOCK_C=block_c, num_warps=4,
    )  # fmt: skip
    return out


def affine_relu_reference(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    *,
    out: Tensor,
    residual: Tensor | None = None,
    out_sum: Tensor | None = None,
    relu: bool = True,
) -> Tensor:
    """out = relu(scale[c] * (x + residual) + shift[c]), out_sum = x + residual; float64 inside."""
    total = x.double() if residual is None else x.double() + residual.double()
    y = total * scale.double()[:, None, None] + shift.double()[:, None, None]
    if out_sum is not None:
        out_sum.copy_(total)
    return out.copy_(y.relu() if relu else y)
