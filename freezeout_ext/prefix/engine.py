"""The interpreter of Programs: y = program(*inputs). cpu.py and cuda.py are the two tables of ops."""

from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .program import Add, Affine, Call, Cat, Conv, Op, Program, Ref, Relu, affine, map_tree

CHANNELS_LAST = torch.channels_last


@dataclass(eq=False)
class Block:
    """The buffer of values that are concatenated: [N, channels, H, W] channels-last, `pieces` one after the other."""

    pieces: list[int]
    channels: int


@dataclass
class Run:
    """One call of an engine.

    Attributes:
        values: by number, each until its last use.
        blocks: their buffers.
        way: how convolutions run, where there is more than one way.
    """

    values: dict[int, Any]
    device: torch.device
    blocks: dict[Block, Tensor] = field(default_factory=dict)
    way: Callable[[Any], Hashable] | None = None


class Engine:
    """(y,) = program(*inputs), computed in `dtype`.

    Images are channels-last. Values that are concatenated lie side by side in one buffer from the start, where their
    channels are known. y is in memory that later calls leave alone.

    Args:
        program: what is computed.
        dtype: of images, weights and products.
        output_dtype: the wanted dtype of y.
        channels_last: whether y is wanted channels-last, as eager gives it.
    """

    padding = 1  # channels of a block's buffer are a multiple
    tolerance = 0.0  # the error against eager that the precision explains, 0 where the mode's own does

    def __init__(self, program: Program, *, dtype: torch.dtype, output_dtype: torch.dtype, channels_last: bool) -> None:
        self.program, self.dtype = program, dtype
        self.weights: dict[Any, tuple] = {}  # folded, by op and what else they depend on
        self.output_dtype, self.channels_last = output_dtype, channels_last
        self.notes = list(program.notes)
        self.ops = self.fuse(program)
        self.places, self.joined = place(program, self.ops, self.padding)
        self.dead_after = last_uses(program, self.ops)

    def fuse(self, program: Program) -> list[Op]:
        """-> the ops that run."""
        return program.ops

    @property
    def bytes_held(self) -> int:
        """Of folded weights."""
        tensors = [t for constants in self.weights.values() for t in constants if t is not None]
        return sum(t.numel() * t.element_size() for t in tensors)  # a packed one has no nbytes

    @property
    def fallbacks(self) -> list[str]:
        return self.notes

    def fused(self) -> dict[str, int]:
        """How many ops of each kind there are."""
        return dict(Counter(map(self.name, self.ops)))

    def name(self, op: Op) -> str:
        relu = "+relu" * (getattr(op, "relu", False) is True)
        if isinstance(op, Conv):
            name = "affine+relu+" * (op.before is not None) + "conv"
            name += "+bn" * (op.scale is not None) + "+add" * (op.add is not None) + relu
            return name + " and affine+relu" * (op.after is not None)
        if isinstance(op, Cat):
            return "cat in a block buffer" if op.out in self.joined else "cat"
        return type(op).__name__.lower() + relu

    def run(self, inputs: tuple[Tensor, ...], way: Callable | None = None) -> Tensor:
        """-> y as the last op left it."""
        state = Run(dict(zip(self.program.inputs, inputs, strict=True)), inputs[0].device, way=way)
        with torch.autocast(state.device.type, enabled=False):
            for op, dead in zip(self.ops, self.dead_after, strict=True):
                results = getattr(self, type(op).__name__.lower())(op, state)
                for value, result in zip(op.outs(), results, strict=True):
                    state.values[value] = self._placed(value, result, state)
                for value in dead:
                    state.values.pop(value, None)
        return state.values[self.program.output]

    def finish(self, y: Tensor) -> Tensor:
        """-> y as eager gives it, in memory that the next call leaves alone."""
        last = CHANNELS_LAST if self.channels_last and y.dim() == 4 else torch.contiguous_format
        return y.to(self.output_dtype, copy=True, memory_format=last)

    # Memory

    def empty(self, shape: tuple[int, ...], state: Run) -> Tensor:
        """-> images [N, C, H, W], unwritten."""
        return torch.empty(tuple(shape), dtype=self.dtype, device=state.device, memory_format=CHANNELS_LAST)

    def target(self, value: int, shape: tuple[int, ...], state: Run) -> Tensor:
        """-> where the value is to be written: its slice of a block's buffer, or memory of its own."""
        placed = self.place_of(value, shape, state)
        return self.empty(shape, state) if placed is None else placed

    def place_of(self, value: int, shape: tuple[int, ...], state: Run) -> Tensor | None:
        """-> the slice of a block's buffer where the value lies, None where the value lies in no block."""
        if value not in self.places or len(shape) != 4:
            return None
        block, first, channels = self.places[value]
        if block not in state.blocks:
            state.blocks[block] = self.empty((shape[0], block.channels, *shape[2:]), state)
        return state.blocks[block][:, first : first + channels]

    def _placed(self, value: int, result: Any, state: Run) -> Any:
        """-> the result at its place, copied there where the op could not write to that place."""
        place = self.place_of(value, result.shape, state) if isinstance(result, Tensor) else None
        if place is None:
            return result
        if result.data_ptr() != place.data_ptr() or result.stride() != place.stride():
            place.copy_(result)
        return place

    def image(self, x: Any) -> Any:
        """-> x in the engine's dtype, channels-last where x is an image. Channel slices stay as they are."""
        if not isinstance(x, Tensor) or not x.is_floating_point():
            return x
        x = x.to(self.dtype)
        return x if x.dim() != 4 or pixel_stride(x) else x.contiguous(memory_format=CHANNELS_LAST)

    def residual(self, op: Conv, shape: tuple[int, ...], state: Run) -> Tensor | None:
        """-> what a convolution with results of this shape adds."""
        if op.add is None:
            return None
        added = self.image(state.values[op.add])
        return added if added.shape == shape else added.expand(shape).contiguous(memory_format=CHANNELS_LAST)

    # Ops: each returns one result for each of its values

    def affine(self, op: Affine, state: Run) -> tuple[Tensor]:
        y = affine(self.image(state.values[op.x]), *self.affine_constants(op))
        return (y.relu_() if op.relu else y,)

    def add(self, op: Add, state: Run) -> tuple[Tensor]:
        y = torch.add(self.image(state.values[op.a]), self.image(state.values[op.b]))
        return (y.relu_() if op.relu else y,)

    def relu(self, op: Relu, state: Run) -> tuple[Tensor]:
        return (torch.relu(self.image(state.values[op.x])),)

    def cat(self, op: Cat, state: Run) -> tuple[Tensor]:
        pieces = [self.image(state.values[x]) for x in op.xs]
        if op.out in self.joined and pieces[0].dim() == 4:
            place = self.place_of(op.out, pieces[0].shape, state)
            assert place is not None  # what is joined is a block
            return (place,)
        return (torch.cat(pieces, 1),)

    def call(self, op: Call, state: Run) -> tuple[Any]:
        def given(leaf: Any) -> Any:
            value = state.values[leaf.value] if isinstance(leaf, Ref) else leaf
            if not isinstance(leaf, Ref) or not isinstance(value, Tensor):
                return value
            # A stranger may view or flatten its input in the order that eager has it, and casts what autocast casts:
            # times and angles stay as wide as they are.
            return self.image(value) if op.any_layout else value.contiguous()

        args, kwargs = map_tree(given, (op.args, op.kwargs))
        return (op.run(args, kwargs, state.device, self.dtype),)

    def affine_constants(self, op: Affine) -> tuple[Tensor, Tensor]:
        """-> scale, shift in float32 also for half precision, in float64 where the modules are."""
        if op.out not in self.weights:
            wide = torch.float64 if self.dtype == torch.float64 else torch.float32
            self.weights[op.out] = (op.scale.to(wide), op.shift.to(wide))
        return self.weights[op.out]


def last_uses(program: Program, ops: list[Op]) -> list[list[int]]:
    """-> for each op the values that nothing needs after it."""
    last: dict[int, int] = {}
    for i, op in enumerate(ops):
        for value in [*op.inputs(), *op.outs()]:
            last[value] = i
    dead: list[list[int]] = [[] for _ in ops]
    for value in set(last) - {program.output}:
        dead[last[value]].append(value)
    return dead


def place(program: Program, ops: list[Op], padding: int) -> tuple[dict[int, tuple[Block, int, int]], set[int]]:
    """-> value: (block, first channel, channels) of what is concatenated, and the Cats with nothing left to do."""
    channels = channels_of(program)
    places: dict[int, tuple[Block, int, int]] = {}
    joined: set[int] = set()
    pieces_of: dict[int, list[int]] = {}
    blocks: list[Block] = []
    for op in ops:
        if not isinstance(op, Cat):
            continue
        # A concatenation of a concatenation is one of all pieces.
        pieces = [piece for x in op.xs for piece in pieces_of.get(x, [x])]
        if len(set(pieces)) < len(pieces) or any(piece not in channels for piece in pieces):
            continue
        block = next((b for b in blocks if pieces[: len(b.pieces)] == b.pieces), None)
        new = pieces if block is None else pieces[len(block.pieces) :]
        if any(piece in places for piece in new):
            continue
        if block is None:
            block = Block([], 0)
            blocks.append(block)
        for piece in new:
            places[piece] = (block, block.channels, channels[piece])
            block.pieces.append(piece)
            block.channels += channels[piece]
        joined.add(op.out)
        pieces_of[op.out] = pieces
        places[op.out] = (block, 0, sum(channels[piece] for piece in pieces))
    for block in blocks:
        block.channels += -block.channels % padding
    return places, joined


def channels_of(program: Program) -> dict[int, int]:
    """-> the channels of the values that ops make, where the ops say them."""
    found: dict[int, int] = {}
    for op in program.ops:
        if isinstance(op, Conv):
            found[op.out] = op.module.out_channels
        elif isinstance(op, Affine):
            found[op.out] = op.scale.numel()
        elif isinstance(op, Cat) and all(x in found for x in op.xs):
            found[op.out] = sum(found[x] for x in op.xs)
        elif isinstance(op, Relu | Add) or (isinstance(op, Call) and op.any_layout):  # pooling and activations
            known = [found.get(x) for x in op.inputs()]
            if known and known[0] is not None and len(set(known)) == 1:
                found[op.out] = known[0]
    return found


def pixel_stride(x: Tensor) -> int | None:
    """-> elements from one pixel of channels-last images to the next, None where x is no slice of channels of such."""
    n, c, h, w = x.shape
    steps = [(w, x.stride(3), 1), (h, x.stride(2), w), (n, x.stride(0), h * w)]
    stride = next((step // pixels for size, step, pixels in steps if size > 1), c)
    even = all(size == 1 or step == stride * pixels for size, step, pixels in steps)
    return stride if even and stride >= c and (c == 1 or x.stride(1) == 1) else None
