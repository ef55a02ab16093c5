"""Frozen modules in eval mode -> a Program.

A BatchNorm on its running statistics is y = scale * x + shift with scale = weight / sqrt(var + eps) and
shift = bias - mean * scale, in float64 here and cast once by the engine. Behind a convolution the affine goes into the
weights. Elsewhere (BN-ReLU-conv) an affine stays at the operand, since the padding comes behind the affine.
"""

import copy
import operator
from collections.abc import Callable, Container, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import fx, nn

from ..attach import OwnMethod
from .code import TRUSTED
from .forms import Carried, Form, flatten
from .program import Add, Affine, Call, Cat, Conv, Program, Ref, Relu, Size, batch_norm_affine, map_tree
from .simplify import simplify
from .trace import IN_PLACE, Trace, Unlowerable, gives_size, trace
from .units import Unit

# A norm on running statistics, then the submodules of these names: the class says so, by exact name.
NORM_ACTS = {("timm.layers.norm_act", "BatchNormAct2d"): ("drop", "act")}
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm)


def lower_chain(units: Sequence[Unit], num_inputs: int, as_they_are: Container[nn.Module] = ()) -> Program:
    """-> the Program of unit_n(... unit_1(inputs)).

    Args:
        as_they_are: units that are called and not written as ops.
    """
    program = Program()
    lowering = Lowering(program)
    inputs, x = tuple(Ref(program.new()) for _ in range(num_inputs)), None
    program.inputs = [value.value for value in inputs]
    for unit in units:
        module, (args, kwargs) = unit.module, unit.call.fill(x, inputs)
        if module in as_they_are:
            output = lowering.call(module.forward, args, kwargs, unit.name)
        else:
            output = lowering.module(module, args, kwargs, type(module).__name__)
        x = lowering.carried(output, unit.result)
    program.output = cast("Ref", x).value
    return simplify(program)


def lower_units(*units: nn.Module) -> Program:
    """-> the Program of unit_n(... unit_1(x)), each a function of one tensor."""
    program = Program()
    x = Ref(program.new())
    program.inputs = [x.value]
    for unit in units:
        x = Lowering(program).module(unit, (x,), {}, type(unit).__name__)
    program.output = x.value
    return simplify(program)


class Lowering:
    """Writes modules as ops of a program.

    Attributes:
        program: is added to.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self.forgotten = set[int]()
        self.renamed: dict[int, int] = {}  # what was changed in place is a new value from then on

    def carried(self, output: Any, form: Form) -> Ref:
        """-> the value that goes on, out of what a unit returned."""
        at = form.leaves.index(Carried)
        if isinstance(output, Ref):
            return output if form.spec.is_leaf() else self.call(_leaf, (output, at), {}, "result")
        return self.current(flatten(output)[0][at])

    def current(self, leaf: Any) -> Any:
        while isinstance(leaf, Ref) and leaf.value in self.renamed:
            leaf = Ref(self.renamed[leaf.value])
        if isinstance(leaf, Ref) and leaf.value in self.forgotten:
            raise Unlowerable("it reads what may share memory with what was changed in place")
        return leaf

    def module(self, module: nn.Module, args: tuple, kwargs: dict, name: str, *, inner: bool = False) -> Any:
        program = self.program
        mark = len(program.ops), dict(self.renamed), set(self.forgotten)
        try:
            if replaced := _replaced(module):
                raise Unlowerable(f"its {replaced} was replaced on the instance")
            known = None
            if len(args) == 1 and isinstance(args[0], Ref) and not kwargs:
                known = self._known(module, args[0])
            if known is None and _is_torch(module):
                known = self._torch_module(module, args, kwargs, name)
            sequential = type(module) is nn.Sequential
            return known or self._graph(trace(module, args, kwargs), args, kwargs, inner or not sequential)
        except Unlowerable as error:
            del program.ops[mark[0] :]
            self.renamed, self.forgotten = mark[1], mark[2]
            if inner and not _of_library(module):
                raise  # it may write what it is given, which the code around it sees
            program.notes.append(f"{name} ({type(module).__name__}) runs as it is: {error}")
            return self.call(module.forward, args, kwargs, name)

    def call(self, function: Callable, args: tuple, kwargs: dict, name: str, **flags: Any) -> Ref:
        return self.program.emit(Call, function=function, args=tuple(args), kwargs=dict(kwargs), name=name, **flags)

    def _known(self, module: nn.Module, x: Ref) -> Ref | None:
        """The op of a module of torch's, or of another class that is known by name."""
        emit, kind = self.program.emit, type(module)
        if kind is nn.Conv2d and module.padding_mode == "zeros" and not isinstance(module.padding, str):
            return emit(Conv, x=x.value, module=module)
        then = _norm_act(module)
        if (kind in NORMS or then) and module.running_mean is not None and not module.training:
            scale, shift = batch_norm_affine(cast("nn.modules.batchnorm._BatchNorm", module))
            y = emit(Affine, x=x.value, scale=scale, shift=shift)
            for name in then or ():
                y = self.module(getattr(module, name), (y,), {}, name)
            return y
        if kind is nn.ReLU:
            return emit(Relu, x=x.value)
        if kind is nn.Identity or (isinstance(module, nn.modules.dropout._DropoutNd) and not module.training):
            return x
        return None

    def _torch_module(self, module: nn.Module, args: tuple, kwargs: dict, name: str) -> Ref:
        if getattr(module, "inplace", False):
            copied: Any = copy.copy(module)  # shares its tensors; the caller sees to what it changed
            copied.inplace = False
            module = copied
        averages = type(module) is nn.AvgPool2d and not any(_pair(module.padding)) and not module.ceil_mode
        flags = {"any_layout": isinstance(module, LAYOUT_SAFE), "averages": module if averages else None}
        return self.call(module.forward, args, kwargs, name, **flags)

    def _graph(self, traced: Trace, args: tuple, kwargs: dict, inner: bool) -> Any:
        remaining = iter(_given((args, kwargs)))
        env: dict[fx.Node, Any] = {}

        def look_up(tree: Any) -> Any:
            return map_tree(lambda leaf: self.current(env[leaf] if isinstance(leaf, fx.Node) else leaf), tree)

        for node in traced.graph.nodes:
            if node.op == "placeholder":
                env[node] = next(remaining)
                continue
            if node.op == "get_attr":
                env[node] = traced.constants[node.target]
                continue
            args, kwargs = look_up(tuple(node.args)), look_up(dict(node.kwargs))
            if node.op == "output":
                return args[0]
            if node.op == "call_module":
                module = traced.modules[node.target]
                env[node] = self.module(module, args, kwargs, node.target, inner=inner)
                in_place = getattr(module, "inplace", False)
            else:
                env[node], in_place = self._function(node, args, kwargs)
                if gives_size(node) and isinstance(env[node], Ref):
                    env[node] = Size(env[node].value)
            if in_place and isinstance(args[0], Ref) and env[node] != args[0]:
                self._forget_aliases(args[0].value)
                self.renamed[args[0].value] = env[node].value
        raise Unlowerable("graph without output")

    def _forget_aliases(self, value: int) -> None:
        """What may share memory with a value that was changed in place must not be read any more."""
        aliases = {value}
        for op in reversed(self.program.ops):
            if isinstance(op, Call) and _may_be_view(op) and op.out in aliases:
                aliases.update(op.inputs())
        for op in self.program.ops:
            if isinstance(op, Call) and _may_be_view(op) and aliases.intersection(op.inputs()):
                aliases.add(op.out)
        self.forgotten |= aliases - {value}

    def _function(self, node: fx.Node, args: tuple, kwargs: dict) -> tuple[Any, bool]:
        """-> what the call gives, and whether the call also changed its first argument."""
        target, emit = node.target, self.program.emit
        name = target if isinstance(target, str) else getattr(target, "__name__", str(target))
        if target is operator.getitem and isinstance(args[0], tuple | list | dict) and not isinstance(args[1], Ref):
            return args[0][args[1]], False
        tensors = bool(args) and isinstance(args[0], Ref)
        in_place = bool(kwargs.get("inplace", False))
        if tensors and (target in (F.relu, torch.relu, torch.relu_) or name in ("relu", "relu_")):
            return emit(Relu, x=args[0].value), in_place or name == "relu_"
        adds = target in (operator.add, operator.iadd, torch.add) or name in ("add", "add_")
        if adds and tensors and len(args) == 2 and isinstance(args[1], Ref) and not kwargs and _of_images(node):
            return emit(Add, a=args[0].value, b=args[1].value), target is operator.iadd or name == "add_"
        if target in (torch.cat, torch.concat) and isinstance(args[0], list | tuple):
            dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
            if dim == 1 and all(isinstance(x, Ref) for x in args[0]):
                return emit(Cat, xs=[x.value for x in args[0]]), False
        if target is F.dropout and (args[2] if len(args) > 2 else kwargs.get("training", True)) is False:
            return args[0], False
        if target in IN_PLACE and tensors and isinstance(args[1], int | float) and hasattr(operator, name[1:]):
            return self.call(getattr(operator, name[1:]), args, {}, name[1:]), True
        if in_place or mutates(node):
            raise Unlowerable(f"{name} changes its argument in place")
        if isinstance(target, str):
            return self.call(_call_method, (name, *args), kwargs, name), False
        return self.call(target, args, kwargs, name), False


def _leaf(tree: Any, at: int) -> Any:
    return flatten(tree)[0][at]


def _call_method(name: str, obj: Any, *args: Any, **kwargs: Any) -> Any:
    return getattr(obj, name)(*args, **kwargs)


def _given(tree: Any) -> list[Ref]:
    """-> the values among arguments, each once."""
    found: dict[Ref, None] = {}
    map_tree(lambda leaf: found.setdefault(leaf) if isinstance(leaf, Ref) else None, tree)
    return list(found)


def _of_images(node: fx.Node) -> bool:
    """Whether an add joins two results of modules or functions, so that both are tensors and not sizes."""
    return all(isinstance(arg, fx.Node) and not gives_size(arg) for arg in node.args)


def mutates(node: fx.Node) -> bool:
    """Whether a function or method call of a traced graph writes one of its arguments."""
    if node.kwargs.get("inplace") or "out" in node.kwargs:
        return True
    if isinstance(node.target, str):  # a method
        in_place = {f"__{name}__" for name in ("setitem", *(function.__name__ for function in IN_PLACE))}
        return (node.target.endswith("_") and not node.target.endswith("__")) or node.target in in_place
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.is_mutable
    name = getattr(node.target, "__name__", "")
    return node.target in (operator.setitem, *IN_PLACE) or (name.endswith("_") and not name.endswith("__"))


LAYOUT_SAFE = (
    nn.modules.pooling._MaxPoolNd,
    nn.modules.pooling._AvgPoolNd,
    nn.modules.pooling._AdaptiveAvgPoolNd,
    nn.modules.pooling._AdaptiveMaxPoolNd,
    nn.Linear,
    nn.ReLU6, nn.SiLU, nn.GELU, nn.Hardswish, nn.Hardsigmoid, nn.Sigmoid, nn.Tanh, nn.LeakyReLU, nn.ELU, nn.Upsample,
)  # fmt: skip
VIEWS = (nn.Flatten, nn.Unflatten, nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle)


def _norm_act(module: nn.Module) -> tuple[str, ...] | None:
    return NORM_ACTS.get((type(module).__module__, type(module).__qualname__))


def _replaced(module: nn.Module) -> str | None:
    """-> a method on the instance that is another one than the class's, where what the class does is relied on."""
    by_class = _is_torch(module) or _norm_act(module)
    for name, value in vars(module).items():
        own = getattr(type(module), name, None)
        # A copy that was made in mid-run has the methods of its class on the instance.
        is_own = getattr(value, "__func__", None) is own and getattr(value, "__self__", None) is module
        if isinstance(value, OwnMethod) or not callable(own) or is_own:
            continue
        if by_class or name == "forward":
            return name
    return None


def _is_torch(module: nn.Module) -> bool:
    containers = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
    return type(module).__module__.startswith("torch.nn") and not isinstance(module, containers)


def _may_be_view(op: Call) -> bool:
    """Whether what a call gives may share memory with what the call is given."""
    module = getattr(op.function, "__self__", None)
    if isinstance(module, nn.Module):
        return not _is_torch(module) or isinstance(module, VIEWS)
    return op.function is operator.getitem or getattr(op.function, "__module__", None) != "_operator"


def _of_library(module: nn.Module) -> bool:
    return all(type(each).__module__.split(".")[0] in TRUSTED for each in module.modules())


def _pair(value: int | tuple) -> tuple:
    return value if isinstance(value, tuple) else (value, value)
