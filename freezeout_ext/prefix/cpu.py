"""A Program on the CPU: oneDNN's fused convolutions on packed weights, channels-last, buffers that stay.

The fused convolutions are private to torch (torch._inductor uses them); where this torch lacks one, the plain
convolution runs and `fallbacks` says so. Nothing is compiled at run time.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from .. import native
from .folding import Add, Affine, Call, Cat, Conv, Program, Ref, Relu, Step, affine, refs
from .trees import map_tensors

CHANNELS_LAST = torch.channels_last
# A dense block's buffer is read and written whole by every layer: of this many images it stays in the cache
# (DenseNet-76-12, batch 64, one thread: 0.85 of the time, a quarter of the memory; other nets gain nothing).
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


class Arena:
    """Buffers that stay between calls: taken for a value, given back when it is dead."""

    def __init__(self) -> None:
        self.free: list[Tensor] = []
        self.bytes = 0

    def take(self, numel: int, dtype: torch.dtype) -> Tensor:
        fits = [b for b in self.free if b.dtype == dtype and b.numel() >= numel]
        if fits:
            best = min(fits, key=Tensor.numel)
            self.free = [b for b in self.free if b is not best]
            return best
        # What is too small was sized for a smaller batch: give it back before asking for more.
        small = [b for b in self.free if b.dtype == dtype and b.numel() < numel // 2]
        for buffer in small:
            self.bytes -= buffer.nbytes
        self.free = [b for b in self.free if all(b is not s for s in small)]
        buffer = torch.empty(numel, dtype=dtype)
        self.bytes += buffer.nbytes
        return buffer

    def give(self, buffer: Tensor) -> None:
        self.free.append(buffer)


class CpuEngine:
    """outputs = program(*inputs) on the CPU, in `dtype`, the outputs in the inputs' dtype and in fresh memory.

    Args:
        dtype: what convolutions and affines compute in; None: that of the modules.
        output_dtypes: dtype of each output, None for one that is not a tensor.
        channels_last: for each output whether it is wanted channels-last (as eager gives it).
        weights: packed weights by step key, shared by the engines of successive frontiers.
    """

    def __init__(
        self,
        program: Program,
        *,
        dtype: torch.dtype | None,
        output_dtypes: list[torch.dtype | None],
        channels_last: list[bool],
        weights: dict,
        arena: Arena | None = None,
    ) -> None:
        self.program = program
        self.dtype = dtype
        self.output_dtypes = output_dtypes
        self.channels_last = channels_last
        self.weights = weights
        self.arena = arena or Arena()
        self.fallbacks = list(program.notes)
        self._affine_op = getattr(native.C, "affine_relu", None)
        if self._affine_op is None and any(isinstance(step, Affine) for step in program.steps):
            self.fallbacks.append(
                f"affines run in torch: {native.import_error or 'the compiled half has no affine_relu'}"
            )
        missing = fused_convolutions() or unsupported_dtype(dtype or torch.float32)
        self._fused = missing is None
        if missing is not None and any(isinstance(step, Conv) for step in program.steps):
            self.fallbacks.append(f"convolutions run unfused: {missing}")
        self._buffer_of: dict[int, list] = {}  # value -> [its buffer, how many values live in it]
        self._dead_after = self._last_uses()
        self._extends, self._total_appended = self._dense_blocks()
        self._in_parts = bool(self._extends) and self._keeps_images_apart()
        self._run: dict[type[Step], Callable] = {
            Affine: self._affine, Conv: self._conv, Add: self._add, Relu: self._relu, Cat: self._cat, Call: self._call,
        }  # fmt: skip

    @property
    def bytes_held(self) -> int:
        """Of buffers; the packed weights belong to all engines."""
        return self.arena.bytes

    def fused(self) -> dict[str, int]:
        """How many steps of each fused kind the program has."""
        counts: dict[str, int] = {}
        for step in self.program.steps:
            if isinstance(step, Conv):
                kind = "linear" if isinstance(step.module, nn.Linear) else "conv"
                name = kind + "+bn" * (step.scale is not None) + "+add" * (step.add is not None) + "+relu" * step.relu
            elif isinstance(step, Affine):
                name = "affine" + "+relu" * step.relu
            elif isinstance(step, Cat):
                name = (
                    "cat in a block buffer" if step.out in self._total_appended or step.out in self._extends else "cat"
                )
            else:
                name = type(step).__name__.lower()
            counts[name] = counts.get(name, 0) + 1
        return counts

    def __call__(self, *inputs: Tensor) -> tuple:
        if self._in_parts and inputs[0].dim() == 4 and len(inputs[0]) > DENSE_IMAGES:
            parts = [self._run_whole(x) for x in inputs[0].split(DENSE_IMAGES)]
            return tuple(torch.cat(outputs) for outputs in zip(*parts, strict=True))
        return self._run_whole(*inputs)

    def _run_whole(self, *inputs: Tensor) -> tuple:
        values: dict[int, Tensor] = dict(zip(self.program.inputs, inputs, strict=True))
        self._fresh: set[int] = set()
        try:
            with torch.autocast("cpu", enabled=False):
                for i, step in enumerate(self.program.steps):
                    values[step.out] = self._run[type(step)](step, values, self._dead_after[i])
                    for value in self._dead_after[i]:
                        values.pop(value, None)
                        self._release(value)
                return self._outputs(values)
        finally:
            for value in list(self._buffer_of):
                self._release(value)

    # Steps

    def _affine(self, step: Affine, values: dict[int, Tensor], dead: list[int]) -> Tensor:
        x = self._input(values[step.x])
        scale, shift = self._constants(step)
        kernel = self._affine_op is not None and x.dtype in (torch.float32, torch.bfloat16)
        if not kernel or x.dim() != 4 or not _sliced_channels_last(x):
            y = affine(x, scale, shift)
            return y.relu_() if step.relu else y
        n, c, h, w = x.shape
        y = self._image_buffer(step.out, (n, c, h, w), x.dtype)
        self._affine_op(
            x.data_ptr(), y.data_ptr(), scale.data_ptr(), shift.data_ptr(), rows=n * h * w, channels=c,
            x_stride=_pixel_stride(x), y_stride=c, relu=step.relu,
            dtype=str(x.dtype).removeprefix("torch."), threads=torch.get_num_threads(),
        )  # fmt: skip
        return y

    def _conv(self, step: Conv, values: dict[int, Tensor], dead: list[int]) -> Tensor:
        x = self._input(values[step.x])
        conv = step.module
        other = None if step.add is None else self._input(values[step.add])
        self._fresh.add(step.out)
        if isinstance(conv, nn.Linear):
            weight, bias = self._packed(step, x, packed=False)
            y = F.linear(x, weight, bias)
            return y.relu_() if step.relu else y
        geometry = (list(conv.padding), list(conv.stride), list(conv.dilation), conv.groups)
        if not self._fused or x.dim() != 4 or x.dtype != (self.dtype or torch.float32):
            weight, bias = self._packed(step, x, packed=False)
            y = F.conv2d(x, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)
            y = y if other is None else y + other
            return y.relu_() if step.relu else y
        weight, bias = self._packed(step, x, packed=True)
        relu = "relu" if step.relu else None
        if other is None:
            return torch.ops.mkldnn._convolution_pointwise(x, weight, bias, *geometry, relu or "none", [], "")
        shape = (x.shape[0], conv.out_channels, *_out_size(conv, x))
        if tuple(other.shape) != shape:
            y = torch.ops.mkldnn._convolution_pointwise(x, weight, bias, *geometry, "none", [], "")
            y = y + other
            return y.relu_() if step.relu else y
        mine = step.add in dead and step.add in self._fresh and _storage(other) != _storage(x)
        if mine and other.is_contiguous(memory_format=CHANNELS_LAST):
            return torch.ops.mkldnn._convolution_pointwise_.binary(
                other, x, weight, bias, *geometry, "add", 1.0, relu, [], None
            )
        other = other.contiguous(memory_format=CHANNELS_LAST)
        return torch.ops.mkldnn._convolution_pointwise.binary(
            x, other, weight, bias, *geometry, "add", 1.0, relu, [], None
        )

    def _add(self, step: Add, values: dict[int, Tensor], dead: list[int]) -> Tensor:
        y = torch.add(self._input(values[step.a]), self._input(values[step.b]))
        self._fresh.add(step.out)
        return y.relu_() if step.relu else y

    def _relu(self, step: Relu, values: dict[int, Tensor], dead: list[int]) -> Tensor:
        self._fresh.add(step.out)
        return torch.relu(self._input(values[step.x]))

    def _cat(self, step: Cat, values: dict[int, Tensor], dead: list[int]) -> Tensor:
        pieces = [self._input(values[x]) for x in step.xs]
        if any(p.dim() != 4 for p in pieces):
            return torch.cat(pieces, 1)
        base = self._extends.get(step.out)
        if base is not None and base in self._buffer_of:
            holder = self._buffer_of[base]
            block, used = holder[2], pieces[0].shape[1]
            pieces = pieces[1:]
        else:
            appended = self._total_appended.get(step.out)
            channels = sum(p.shape[1] for p in pieces)
            if appended is not None:
                channels = pieces[0].shape[1] + appended
            n, _, h, w = pieces[0].shape
            block, used = self._image_buffer(step.out, (n, channels, h, w), pieces[0].dtype), 0
            holder = self._buffer_of[step.out]
        for piece in pieces:
            block[:, used : used + piece.shape[1]].copy_(piece)
            used += piece.shape[1]
        if step.out not in self._buffer_of:
            holder[1] += 1
            self._buffer_of[step.out] = holder
        return block[:, :used]

    def _call(self, step: Call, values: dict[int, Tensor], dead: list[int]) -> Tensor:
        def given(leaf: object) -> object:
            if not isinstance(leaf, Ref):
                return leaf
            value = values[leaf.value]
            if isinstance(value, Tensor) and not step.any_layout:
                # A stranger may view or flatten its input in the order that eager has it.
                value = self._input(value).contiguous()
            elif isinstance(value, Tensor):
                value = self._input(value)
            return value

        args, kwargs = tree_map(given, (step.args, step.kwargs))
        result = step.run(args, kwargs, torch.device("cpu"), self.dtype)
        # The result may be a view of what it was given.
        self._fresh.difference_update(step.inputs())
        kept = {self._buffer_of[v][0].data_ptr() for v in step.inputs() if v in self._buffer_of}
        if kept:
            result = map_tensors(lambda t: t.clone() if _storage(t) in kept else t, result)
        return result

    # Values

    def _input(self, x: Tensor) -> Tensor:
        """x in the engine's dtype, channels-last where it is an image; channel slices stay as they are."""
        if not isinstance(x, Tensor) or not x.is_floating_point():
            return x
        if self.dtype is not None and x.dtype != self.dtype:
            x = x.to(self.dtype)
        if x.dim() == 4 and not _sliced_channels_last(x):
            x = x.contiguous(memory_format=CHANNELS_LAST)
        return x

    def _constants(self, step: Affine) -> tuple[Tensor, Tensor]:
        key = ("affine", *map(id, step.source), step.scale.numel())
        if key not in self.weights:
            # float32 for bfloat16 images too; float64 where the modules are.
            wide = torch.float64 if self.dtype == torch.float64 else torch.float32
            self.weights[key] = (step.scale.to(wide), step.shift.to(wide))
        return self.weights[key]

    def _packed(self, step: Conv, x: Tensor, *, packed: bool) -> tuple[Tensor, Tensor | None]:
        key = (packed, x.dtype, tuple(x.shape[2:]) if packed else (), *map(id, step.key))
        if key not in self.weights:
            weight, bias = step.folded()
            weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
            if packed:
                conv = step.module
                weight = torch._C._nn.mkldnn_reorder_conv2d_weight(
                    weight.contiguous().to_mkldnn(),
                    conv.padding,
                    conv.stride,
                    conv.dilation,
                    conv.groups,
                    list(x.shape),
                )
            self.weights[key] = (weight, bias)
        return self.weights[key]

    def _image_buffer(self, value: int, shape: tuple[int, int, int, int], dtype: torch.dtype) -> Tensor:
        n, c, h, w = shape
        flat = self.arena.take(n * c * h * w, dtype)
        image = flat[: n * c * h * w].view(n, h, w, c).permute(0, 3, 1, 2)
        self._buffer_of[value] = [flat, 1, image]
        return image

    def _release(self, value: int) -> None:
        holder = self._buffer_of.pop(value, None)
        if holder is not None:
            holder[1] -= 1
            if holder[1] == 0:
                self.arena.give(holder[0])

    def _outputs(self, values: dict[int, Tensor]) -> tuple:
        given: set[int] = set()

        def out(leaf: object, dtype: torch.dtype | None, memory_format: torch.memory_format) -> object:
            if not isinstance(leaf, Ref):
                return leaf
            value = values[leaf.value]
            # Outputs outlive the call: never a kept buffer, an input, or the same memory twice.
            copy = leaf.value not in self._fresh or leaf.value in given
            given.add(leaf.value)
            if not isinstance(value, Tensor):
                return map_tensors(Tensor.clone, value)
            return value.to(dtype or value.dtype, copy=copy, memory_format=memory_format)

        outputs = []
        for tree, dtype, last in zip(self.program.outputs, self.output_dtypes, self.channels_last, strict=True):
            memory_format = CHANNELS_LAST if last else torch.contiguous_format
            outputs.append(tree_map(lambda leaf, d=dtype, f=memory_format: out(leaf, d, f), tree))
        return tuple(outputs)

    # What is known before the first call

    def _last_uses(self) -> list[list[int]]:
        outputs = set(refs(self.program.outputs))
        last: dict[int, int] = {}
        for i, step in enumerate(self.program.steps):
            for value in [*step.inputs(), step.out]:
                last[value] = i
        dead: list[list[int]] = [[] for _ in self.program.steps]
        for value, i in last.items():
            if value not in outputs:
                dead[i].append(value)
        return dead

    def _keeps_images_apart(self) -> bool:
        """Whether each image's outputs depend on that image alone, by the kinds of the steps; one input only."""
        steps, outputs = self.program.steps, self.program.outputs
        apart = all(not isinstance(step, Call) or step.any_layout for step in steps)
        return apart and len(self.program.inputs) == 1 and all(isinstance(output, Ref) for output in outputs)

    def _dense_blocks(self) -> tuple[dict[int, int], dict[int, int]]:
        """-> which cat goes on in whose buffer, and the channels that a block's first cat must leave room for."""
        made = {step.out: step for step in self.program.steps}
        extends: dict[int, int] = {}
        first_of: dict[int, int] = {}
        total: dict[int, int] = {}
        for step in self.program.steps:
            if not isinstance(step, Cat):
                continue
            widths = [_channels(made.get(x)) for x in step.xs[1:]]
            if None in widths or len(set(step.xs)) < len(step.xs):
                continue
            base = step.xs[0]
            if base in first_of and base not in extends.values():
                extends[step.out] = base
                first_of[step.out] = first_of[base]
                total[first_of[base]] += sum(widths)
            else:
                first_of[step.out] = step.out
                total[step.out] = sum(widths)
        return extends, total


def _channels(step: Step | None) -> int | None:
    if isinstance(step, Conv):
        return step.module.out_channels if isinstance(step.module, nn.Conv2d) else step.module.out_features
    return step.scale.numel() if isinstance(step, Affine) else None


def _out_size(conv: nn.Conv2d, x: Tensor) -> tuple[int, int]:
    geometry = zip(x.shape[2:], conv.kernel_size, conv.stride, conv.padding, conv.dilation, strict=True)
    return tuple(
        (size + 2 * pad - dilation * (kernel - 1) - 1) // stride + 1 for size, kernel, stride, pad, dilation in geometry
    )


def _pixel_stride(x: Tensor) -> int:
    return x.stride(3) if x.shape[3] > 1 else x.stride(2) if x.shape[2] > 1 else x.stride(0)


def _sliced_channels_last(x: Tensor) -> bool:
    """Whether x is [N, C, H, W] with one stride from pixel to pixel and channels side by side."""
    n, c, h, w = x.shape
    stride = _pixel_stride(x)
    if c > 1 and x.stride(1) != 1:
        return False
    if n * h * w == 1:
        return True
    return (
        stride >= c
        and (w == 1 or x.stride(3) == stride)
        and (h == 1 or x.stride(2) == w * stride)
        and (n == 1 or x.stride(0) == h * w * stride)
    )


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
