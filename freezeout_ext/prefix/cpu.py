"""Ops on the CPU: oneDNN's fused convolutions on packed weights, channels-last.

The fused convolutions are private to torch (torch._inductor uses them). Where torch lacks one, the plain convolution
runs and `fallbacks` says so. Nothing is compiled at run time.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import native
from .engine import CHANNELS_LAST, Engine, Run, pixel_stride
from .program import Add, Affine, Call, Conv, Program

# Each layer reads or writes a dense block's whole buffer. A buffer of this many images stays in the cache
# (DenseNet-76-12, half its layers, batch 64, one thread: 0.8 of the time in one go).
DENSE_IMAGES = 16


def fused_convolutions() -> str | None:
    """None where torch has oneDNN's fused convolutions, else what is missing."""
    if not torch.backends.mkldnn.is_available():
        return "this torch was built without oneDNN"
    for name in ("_convolution_pointwise", "_convolution_pointwise_"):
        if not hasattr(torch.ops.mkldnn, name):
            return f"torch.ops.mkldnn.{name} is not in torch {torch.__version__}"
    if not hasattr(torch._C._nn, "mkldnn_reorder_conv2d_weight"):
        return f"torch._C._nn.mkldnn_reorder_conv2d_weight is not in torch {torch.__version__}"
    return None


def unsupported_dtype(dtype: torch.dtype) -> str | None:
    """None where this processor computes convolutions in `dtype` natively, else why not."""
    if dtype == torch.float32:
        return None
    ask = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}.get(dtype)
    if ask is None:
        return f"oneDNN has no convolution in {dtype}"
    if not hasattr(torch.ops.mkldnn, ask) or not getattr(torch.ops.mkldnn, ask)():
        return f"this processor has no {str(dtype).removeprefix('torch.')} arithmetic (AVX-512 or AMX) for oneDNN"
    return None


class CpuEngine(Engine):
    """(y,) = program(*inputs) on the CPU: see Engine."""

    def __init__(self, program: Program, **given: Any) -> None:
        super().__init__(program, **given)
        self._affine_op = getattr(native.C, "affine_relu", None)
        if self._affine_op is None and any(isinstance(op, Affine) for op in program.ops):
            self.notes.append(f"affines run in torch: {native.import_error or 'the compiled half has no affine_relu'}")
        missing = fused_convolutions() or unsupported_dtype(self.dtype)
        self._fused = missing is None
        if missing is not None and any(isinstance(op, Conv) for op in program.ops):
            self.notes.append(f"convolutions run unfused: {missing}")
        # A convolution writes its sum into what it adds, if that is needed no more and no stranger has a view of it.
        made = {op.out for op in self.ops if isinstance(op, Add | Conv)} - self.places.keys()
        made -= {value for op in self.ops if isinstance(op, Call) for value in op.inputs()}
        last = zip(self.ops, self.dead_after, strict=True)
        self._sums_in_place = {
            op.out for op, dead in last if isinstance(op, Conv) and op.add in made.intersection(dead) - {op.x}
        }
        # Whether each image of y depends on one image alone.
        apart = all(not isinstance(op, Call) or op.any_layout for op in program.ops) and len(program.inputs) == 1
        self._in_parts = bool(self.joined) and apart

    def __call__(self, *inputs: Tensor) -> tuple[Tensor]:
        if self._in_parts and inputs[0].dim() == 4 and len(inputs[0]) > DENSE_IMAGES:
            return (torch.cat([self.whole(x) for x in inputs[0].split(DENSE_IMAGES)]),)
        return (self.whole(*inputs),)

    def whole(self, *inputs: Tensor) -> Tensor:
        """-> y for a batch in one go."""
        return self.finish(self.run(inputs))

    # Ops

    def affine(self, op: Affine, state: Run) -> tuple[Tensor]:
        x = self.image(state.values[op.x])
        images = x.dim() == 4 and pixel_stride(x) and x.dtype in (torch.float32, torch.bfloat16)
        if self._affine_op is None or not images:
            return super().affine(op, state)
        scale, shift = self.affine_constants(op)
        y = self.target(op.out, x.shape, state)
        n, c, h, w = x.shape
        self._affine_op(
            x.data_ptr(), y.data_ptr(), scale.data_ptr(), shift.data_ptr(), rows=n * h * w, channels=c,
            x_stride=pixel_stride(x), y_stride=pixel_stride(y), relu=op.relu,
            dtype=str(x.dtype).removeprefix("torch."), threads=torch.get_num_threads(),
        )  # fmt: skip
        return (y,)

    def conv(self, op: Conv, state: Run) -> tuple[Tensor]:
        x = self.image(state.values[op.x])
        conv: Any = op.module
        if not self._fused or x.dim() != 4:
            weight, bias = self._packed(op, x, packed=False)
            y = F.conv2d(x, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)
            y = y if op.add is None else y + self.image(state.values[op.add])
            return (y.relu_() if op.relu else y,)
        weight, bias = self._packed(op, x, packed=True)
        geometry = (list(conv.padding), list(conv.stride), list(conv.dilation), conv.groups)
        relu, run = "relu" if op.relu else None, torch.ops.mkldnn._convolution_pointwise
        added = self.residual(op, op.shape(x), state)
        if added is None:
            return (run(x, weight, bias, *geometry, relu or "none", [], ""),)
        added = added.contiguous(memory_format=CHANNELS_LAST)
        if op.out in self._sums_in_place:
            run = torch.ops.mkldnn._convolution_pointwise_
            return (run.binary(added, x, weight, bias, *geometry, "add", 1.0, relu, [], None),)
        return (run.binary(x, added, weight, bias, *geometry, "add", 1.0, relu, [], None),)

    def _packed(self, op: Conv, x: Tensor, *, packed: bool) -> tuple[Tensor, Tensor | None]:
        key = op.out, x.dtype, tuple(x.shape[2:]) if packed else None
        if key not in self.weights:
            weight, bias = op.folded()
            weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
            if packed:
                conv: Any = op.module
                reorder: Any = torch._C._nn.mkldnn_reorder_conv2d_weight  # declared with fewer arguments
                geometry = (conv.padding, conv.stride, conv.dilation, conv.groups)
                weight = reorder(weight.contiguous().to_mkldnn(), *geometry, list(x.shape))
            self.weights[key] = (weight, bias)
        return self.weights[key]
