"""Ops on a GPU: fused convolutions and affines on channels-last images, replayed as a CUDA graph.

The first call of a shape launches kernel by kernel and measures nothing. The second call in a row measures the ways to
run each convolution, once in the process, and captures the graph. So an odd last batch costs neither.
"""

from collections.abc import Hashable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .. import kernels
from .cuda_conv import PLAIN, Constants, ConvCall, is_triton_conv
from .engine import Engine, Run
from .graphs import Graphs, capturing, shape_key
from .judge import Refused
from .program import Affine, Conv, Op, Program


class CudaEngine(Engine):
    """(y,) = program(*inputs) on a GPU: see Engine. Sums and affines are float32.

    Args:
        ops: the kernels. Tests give the references.

    Raises:
        Refused: the kernels do not compute in this dtype.
    """

    padding = 16  # each pixel then starts on a 16-byte boundary, for any dtype and any slice of 8 bytes

    def __init__(self, program: Program, *, dtype: torch.dtype, ops: Any = kernels, **given: Any) -> None:
        if dtype not in kernels.DTYPES:
            raise Refused(f"the GPU kernels compute in bfloat16, float16 and float32, not in {dtype}")
        super().__init__(program, dtype=dtype, **given)
        self.kernels = ops
        self.tf32 = dtype == torch.float32 and uses_tf32()
        # TF32 rounds operands to float16's 11 bits, here other ones than in eager: the BatchNorms are in them.
        self.tolerance = 2e-2 if self.tf32 else 0.0
        self.ways: dict[int, Hashable] = {}  # how each convolution ran the last time that Python ran it, by value
        self._measured: set[Hashable] = set()
        self._graphs = Graphs()

    def fuse(self, program: Program) -> list[Op]:
        return fuse(program)

    @property
    def bytes_held(self) -> int:
        return super().bytes_held + self._graphs.bytes

    @property
    def fallbacks(self) -> list[str]:
        return self.notes + self._graphs.fallbacks

    def fused(self) -> dict[str, int]:
        return {"CUDA graph": self._graphs.count} | super().fused()

    def __call__(self, *inputs: Tensor) -> tuple[Tensor]:
        if capturing(inputs):  # of the whole training step, by the user
            measured = shape_key(inputs) in self._measured
            return (self.finish(*(self.run_measured if measured else self.run_plain)(*inputs)),)
        outputs = self._graphs(self.run_measured, inputs, prepare=lambda: self._prepare(inputs))
        return (self.finish(*(outputs or self.run_plain(*inputs))),)

    def run_plain(self, *inputs: Tensor) -> tuple[Tensor]:
        """-> y, every convolution by the way that needs no measurement."""
        return (self.run(inputs, lambda call: PLAIN),)

    def run_measured(self, *inputs: Tensor) -> tuple[Tensor]:
        """-> y, every convolution by the fastest way for its shape."""
        return (self.run(inputs, ConvCall.way),)

    def run(self, inputs: tuple[Tensor, ...], way: Any = None) -> Tensor:
        with torch.cuda.device_of(inputs[0]):  # Triton launches on the current device
            return super().run(inputs, way)

    def _prepare(self, inputs: tuple) -> None:
        """Measures what is new in these shapes and compares the result with the plain one."""
        limit = 4 * self.kernels.tolerance(self.dtype, self.tf32)
        found, want = (self.finish(*run(*inputs)) for run in (self.run_measured, self.run_plain))
        if want.is_floating_point() and want.numel():
            difference = (found.double() - want.double()).abs().max()
            error = (difference / want.double().abs().max().clamp_min(1e-30)).item()
            if not error <= limit:
                raise RuntimeError(f"the fused convolutions are off by {error:.1e} together, allowed {limit:.0e}")
        self._measured.add(shape_key(inputs))

    # Ops

    def conv(self, op: Conv, state: Run) -> tuple[Tensor, ...]:
        x = self.image(state.values[op.x])
        if x.dim() != 4:
            raise TypeError(f"{type(op.module).__name__} was given {x.dim()} dimensions, expected a batch of images")
        assert state.way is not None  # see `run`
        shape = op.shape(x)
        if op.out not in self.weights:
            self.weights[op.out] = Constants.of(*op.folded(), self.dtype)
        call = ConvCall(
            ops=self.kernels,
            module=op.module,
            x=x,
            shape=shape,
            constants=Constants(*self.weights[op.out]),
            prologue=None if op.before is None else self.affine_constants(op.before),
            residual=self.residual(op, shape, state),
            relu=op.relu,
            second=None if op.after is None else self.affine_constants(op.after),
            out=self.place_of(op.out, shape, state),
            tf32=self.tf32,
        )
        self.ways[op.out] = state.way(call)
        return call.run(self.ways[op.out])

    def affine(self, op: Affine, state: Run) -> tuple[Tensor]:
        x = self.image(state.values[op.x])
        if x.dim() != 4:
            return super().affine(op, state)
        out = self.target(op.out, x.shape, state)
        return (self.kernels.affine_relu(x, *self.affine_constants(op), relu=op.relu, out=out),)


def fuse(program: Program) -> list[Op]:
    """-> what a GPU runs: affines with a ReLU inside the 1x1 convolution behind them, or the convolution in front."""
    uses = program.uses()
    ops = {op.out: replace(op) for op in program.ops}
    for op in list(ops.values()):
        if isinstance(op, Conv) and op.module.kernel_size == (1, 1) and is_triton_conv(op.module):
            before = ops.get(op.x)
            if isinstance(before, Affine) and before.relu and uses[before.out] == 1:
                op.before, op.x = before, before.x
                del ops[before.out]
    for op in list(ops.values()):
        conv = ops.get(op.x) if isinstance(op, Affine) and op.relu else None
        if isinstance(op, Affine) and isinstance(conv, Conv) and conv.after is None:
            conv.after = op
            del ops[op.out]
    return list(ops.values())


def uses_tf32() -> bool:
    """Whether cuDNN's float32 convolutions run in TF32 now."""
    settings: Any = getattr(torch.backends.cudnn, "conv", None)
    if hasattr(settings, "fp32_precision"):
        return settings.fp32_precision == "tf32"
    return torch.backends.cudnn.allow_tf32
