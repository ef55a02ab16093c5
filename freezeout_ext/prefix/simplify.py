"""A Program rewritten: affines in the weights, each op with its add and its ReLU, pooling before 1x1 convolutions."""

from collections.abc import Callable

from .program import Add, Affine, Call, Conv, Op, Program, Ref, Relu


def simplify(program: Program) -> Program:
    """Folds affines into convolutions, pools before 1x1 convolutions, and gives each op its ReLU and its add."""
    _drop_unused(program)
    for rewrite in (_fold_affine, _pool_first, _take_relu, _take_add, _take_relu):
        _rewrite_pairs(program, rewrite)
    _drop_unused(program)
    return program


def _rewrite_pairs(program: Program, rewrite: Callable[[Op, Op], str]) -> None:
    """Calls rewrite(producer, op) where `op` alone uses what `producer` gives.

    The rewrite returns "" (nothing done), "taken" (the producer now does both, at the op's place) or "swapped" (the op
    now runs first and the producer uses what the op gives).
    """
    uses = program.uses()
    ops: list[Op] = []
    producer: dict[int, Op] = {}
    for op in program.ops:
        done = ""
        for value in op.inputs():
            made = producer.get(value)
            if made is not None and uses[value] == 1 and (done := rewrite(made, op)):
                ops = [s for s in ops if s is not made]
                ops += [made] if done == "taken" else [op, made]
                producer[made.out] = made
                break
        if not done:
            ops.append(op)
        if done != "taken":
            producer[op.out] = op
    program.ops = ops


def _fold_affine(made: Op, op: Op) -> str:
    if not (isinstance(made, Conv) and isinstance(op, Affine)) or made.relu or made.add is not None:
        return ""
    if made.scale is None or made.shift is None:
        made.scale, made.shift = op.scale, op.shift
    else:
        made.scale, made.shift = made.scale * op.scale, made.shift * op.scale + op.shift
    made.relu, made.out = op.relu, op.out
    return "taken"


def _take_relu(made: Op, op: Op) -> str:
    if isinstance(op, Relu) and isinstance(made, Affine | Conv | Add):
        made.relu, made.out = True, op.out
        return "taken"
    return ""


def _take_add(made: Op, op: Op) -> str:
    if not isinstance(op, Add) or not isinstance(made, Conv) or made.relu or made.add is not None:
        return ""
    if op.a == op.b:
        return ""
    made.add = op.b if op.a == made.out else op.a
    made.relu, made.out = op.relu, op.out
    return "taken"


def _pool_first(made: Op, op: Op) -> str:
    """pool(conv1x1(x)) = conv1x1(pool(x)): the convolution then runs on fewer pixels."""
    if not (isinstance(made, Conv) and isinstance(op, Call) and op.averages):
        return ""
    conv = made.module
    if made.relu or made.add is not None or conv.kernel_size != (1, 1) or conv.stride != (1, 1) or any(conv.padding):
        return ""
    pooled, out = made.out, op.out
    op.args, op.out = (Ref(made.x),), pooled
    made.x, made.out = pooled, out
    return "swapped"


def _drop_unused(program: Program) -> None:
    needed = {program.output}
    kept: list[Op] = []
    for op in reversed(program.ops):
        if op.out in needed or _asserts(op):
            kept.append(op)
            needed.update(op.inputs())
    program.ops = kept[::-1]


def _asserts(op: Op) -> bool:
    """Whether the op raises for some values, as torch._assert and torch._check."""
    return isinstance(op, Call) and getattr(op.function, "__name__", "").startswith(("_assert", "_check"))
