"""Programs: straight lists of ops in which every BatchNorm is a constant.

Values are numbers. `lower.py` writes a Program, `simplify.py` rewrites it, `engine.py` runs it.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Ref:
    """The number of a value in a Program, where an argument may hold other things too."""

    value: int


class Size(Ref):
    """The number of a value that is a number or a shape, and no tensor."""


@dataclass
class Op:
    """One value, `out`, from those in the fields that READS names."""

    READS: ClassVar[tuple[str, ...]] = ()
    out: int

    def inputs(self) -> list[int]:
        return [value for name in self.READS if (value := getattr(self, name)) is not None]

    def outs(self) -> list[int]:
        """The values that the op makes."""
        return [self.out]


@dataclass
class Affine(Op):
    """y = relu?(scale[c] * x[:, c] + shift[c]), scale and shift [C] in float64."""

    READS = ("x",)
    x: int
    scale: Tensor
    shift: Tensor
    relu: bool = False


@dataclass
class Conv(Op):
    """y = relu?(conv(x) * scale[c] + shift[c] + add), the convolution padded with zeros.

    Attributes:
        before: an affine that x passes first.
        after: an affine of y, which is a second value, `after.out`.
    """

    READS = ("x", "add")
    x: int
    module: nn.Conv2d
    scale: Tensor | None = None
    shift: Tensor | None = None
    add: int | None = None
    relu: bool = False
    before: Affine | None = None
    after: Affine | None = None

    def outs(self) -> list[int]:
        return [self.out] if self.after is None else [self.out, self.after.out]

    def shape(self, x: Tensor) -> tuple[int, int, int, int]:
        """-> that of the result for images x."""
        conv = self.module
        padding: Any = conv.padding  # numbers, by lowering
        geometry = zip(x.shape[2:], conv.kernel_size, conv.stride, padding, conv.dilation, strict=True)
        height, width = (
            (size + 2 * pad - dilation * (kernel - 1) - 1) // stride + 1
            for size, kernel, stride, pad, dilation in geometry
        )
        return x.shape[0], conv.out_channels, height, width

    def folded(self) -> tuple[Tensor, Tensor | None]:
        """-> weight, bias in float64 (the module's own shapes), the scale and shift in them."""
        weight = self.module.weight.detach().double()
        bias = None if self.module.bias is None else self.module.bias.detach().double()
        if self.scale is not None and self.shift is not None:
            weight = weight * self.scale.reshape(-1, *[1] * (weight.dim() - 1))
            bias = self.shift if bias is None else bias * self.scale + self.shift
        return weight, bias


@dataclass
class Add(Op):
    """y = relu?(a + b)."""

    READS = ("a", "b")
    a: int
    b: int
    relu: bool = False


@dataclass
class Relu(Op):
    """y = relu(x)."""

    READS = ("x",)
    x: int


@dataclass
class Cat(Op):
    """y = cat(xs, 1)."""

    xs: list[int]

    def inputs(self) -> list[int]:
        return list(self.xs)


@dataclass
class Call(Op):
    """y = function(*args, **kwargs), values given as Ref inside args and kwargs.

    The function of a module is the module's own forward. The one that is installed on the module runs the engine.

    Attributes:
        any_layout: the function may be given channels-last tensors.
        averages: the module, where the module averages over H, W windows without padding, which commutes with a 1x1
            convolution.
    """

    function: Callable
    args: tuple
    kwargs: dict
    name: str
    any_layout: bool = False
    averages: nn.AvgPool2d | None = None

    def inputs(self) -> list[int]:
        return refs((self.args, self.kwargs))

    def run(self, args: tuple, kwargs: dict, device: torch.device, dtype: torch.dtype | None) -> Any:
        """-> function(*args, **kwargs) in an engine that computes in `dtype`."""
        # A stranger's weights are float32 all the same.
        half = dtype in (torch.bfloat16, torch.float16)
        with torch.autocast(device.type, dtype=dtype if half else None, enabled=half):
            return self.function(*args, **kwargs)


@dataclass
class Program:
    """output = ops(inputs).

    Attributes:
        inputs: values that are given.
        ops: in order of execution.
        output: the value that is asked for.
        notes: what could not be written as ops, and why.
        count: of values so far.
    """

    inputs: list[int] = field(default_factory=list)
    ops: list[Op] = field(default_factory=list)
    output: int = 0
    notes: list[str] = field(default_factory=list)
    count: int = 0

    def new(self) -> int:
        self.count += 1
        return self.count - 1

    def emit(self, kind: type[Op], **fields: Any) -> Ref:
        """-> the value of a new op."""
        op = kind(out=self.new(), **fields)
        self.ops.append(op)
        return Ref(op.out)

    def uses(self) -> dict[int, int]:
        """-> how often each value is read. The output is read once more."""
        found: dict[int, int] = dict.fromkeys(range(self.count), 0)
        for value in [v for op in self.ops for v in op.inputs()] + [self.output]:
            found[value] += 1
        return found


def map_tree(function: Callable[[Any], Any], tree: Any) -> Any:
    """-> the arguments of a call with function(leaf) for each leaf. Tuples, lists, dicts and slices are opened."""
    kind = type(tree)
    if kind in (tuple, list):
        return kind(map_tree(function, item) for item in tree)
    if isinstance(tree, tuple | list) and not isinstance(tree, torch.Size):  # fx's immutable lists, named tuples
        items = [map_tree(function, item) for item in tree]
        return kind(*items) if hasattr(tree, "_fields") else items if isinstance(tree, list) else tuple(items)
    if isinstance(tree, dict):
        return {key: map_tree(function, item) for key, item in tree.items()}
    if kind is slice:
        return slice(*(map_tree(function, item) for item in (tree.start, tree.stop, tree.step)))
    return function(tree)


def refs(tree: Any) -> list[int]:
    """-> the values inside arguments."""
    found: list[int] = []
    map_tree(lambda leaf: found.append(leaf.value) if isinstance(leaf, Ref) else None, tree)
    return found


def affine(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """y = scale[c] * x[:, c] + shift[c] in the dtype of scale and shift [C]. x is [N, C, ...], y has the dtype of x."""
    # Not F.batch_norm: some torch releases refuse an eps of 0.
    scale, shift = (v.view(-1, *[1] * (x.dim() - 2)) for v in (scale, shift))
    return torch.addcmul(shift, x.to(scale.dtype), scale).to(x.dtype)


def batch_norm_affine(norm: nn.modules.batchnorm._BatchNorm) -> tuple[Tensor, Tensor]:
    """-> scale, shift [C] in float64 with norm(x) = scale * x + shift in eval mode."""
    assert norm.running_mean is not None and norm.running_var is not None  # in eval mode it normalises by these
    mean, var = norm.running_mean.detach().double(), norm.running_var.detach().double()
    scale = (var + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.detach().double()
    shift = -mean * scale
    if norm.bias is not None:
        shift = shift + norm.bias.detach().double()
    return scale, shift
