"""One fused convolution on a GPU and the ways to run it: cuDNN with a pass behind it, cuDNN's own fusions, Triton."""

import math
from collections.abc import Hashable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import Rows

PLAIN, CUDNN = "plain", "cudnn"


def is_triton_conv(module: nn.Conv2d) -> bool:
    """Whether the 1x1 and 3x3 kernels compute this convolution."""
    if module.groups != 1 or module.stride[0] != module.stride[1]:
        return False
    size, padding = module.kernel_size, module.padding
    return (size, padding) == ((1, 1), (0, 0)) or ((size, padding) == ((3, 3), (1, 1)) and module.dilation == (1, 1))


class Constants(NamedTuple):
    """The folded weight, channels-last [K, C, kh, kw]; the bias [K] in float32, and in the weight's dtype."""

    weight: Tensor
    bias: Tensor | None
    bias_like: Tensor | None
    ones: Tensor
    zeros: Tensor

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> "Constants":
        k = weight.shape[0]
        return cls(
            weight.to(dtype).contiguous(memory_format=torch.channels_last),
            None if bias is None else bias.float(),
            None if bias is None else bias.to(dtype),
            torch.ones(k, device=weight.device),
            torch.zeros(k, device=weight.device),
        )


@dataclass
class ConvCall:
    """out = relu?(conv(relu(scale * x + shift)) + bias + residual), second = relu(scale' * out + shift').

    Args:
        ops: the kernels, `freezeout_ext.kernels` or what has its names.
        shape: of the result, and of the residual.
        out: where the result must lie (a slice of a block), None: in new memory.
    """

    ops: Any
    module: nn.Conv2d
    x: Tensor
    shape: tuple[int, int, int, int]
    constants: Constants
    prologue: tuple[Tensor, Tensor] | None
    residual: Tensor | None
    relu: bool
    second: tuple[Tensor, Tensor] | None
    out: Tensor | None
    tf32: bool

    def run(self, way: Hashable) -> tuple[Tensor, ...]:
        """-> out, and the second output where there is one."""
        if way == PLAIN:
            return self._plain()
        if way == CUDNN:
            return self._cudnn()
        return self._triton(way)

    def way(self) -> Hashable:
        """-> the fastest way for this shape, layout and fusion, measured once in the process. Writes `out`."""
        ways = self.ways()
        if len(ways) == 1:
            return PLAIN
        ends = slice(None, None, max(self.x.shape[0] - 1, 1))  # the first and the last image

        def run(way: Hashable) -> list[Tensor]:
            return [result[ends] for result in self.run(way)]

        return self.ops.choose(
            self._key(ways),
            {way: partial(run, way) for way in ways},
            outputs=[] if self.out is None else [self.out],
            expected=lambda: self.expected(ends),
            tolerance=self.ops.tolerance(self.x.dtype, self.tf32),
            scratch=lambda: [self._new(shape) for shape in {tuple(self.shape), tuple(self.x.shape)}],
        )

    def ways(self) -> list[Hashable]:
        if not is_triton_conv(self.module):
            return [PLAIN]
        fused = ("cudnn_convolution_relu", "cudnn_convolution_add_relu")
        by_cudnn = self.relu and self.x.is_cuda and all(hasattr(torch, name) for name in fused)
        k, c = self.constants.weight.shape[:2]
        by_triton = self.ops.configs(c, k, self.module.kernel_size[0], self.x.dtype, self.tf32)
        return [PLAIN, *([CUDNN] if by_cudnn else []), *by_triton]

    def expected(self, images: slice) -> list[Tensor]:
        """The results for some of the images by the reference of the Triton kernel."""
        x = self.x[images]
        wanted = torch.empty((len(x), *self.shape[1:]), dtype=torch.float64, device=x.device)
        second = None if self.second is None else (*self.second, torch.empty_like(wanted))
        self.ops.conv2d_reference(
            x, self.constants.weight, stride=self.module.stride[0], prologue=self.prologue, bias=self.constants.bias,
            residual=None if self.residual is None else self.residual[images],
            relu=self.relu, out=wanted, second=second,
        )  # fmt: skip
        return [wanted] if second is None else [wanted, second[2]]

    def _plain(self) -> tuple[Tensor, ...]:
        """cuDNN without a bias (torch adds it in a pass of its own), then one pass for all that is left."""
        conv, bias, ops = self.module, self.constants.bias, self.ops
        y = F.conv2d(
            self._operand(), self.constants.weight, None, conv.stride, conv.padding, conv.dilation, conv.groups
        )
        y = y.contiguous(memory_format=torch.channels_last)
        out = y if self.out is None else self.out
        if self.second is not None and bias is None and not self.relu:
            second = torch.empty_like(y, memory_format=torch.channels_last)
            ops.affine_relu(y, *self.second, residual=self.residual, out=second, out_sum=out)
            return out, second
        if bias is not None or self.residual is not None or self.relu:
            shift = self.constants.zeros if bias is None else bias
            ops.affine_relu(y, self.constants.ones, shift, residual=self.residual, relu=self.relu, out=out)
        elif out is not y:
            out.copy_(y)
        return self._with_second(out)

    def _cudnn(self) -> tuple[Tensor, ...]:
        conv, operand = self.module, self._operand()
        geometry: tuple[Any, ...] = (self.constants.bias_like, conv.stride, conv.padding, conv.dilation, conv.groups)
        if self.residual is not None:
            y = torch.cudnn_convolution_add_relu(operand, self.constants.weight, self.residual, 1.0, *geometry)
        else:
            # It adds 0 times its own unwritten result (ATen/native/cudnn/ConvShared.cpp), NaN where cuDNN reads that:
            # `choose` then rejects it.
            y = torch.cudnn_convolution_relu(operand, self.constants.weight, *geometry)
        return self._with_second(y if self.out is None else self.out.copy_(y))

    def _triton(self, config: Any) -> tuple[Tensor, ...]:
        out = self._new(self.shape) if self.out is None else self.out
        second = None if self.second is None else (*self.second, self._new(self.shape))
        self.ops.conv2d(
            self.x, self.constants.weight, stride=self.module.stride[0], prologue=self.prologue,
            bias=self.constants.bias, residual=self.residual, relu=self.relu, second=second, tf32=self.tf32,
            config=config, out=out,
        )  # fmt: skip
        return (out,) if second is None else (out, second[2])

    def _operand(self) -> Tensor:
        if self.prologue is None:
            return self.x
        return self.ops.affine_relu(self.x, *self.prologue, out=self._new(self.x.shape))

    def _with_second(self, out: Tensor) -> tuple[Tensor, ...]:
        if self.second is None:
            return (out,)
        return out, self.ops.affine_relu(out, *self.second, out=self._new(out.shape))

    def _new(self, shape: tuple[int, ...]) -> Tensor:
        return torch.empty(shape, dtype=self.x.dtype, device=self.x.device, memory_format=torch.channels_last)

    def _key(self, ways: list[Hashable]) -> Hashable:
        images = (self.x, self.residual, self.out)
        layouts = tuple(None if t is None else _layout_class(t) for t in images)
        given = (self.prologue is not None, self.constants.bias is not None, self.relu, self.second is not None)
        return (
            "fused conv", tuple(self.x.shape), tuple(self.constants.weight.shape), self.module.stride, self.x.dtype,
            self.tf32, str(self.x.device), layouts, given, tuple(ways),
        )  # fmt: skip


def _layout_class(image: Tensor) -> tuple:
    """Whether dense, and how aligned. A block's buffer grows with each frontier, its alignment does not."""
    rows = Rows.of("image", image)
    return rows.stride == image.shape[1], math.gcd(16, rows.stride), rows.skip % 16
