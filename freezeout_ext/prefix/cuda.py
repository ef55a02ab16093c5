"""A prefix on a GPU: fused convolutions and affines on channels-last images, replayed as a CUDA graph.

`CudaEngine` runs a Program, `CudaExactEngine` the original modules. A shape's first call launches kernel by kernel and
measures nothing; the second in a row measures the ways to run each convolution, once in the process, and captures the
graph. So an odd last batch costs neither.
"""

import logging
import warnings
from collections.abc import Callable, Hashable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map

from .. import kernels
from ..cuda_graphs import capture, own_stream
from .cuda_conv import PLAIN, Constants, ConvCall
from .cuda_plan import FusedConv, PooledAffine, outs, plan
from .folding import Add, Affine, Call, Cat, Conv, Program, Ref, Relu, Step, affine, first_line
from .guard import autocast_state
from .trees import map_tensors

logger = logging.getLogger("freezeout_ext")

CHANNELS_LAST = torch.channels_last
MOST_GRAPHS = 4  # shapes of one engine: training batch, evaluation batch, and two more


def on_gpu(inputs: tuple) -> bool:
    return all(isinstance(x, Tensor) and x.is_cuda for x in inputs)


def capturing(inputs: tuple) -> bool:
    return on_gpu(inputs) and torch.cuda.is_current_stream_capturing()


def shape_key(inputs: tuple) -> Hashable:
    """What a graph or a measurement holds for: shapes, strides, dtypes, other arguments, the autocast state."""
    tensors = tuple((x.shape, x.stride(), x.dtype, x.device) if isinstance(x, Tensor) else x for x in inputs)
    devices = {x.device for x in inputs if isinstance(x, Tensor)}
    return tensors, tuple(autocast_state(device) for device in devices)


class Graphs:
    """outputs = function(*inputs) from a CUDA graph for each shape seen twice in a row; else None."""

    def __init__(self, function: Callable[..., tuple]) -> None:
        self.function = function
        self.refused: dict[Hashable, str] = {}
        self.bytes = 0
        self._held: dict[Hashable, tuple[torch.cuda.CUDAGraph, list[Tensor], tuple]] = {}
        self._last: Hashable = None
        self._pool: tuple[int, int] | None = None
        self._stream: torch.cuda.Stream | None = None

    def __call__(self, inputs: tuple, prepare: Callable[[], object] | None = None) -> tuple | None:
        """The outputs in the graph's own memory, overwritten by the next call; None: run the function yourself.

        Args:
            prepare: called once before a capture; raises where there must not be one.
        """
        if not on_gpu(inputs):
            return None
        key = shape_key(inputs)
        repeated, self._last = key == self._last, key
        if key not in self._held:
            if not repeated or key in self.refused or len(self._held) == MOST_GRAPHS:
                return None
            try:
                self._held[key] = self._capture(inputs, prepare)
            except Exception as error:  # a graph is a saving; a run must not end for it
                self.refused[key] = first_line(error)
                logger.warning("prefix: no CUDA graph for inputs %s: %s", [tuple(x.shape) for x in inputs], error)
                return None
        graph, given, outputs = self._held[key]
        for mine, x in zip(given, inputs, strict=True):
            mine.copy_(x)
        graph.replay()
        return outputs

    def _capture(self, inputs: tuple, prepare: Callable[[], object] | None) -> tuple:
        with torch.cuda.device(inputs[0].device), _no_autocast_cache():
            if prepare is not None:
                prepare()
            given = [torch.empty_like(x, memory_format=torch.preserve_format).copy_(x) for x in inputs]
            if self._stream is None:
                self._stream = own_stream(self, torch.cuda.current_device())
            self._rehearse(given, self._stream)
            before = torch.cuda.memory_reserved()
            # Graphs of one engine never run at the same time and their outputs are copied: they share their memory.
            graph, outputs = capture(lambda: self.function(*given), stream=self._stream, pool=self._pool)
            self._pool = graph.pool()
            self.bytes += torch.cuda.memory_reserved() - before + sum(x.nbytes for x in given)
            return graph, given, outputs

    def _rehearse(self, given: list[Tensor], stream: torch.cuda.Stream) -> None:
        """One run on the stream of the capture. What waits for the device would end a capture for good: refuse it."""
        current = torch.cuda.current_stream()
        stream.wait_stream(current)
        mode = torch.cuda.get_sync_debug_mode()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                with torch.cuda.stream(stream):
                    self.function(*given)
            finally:
                torch.cuda.set_sync_debug_mode(mode)
        current.wait_stream(stream)
        # Not the warning that the mode is a prototype, which says "synchronizing" too.
        if any("called a synchronizing" in str(warning.message) for warning in caught):
            raise RuntimeError("the prefix waits for the device (.item(), a copy to the CPU)")


class _no_autocast_cache:
    """A weight that autocast casts inside a graph must not be the one that code outside finds in its cache."""

    def __enter__(self) -> None:
        self.enabled = torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(False)

    def __exit__(self, *_: object) -> None:
        torch.set_autocast_cache_enabled(self.enabled)


class CudaExactEngine:
    """outputs = originals(*inputs), the same kernels without their launches: bit-equal to eager."""

    def __init__(self, originals: Callable[..., tuple]) -> None:
        self.originals = originals
        self._graphs = Graphs(originals)

    @property
    def bytes_held(self) -> int:
        return self._graphs.bytes

    @property
    def fallbacks(self) -> list[str]:
        return [f"no CUDA graph: {reason}" for reason in dict.fromkeys(self._graphs.refused.values())]

    def fused(self) -> dict[str, int]:
        return {"CUDA graph": len(self._graphs._held)}

    def __call__(self, *inputs: Any) -> tuple:
        outputs = None if capturing(inputs) else self._graphs(inputs)
        if outputs is None:
            return self.originals(*inputs)
        return map_tensors(Tensor.clone, outputs)


class CudaEngine:
    """outputs = program(*inputs) on a GPU, computed in `dtype`, outputs in the wanted dtypes and in fresh memory.

    Args:
        dtype: of images, weights and products (sums and affines are float32).
        output_dtypes: dtypes of the outputs, None for an output that is not a tensor (but a list of some, say).
        channels_last: for each output whether it is wanted channels-last (as eager gives it).
        weights: folded weights by step key, shared by the engines of successive frontiers.
        ops: the kernels; tests give the references.

    `tolerance` is the error against eager that its precision explains, 0 where the mode's own does.

    Raises:
        Refused: the kernels do not compute in this dtype.
    """

    def __init__(
        self,
        program: Program,
        *,
        dtype: torch.dtype,
        output_dtypes: list[torch.dtype | None],
        channels_last: list[bool],
        weights: dict,
        ops: Any = kernels,
    ) -> None:
        if dtype not in kernels.DTYPES:
            from .runtime import Refused

            raise Refused(f"the GPU kernels compute in bfloat16, float16 and float32, not in {dtype}")
        self.program, self.plan = program, plan(program)
        self.dtype, self.output_dtypes, self.channels_last = dtype, output_dtypes, channels_last
        self.weights, self.ops = weights, ops
        self.tf32 = dtype == torch.float32 and uses_tf32()
        # TF32 rounds operands to float16's 11 bits, here other ones than in eager: the BatchNorms are in them.
        self.tolerance = 2e-2 if self.tf32 else 0.0
        self.ways: dict[int, Hashable] = {}  # how each convolution ran the last time that Python ran it, by value
        self._notes = list(program.notes)
        self._measured: set[Hashable] = set()
        self._graphs = Graphs(self.run_measured)
        self._run: dict[type[Step], Callable] = {
            Affine: self._affine, FusedConv: self._conv, PooledAffine: self._pooled_affine, Conv: self._linear,
            Add: self._add, Relu: self._relu, Cat: self._cat, Call: self._call,
        }  # fmt: skip

    @property
    def bytes_held(self) -> int:
        return self._graphs.bytes

    @property
    def fallbacks(self) -> list[str]:
        return self._notes + [f"no CUDA graph: {reason}" for reason in dict.fromkeys(self._graphs.refused.values())]

    def fused(self) -> dict[str, int]:
        """How many steps of each kind the plan has, and how many convolutions run which way."""
        counts: dict[str, int] = {"CUDA graph": len(self._graphs._held)}
        names = [self._name(step) for step in self.plan.steps]
        names += ["by " + (way if isinstance(way, str) else "Triton") for way in self.ways.values()]
        for name in names:
            counts[name] = counts.get(name, 0) + 1
        return counts

    def __call__(self, *inputs: Any) -> tuple:
        if capturing(inputs):  # of the whole training step, by the user
            measured = shape_key(inputs) in self._measured
            return self._finish((self.run_measured if measured else self.run_plain)(*inputs))
        outputs = self._graphs(inputs, prepare=lambda: self._prepare(inputs))
        return self._finish(self.run_plain(*inputs) if outputs is None else outputs)

    def run_plain(self, *inputs: Any) -> tuple:
        """-> raw outputs; every convolution the way that needs no measurement."""
        return self._steps(inputs, lambda call: PLAIN)

    def run_measured(self, *inputs: Any) -> tuple:
        """-> raw outputs; every convolution the fastest way for its shape."""
        return self._steps(inputs, ConvCall.way)

    def _prepare(self, inputs: tuple) -> None:
        """Measures what is new in these shapes and compares the result with the plain one."""
        limit = 4 * self.ops.tolerance(self.dtype, self.tf32)
        measured, wanted = (self._finish(run(*inputs)) for run in (self.run_measured, self.run_plain))
        for found, want in zip(measured, wanted, strict=True):
            if isinstance(want, Tensor) and want.is_floating_point() and want.numel():
                error = (
                    (found.double() - want.double()).abs().max() / want.double().abs().max().clamp_min(1e-30)
                ).item()
                if not error <= limit:
                    raise RuntimeError(f"the fused convolutions are off by {error:.1e} together, allowed {limit:.0e}")
        self._measured.add(shape_key(inputs))

    def _steps(self, inputs: tuple, way: Callable[[ConvCall], Hashable]) -> tuple:
        values: dict[int, Any] = dict(zip(self.program.inputs, inputs, strict=True))
        blocks: dict[int, Tensor] = {}
        first = next(x for x in inputs if isinstance(x, Tensor))
        self._device = first.device
        with torch.cuda.device_of(first):  # Triton launches on the current device
            for step, dead in zip(self.plan.steps, self.plan.dead_after, strict=True):
                results = self._run[type(step)](step, values, blocks, way)
                for value, result in zip(outs(step), results, strict=True):
                    values[value] = self._placed(value, result, blocks)
                for value in dead:
                    values.pop(value, None)
        return tree_map(lambda leaf: values[leaf.value] if isinstance(leaf, Ref) else leaf, self.program.outputs)

    # Steps: each returns one result for each of its values

    def _conv(self, step: FusedConv, values: dict, blocks: dict, way: Callable) -> tuple[Tensor, ...]:
        x, conv, before = self._image(values[step.inputs()[0]]), step.conv, step.before
        if x.dim() != 4:
            raise TypeError(f"{type(conv.module).__name__} was given {x.dim()} dimensions, expected a batch of images")
        call = ConvCall(
            ops=self.ops,
            module=conv.module,
            x=x,
            constants=self._constants(conv),
            prologue=None if before is None else self._affine_constants(before),
            residual=None if conv.add is None else self._image(values[conv.add]),
            relu=conv.relu,
            second=None if step.after is None else self._affine_constants(step.after),
            out=None,
            tf32=self.tf32,
        )
        call.out = self._place(step.out, call.shape, blocks)
        self.ways[step.out] = way(call)
        return call.run(self.ways[step.out])

    def _affine(self, step: Affine, values: dict, blocks: dict, way: Callable) -> tuple[Tensor]:
        x = self._image(values[step.x])
        scale, shift = self._affine_constants(step)
        if x.dim() != 4:
            y = affine(x, scale, shift)
            return (y.relu_() if step.relu else y,)
        return (self.ops.affine_relu(x, scale, shift, relu=step.relu, out=self._target(step.out, x.shape, blocks)),)

    def _pooled_affine(self, step: PooledAffine, values: dict, blocks: dict, way: Callable) -> tuple[Tensor]:
        x = self._image(values[step.affine.x])
        n, c, h, w = x.shape
        out = self._target(step.out, (n, c, h // 2, w // 2), blocks)
        return (self.ops.affine_relu_avg_pool2x2(x, *self._affine_constants(step.affine), out=out),)

    def _linear(self, step: Conv, values: dict, blocks: dict, way: Callable) -> tuple[Tensor]:
        constants = self._constants(step)
        y = F.linear(self._image(values[step.x]), constants.weight, constants.bias_like)
        y = y if step.add is None else y + self._image(values[step.add])
        return (y.relu_() if step.relu else y,)

    def _add(self, step: Add, values: dict, blocks: dict, way: Callable) -> tuple[Tensor]:
        y = torch.add(self._image(values[step.a]), self._image(values[step.b]))
        return (y.relu_() if step.relu else y,)

    def _relu(self, step: Relu, values: dict, blocks: dict, way: Callable) -> tuple[Tensor]:
        return (torch.relu(self._image(values[step.x])),)

    def _cat(self, step: Cat, values: dict, blocks: dict, way: Callable) -> tuple[Tensor]:
        pieces = [self._image(values[x]) for x in step.xs]
        if step.out in self.plan.joined and pieces[0].dim() == 4:
            return (self._place(step.out, pieces[0].shape, blocks),)
        return (torch.cat(pieces, 1),)

    def _call(self, step: Call, values: dict, blocks: dict, way: Callable) -> tuple[Any]:
        def given(leaf: Any) -> Any:
            if not isinstance(leaf, Ref) or not isinstance(values[leaf.value], Tensor):
                return values[leaf.value] if isinstance(leaf, Ref) else leaf
            value = self._image(values[leaf.value])
            # A stranger may view or flatten its input in the order that eager has it.
            return value if step.any_layout else value.contiguous()

        args, kwargs = tree_map(given, (step.args, step.kwargs))
        return (step.run(args, kwargs, self._device, self.dtype),)

    # Values

    def _image(self, x: Any) -> Any:
        """x in the engine's dtype, channels-last where it is an image; channel slices stay as they are."""
        if not isinstance(x, Tensor) or not x.is_floating_point():
            return x
        x = x.to(self.dtype)
        return x if x.dim() != 4 or is_rows(x) else x.contiguous(memory_format=CHANNELS_LAST)

    def _place(self, value: int, shape: tuple[int, ...], blocks: dict) -> Tensor | None:
        """The slice of a block's buffer where the value lies, None where it lies in no block."""
        if value not in self.plan.places or len(shape) != 4:
            return None
        block, first, channels = self.plan.places[value]
        if id(block) not in blocks:
            n, _, h, w = shape
            blocks[id(block)] = torch.empty(
                (n, block.channels, h, w), dtype=self.dtype, device=self._device, memory_format=CHANNELS_LAST
            )
        return blocks[id(block)][:, first : first + channels]

    def _target(self, value: int, shape: tuple[int, ...], blocks: dict) -> Tensor:
        placed = self._place(value, shape, blocks)
        if placed is not None:
            return placed
        return torch.empty(tuple(shape), dtype=self.dtype, device=self._device, memory_format=CHANNELS_LAST)

    def _placed(self, value: int, result: Any, blocks: dict) -> Any:
        """The result at its place: copied there where the step could not write it there."""
        place = self._place(value, result.shape, blocks) if isinstance(result, Tensor) else None
        if place is None:
            return result
        if result.data_ptr() != place.data_ptr() or result.stride() != place.stride():
            place.copy_(result)
        return place

    def _constants(self, step: Conv) -> Constants:
        key = ("cuda conv", self.dtype, *map(id, step.key))
        if key not in self.weights:
            weight, bias = step.folded()
            self.weights[key] = Constants.of(weight, bias, self.dtype)
        return self.weights[key]

    def _affine_constants(self, step: Affine) -> tuple[Tensor, Tensor]:
        key = ("cuda affine", *map(id, step.source), step.scale.numel())
        if key not in self.weights:
            self.weights[key] = (step.scale.float(), step.shift.float())
        return self.weights[key]

    def _finish(self, outputs: tuple) -> tuple:
        """Outputs as eager gives them, in memory that the next call leaves alone."""

        def own(leaf: Tensor, dtype: torch.dtype | None, last: bool) -> Tensor:
            memory_format = CHANNELS_LAST if last and leaf.dim() == 4 else torch.contiguous_format
            return leaf.to(dtype or leaf.dtype, copy=True, memory_format=memory_format)

        each = zip(outputs, self.output_dtypes, self.channels_last, strict=True)
        return tuple(map_tensors(partial(own, dtype=dtype, last=last), tree) for tree, dtype, last in each)

    def _name(self, step: Step) -> str:
        if isinstance(step, FusedConv):
            conv = step.conv
            name = "affine+relu+" * (step.before is not None) + "conv{}x{}".format(*conv.module.kernel_size)
            name += "+bn" * (conv.scale is not None) + "+add" * (conv.add is not None) + "+relu" * conv.relu
            return name + " and affine+relu" * (step.after is not None)
        if isinstance(step, PooledAffine):
            return "affine+relu+pool"
        if isinstance(step, Conv):
            return "linear" + "+bn" * (step.scale is not None) + "+relu" * step.relu
        if isinstance(step, Cat):
            return "cat in a block buffer" if step.out in self.plan.joined else "cat"
        return type(step).__name__.lower() + "+relu" * (getattr(step, "relu", False) is True)


def is_rows(x: Tensor) -> bool:
    """Whether the kernels can address [N, C, H, W]: one stride from pixel to pixel, channels side by side."""
    try:
        kernels.Rows.of("x", x)
    except ValueError:
        return False
    return True


def uses_tf32() -> bool:
    """Whether cuDNN's float32 convolutions run in TF32 now."""
    settings = getattr(torch.backends.cudnn, "conv", None)
    if hasattr(settings, "fp32_precision"):
        return settings.fp32_precision == "tf32"
    return torch.backends.cudnn.allow_tf32
