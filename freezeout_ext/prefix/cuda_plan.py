"""A Program's steps -> what a GPU runs: affines in their convolutions, concatenations side by side in one buffer."""

from dataclasses import dataclass, field

from torch import nn

from .folding import Add, Affine, Call, Cat, Conv, Program, Relu, Step, refs

# Channels of a block's buffer: each pixel then starts on a 16-byte boundary, for any dtype and any slice of 8 bytes.
PADDING = 16


@dataclass
class FusedConv(Step):
    """y = conv(before(x)) with conv's own add and ReLU, and after(y) beside it.

    `out` is y, `after.out` the second value.
    """

    conv: Conv
    before: Affine | None = None
    after: Affine | None = None

    def inputs(self) -> list[int]:
        first = self.conv.x if self.before is None else self.before.x
        return [first] if self.conv.add is None else [first, self.conv.add]


@dataclass
class PooledAffine(Step):
    """y = avg_pool2x2(affine(x)), the affine with its ReLU."""

    affine: Affine

    def inputs(self) -> list[int]:
        return [self.affine.x]


@dataclass
class Block:
    """The buffer of values that are concatenated: [N, channels, H, W] channels-last, `pieces` one after the other."""

    pieces: list[int]
    channels: int


@dataclass
class Plan:
    """Steps in order of execution, and which values lie in a Block: value -> (block, first channel, channels).

    `joined` are the concatenations whose pieces all lie where it needs them: nothing is left to do for them.
    """

    steps: list[Step]
    places: dict[int, tuple[Block, int, int]] = field(default_factory=dict)
    joined: set[int] = field(default_factory=set)
    dead_after: list[list[int]] = field(default_factory=list)


def plan(program: Program) -> Plan:
    """-> the Plan that computes what the program does."""
    steps = _fuse(program)
    found = Plan(steps)
    _place(program, found)
    last: dict[int, int] = {}
    for i, step in enumerate(steps):
        for value in [*step.inputs(), *outs(step)]:
            last[value] = i
    found.dead_after = [[] for _ in steps]
    for value in set(last) - set(refs(program.outputs)):
        found.dead_after[last[value]].append(value)
    return found


def outs(step: Step) -> list[int]:
    """The values that a step makes."""
    return [step.out, step.after.out] if isinstance(step, FusedConv) and step.after is not None else [step.out]


def is_triton_conv(module: nn.Module) -> bool:
    """Whether the 1x1 and 3x3 kernels compute this convolution."""
    if not isinstance(module, nn.Conv2d) or module.groups != 1 or module.stride[0] != module.stride[1]:
        return False
    size, padding = module.kernel_size, module.padding
    return (size, padding) == ((1, 1), (0, 0)) or ((size, padding) == ((3, 3), (1, 1)) and module.dilation == (1, 1))


def _fuse(program: Program) -> list[Step]:
    uses = program.uses()
    made = {step.out: step for step in program.steps}
    taken: set[int] = set()  # affines that run inside another step, by value
    steps: list[Step] = []
    for step in program.steps:
        convolves = isinstance(step, Conv) and isinstance(step.module, nn.Conv2d)
        before = made.get(step.x if convolves else _pooled(step))
        if not isinstance(before, Affine) or not before.relu or uses[before.out] != 1:
            before = None
        if convolves and not (step.module.kernel_size == (1, 1) and is_triton_conv(step.module)):
            before = None
        if before is not None:
            taken.add(before.out)
        if convolves:
            step = FusedConv(step.out, step, before)
        elif before is not None:
            step = PooledAffine(step.out, before)
        steps.append(step)
    convs = {step.out: step for step in steps if isinstance(step, FusedConv)}
    for step in program.steps:
        conv = convs.get(step.x) if isinstance(step, Affine) and step.relu and step.out not in taken else None
        if conv is not None and conv.after is None:
            conv.after = step
            taken.add(step.out)
    return [step for step in steps if not (isinstance(step, Affine) and step.out in taken)]


def _pooled(step: Step) -> int | None:
    """The value that a 2x2 average pooling without padding pools."""
    pool = step.averages if isinstance(step, Call) else None
    if pool is None or pool.divisor_override or len(step.args) != 1 or step.kwargs:
        return None
    both = (pool.kernel_size, pool.stride)
    return step.args[0].value if all(size in (2, (2, 2)) for size in both) else None


def _place(program: Program, found: Plan) -> None:
    channels, places = _channels(program), found.places
    pieces_of: dict[int, list[int]] = {}
    blocks: list[Block] = []
    for step in found.steps:
        if not isinstance(step, Cat):
            continue
        # A concatenation of a concatenation is one of all pieces.
        pieces = [piece for x in step.xs for piece in pieces_of.get(x, [x])]
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
        found.joined.add(step.out)
        pieces_of[step.out] = pieces
        places[step.out] = (block, 0, sum(channels[piece] for piece in pieces))
    for block in blocks:
        block.channels += -block.channels % PADDING


def _channels(program: Program) -> dict[int, int]:
    """The channels of the values where the steps say them."""
    found: dict[int, int] = {}
    for step in program.steps:
        if isinstance(step, Conv) and isinstance(step.module, nn.Conv2d):
            found[step.out] = step.module.out_channels
        elif isinstance(step, Affine):
            found[step.out] = step.scale.numel()
        elif isinstance(step, Cat) and all(x in found for x in step.xs):
            found[step.out] = sum(found[x] for x in step.xs)
        elif _keeps_channels(step) and step.inputs()[0] in found:
            found[step.out] = found[step.inputs()[0]]
    return found


def _keeps_channels(step: Step) -> bool:
    return isinstance(step, Relu | Add) or (isinstance(step, Call) and step.any_layout)  # pooling and activations
