"""Ops on a GPU: fused convolutions and affines on channels-last images, replayed as a CUDA graph.

The first call of a shape launches kernel by kernel and measures nothing. The second call in a row measures the ways to
run each convolution, once in the process, and captures the graph. So an odd last batch costs neither.
"""

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import kernels
from .cuda_conv import PLAIN, Constants, ConvCall, is_triton_conv
from .engine import Engine, Run
from .graphs import Graphs, capturing, shape_key
from .judge import Refused
from .program import Affine, Call, Conv, Op, Program


@dataclass
class FusedConv(Op):
    """y = conv(before(x)) with conv's own add and ReLU, and after(y) beside it.

    `out` is y, `after.out` the second value.
    """

    conv: Conv
    before: Affine | None = None
    after: Affine | None = None

    def inputs(self) -> list[int]:
        first = self.conv.x if self.before is None else self.before.x
        return [first] if self.conv.add is None else [first, self.conv.add]

    def outs(self) -> list[int]:
        return [self.out] if self.after is None else [self.out, self.after.out]


@dataclass
class PooledAffine(Op):
    """y = avg_pool2x2(affine(x)), the affine with its ReLU."""

    affine: Affine

    def inputs(self) -> list[int]:
        return [self.affine.x]


class CudaEngine(Engine):
    """(y,) = program(*inputs) on a GPU: see Engine. Sums and affines are float32.

    Args:
        ops: the kernels. Tests give the references.

    Raises:
        Refused: the kernels do not compute in this dtype.
    """

    OPS: ClassVar = Engine.OPS | {FusedConv: "fused_conv", PooledAffine: "pooled_affine"}
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
        """How many ops of each kind there are, and how many convolutions run which way."""
        counts = {"CUDA graph": self._graphs.count} | super().fused()
        for way in self.ways.values():
            name = "by " + (way if isinstance(way, str) else "Triton")
            counts[name] = counts.get(name, 0) + 1
        return counts

    def name(self, op: Op) -> str:
        if isinstance(op, FusedConv):
            kernel = "conv{}x{}".format(*op.conv.module.kernel_size)
            name = "affine+relu+" * (op.before is not None) + super().name(op.conv).replace("conv", kernel)
            return name + " and affine+relu" * (op.after is not None)
        return "affine+relu+pool" if isinstance(op, PooledAffine) else super().name(op)

    def __call__(self, *inputs: Tensor) -> tuple[Tensor]:
        if capturing(inputs):  # of the whole training step, by the user
            measured = shape_key(inputs) in self._measured
            return (self.finish(*(self.run_measured if measured else self.run_plain)(*inputs)),)
        outputs = self._graphs(self.run_measured, inputs, prepare=lambda: self._prepare(inputs))
        return (self.finish(*(self.run_plain(*inputs) if outputs is None else outputs)),)

    def run_plain(self, *inputs: Tensor) -> tuple[Tensor]:
        """-> y, every convolution by the way that needs no measurement."""
        return self.run(inputs, lambda call: PLAIN)[:1]

    def run_measured(self, *inputs: Tensor) -> tuple[Tensor]:
        """-> y, every convolution by the fastest way for its shape."""
        return self.run(inputs, ConvCall.way)[:1]

    def run(self, inputs: tuple[Tensor, ...], way: Any = None) -> tuple[Tensor, bool]:
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

    def fused_conv(self, op: FusedConv, state: Run) -> tuple[Tensor, ...]:
        x, conv, before = self.image(state.values[op.inputs()[0]]), op.conv, op.before
        if x.dim() != 4:
            raise TypeError(f"{type(conv.module).__name__} was given {x.dim()} dimensions, expected a batch of images")
        assert state.way is not None  # see `run`
        call = ConvCall(
            ops=self.kernels,
            module=conv.module,
            x=x,
            shape=conv.shape(x),
            constants=self._constants(conv),
            prologue=None if before is None else self.affine_constants(before),
            residual=None if conv.add is None else self.image(state.values[conv.add]),
            relu=conv.relu,
            second=None if op.after is None else self.affine_constants(op.after),
            out=self.place_of(op.out, conv.shape(x), state),
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

    def pooled_affine(self, op: PooledAffine, state: Run) -> tuple[Tensor]:
        x = self.image(state.values[op.affine.x])
        n, c, h, w = x.shape
        out = self.target(op.out, (n, c, h // 2, w // 2), state)
        return (self.kernels.affine_relu_avg_pool2x2(x, *self.affine_constants(op.affine), out=out),)

    def _constants(self, op: Conv) -> Constants:
        if op.out not in self.weights:
            self.weights[op.out] = Constants.of(*op.folded(), self.dtype)
        return self.weights[op.out]  # type: ignore[return-value]  # stored two lines above


def fuse(program: Program) -> list[Op]:
    """-> what a GPU runs: affines in their convolutions and poolings."""
    uses = program.uses()
    made = {op.out: op for op in program.ops}
    taken: set[int] = set()  # affines that run inside another op, by value
    ops: list[Op] = []
    for op in program.ops:
        conv = op if isinstance(op, Conv) else None
        value = _pooled(op) if conv is None else conv.x
        before = None if value is None else made.get(value)
        if not isinstance(before, Affine) or not before.relu or uses[before.out] != 1:
            before = None
        if conv is not None and not (conv.module.kernel_size == (1, 1) and is_triton_conv(conv.module)):
            before = None
        if before is not None:
            taken.add(before.out)
        if conv is not None:
            op = FusedConv(op.out, conv, before)
        elif before is not None:
            op = PooledAffine(op.out, before)
        ops.append(op)
    convs = {op.out: op for op in ops if isinstance(op, FusedConv)}
    for op in program.ops:
        if isinstance(op, Affine) and op.relu and op.out not in taken:
            fused = convs.get(op.x)
            if fused is not None and fused.after is None:
                fused.after = op
                taken.add(op.out)
    return [op for op in ops if not (isinstance(op, Affine) and op.out in taken)]


def _pooled(op: Op) -> int | None:
    """The value that a 2x2 average pooling without padding pools."""
    if not isinstance(op, Call):
        return None
    pool = op.averages
    if pool is None or pool.divisor_override or len(op.args) != 1 or op.kwargs:
        return None
    both = (pool.kernel_size, pool.stride)
    return op.args[0].value if all(size in (2, (2, 2)) for size in both) else None


def uses_tf32() -> bool:
    """Whether cuDNN's float32 convolutions run in TF32 now."""
    settings: Any = getattr(torch.backends.cudnn, "conv", None)
    if hasattr(settings, "fp32_precision"):
        return settings.fp32_precision == "tf32"
    return torch.backends.cudnn.allow_tf32
