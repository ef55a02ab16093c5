"""Frozen modules in eval mode -> a Program: a straight list of steps in which every BatchNorm is a constant.

A BatchNorm on its running statistics is y = scale * x + shift with scale = weight / sqrt(var + eps) and
shift = bias - mean * scale, in float64 here and cast once by the runtime. Behind a convolution or linear it goes into
the weights; elsewhere (BN-ReLU-conv) it stays an affine at the operand, since the padding is applied behind it.

Runtimes for several devices read the same Program: `cpu.py`, `cuda.py`.
"""

import copy
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_map


@dataclass(frozen=True)
class Ref:
    """The number of a value in a Program, where an argument may hold other things too."""

    value: int


@dataclass
class Step:
    out: int

    def inputs(self) -> list[int]:
        raise NotImplementedError


@dataclass
class Affine(Step):
    """y = relu?(scale[c] * x[:, c] + shift[c]), scale and shift [C] in float64."""

    x: int
    scale: Tensor
    shift: Tensor
    relu: bool = False
    source: tuple[nn.Module, ...] = ()

    def inputs(self) -> list[int]:
        return [self.x]


@dataclass
class Conv(Step):
    """y = relu?(conv(x) * scale[c] + shift[c] + add), the scale and shift folded into the weights by `folded()`.

    `module` is an nn.Conv2d with zero padding or an nn.Linear; `key` tells apart foldings of the same module.
    """

    x: int
    module: nn.Conv2d | nn.Linear
    scale: Tensor | None = None
    shift: Tensor | None = None
    add: int | None = None
    relu: bool = False
    key: tuple[nn.Module, ...] = ()

    def inputs(self) -> list[int]:
        return [self.x] if self.add is None else [self.x, self.add]

    def folded(self) -> tuple[Tensor, Tensor | None]:
        """-> weight, bias in float64 (the module's own shapes), the scale and shift in them."""
        weight = self.module.weight.detach().double()
        bias = None if self.module.bias is None else self.module.bias.detach().double()
        if self.scale is not None:
            weight = weight * self.scale.reshape(-1, *[1] * (weight.dim() - 1))
            bias = self.shift if bias is None else bias * self.scale + self.shift
        return weight, bias


@dataclass
class Add(Step):
    """y = relu?(a + b)."""

    a: int
    b: int
    relu: bool = False

    def inputs(self) -> list[int]:
        return [self.a, self.b]


@dataclass
class Relu(Step):
    """y = relu(x)."""

    x: int

    def inputs(self) -> list[int]:
        return [self.x]


@dataclass
class Cat(Step):
    """y = cat(xs, 1)."""

    xs: list[int]

    def inputs(self) -> list[int]:
        return list(self.xs)


@dataclass
class Call(Step):
    """y = function(*args, **kwargs), values given as Ref inside args and kwargs.

    A module's is its own forward: what is installed on the module is the engine that runs this step.
    `any_layout`: the function may be given channels-last tensors. `averages`: the module, where it is an average over
    H, W windows without padding, which commutes with a 1x1 convolution.
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
    """Steps in order of execution. Values are numbers; `inputs` are given, `outputs` is a tuple with Refs in it."""

    inputs: list[int] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    outputs: tuple = ()
    notes: list[str] = field(default_factory=list)
    count: int = 0
    graphs: dict[nn.Module, fx.Graph] = field(default_factory=dict)  # traced before, for an earlier frontier
    renamed: dict[int, int] = field(default_factory=dict)  # what was changed in place is a new value from then on

    def new(self) -> int:
        self.count += 1
        return self.count - 1

    def uses(self) -> dict[int, int]:
        found: dict[int, int] = dict.fromkeys(range(self.count), 0)
        for value in [v for step in self.steps for v in step.inputs()] + refs(self.outputs):
            found[value] += 1
        return found


def refs(tree: Any) -> list[int]:
    found: list[int] = []
    tree_map(lambda leaf: found.append(leaf.value) if isinstance(leaf, Ref) else None, tree)
    return found


# Lowering: module or fx graph -> steps


class Unlowerable(Exception):
    """The module cannot be written as steps; it is called as it is."""


def lower_chain(units: Sequence[nn.Module], graphs: dict[nn.Module, fx.Graph] | None = None) -> Program:
    """-> the Program of unit_n(... unit_1(x)): one input, one output; traced graphs are kept in `graphs`."""
    program = Program(graphs={} if graphs is None else graphs)
    x: Any = Ref(program.new())
    program.inputs = [x.value]
    for unit in units:
        x = _lower_module(program, unit, (x,), {}, type(unit).__name__)
    program.outputs = (x,)
    return simplify(program)


def lower_graph(graph_module: fx.GraphModule) -> Program:
    """-> the Program of a traced graph whose inputs are its placeholders and whose output is a tuple."""
    program = Program()
    nodes = [node for node in graph_module.graph.nodes if node.op == "placeholder"]
    arguments = tuple(Ref(program.new()) for _ in nodes)
    program.inputs = [argument.value for argument in arguments]
    program.outputs = tuple(_lower_graph(program, graph_module, graph_module.graph, arguments))
    return simplify(program)


def _lower_graph(program: Program, root: nn.Module, graph: fx.Graph, arguments: tuple) -> Any:
    env: dict[fx.Node, Any] = {}
    renamed = program.renamed

    def current(leaf: Any) -> Any:
        while isinstance(leaf, Ref) and leaf.value in renamed:
            leaf = Ref(renamed[leaf.value])
        return leaf

    def look_up(tree: Any) -> Any:
        return tree_map(current, fx.node.map_arg(tree, lambda node: env[node]))

    remaining = iter(arguments)
    for node in graph.nodes:
        if node.op == "placeholder":
            env[node] = next(remaining)
            continue
        if node.op == "output":
            return look_up(node.args[0])
        args, kwargs = look_up(node.args), look_up(node.kwargs)
        if node.op == "get_attr":
            env[node] = _call(program, operator.attrgetter(node.target), (root,), {}, node.target)
        elif node.op == "call_module":
            module = root.get_submodule(node.target)
            env[node] = _lower_module(program, module, args, kwargs, node.target)
            if getattr(module, "inplace", False) and isinstance(args[0], Ref) and env[node] != args[0]:
                renamed[args[0].value] = env[node].value
        else:
            env[node], in_place = _lower_function(program, node, args, kwargs)
            if in_place and env[node] != args[0]:
                renamed[args[0].value] = env[node].value
    raise Unlowerable("graph without output")


def _lower_module(program: Program, module: nn.Module, args: tuple, kwargs: dict, name: str) -> Any:
    if len(args) == 1 and isinstance(args[0], Ref) and not kwargs:
        x, kind = args[0].value, type(module)
        if kind is nn.Conv2d and module.padding_mode == "zeros" and not isinstance(module.padding, str):
            return _emit(program, Conv, x=x, module=module, key=(module,))
        if kind is nn.Linear:
            return _emit(program, Conv, x=x, module=module, key=(module,))
        if kind in (nn.BatchNorm1d, nn.BatchNorm2d) and module.running_mean is not None and not module.training:
            scale, shift = batch_norm_affine(module)
            return _emit(program, Affine, x=x, scale=scale, shift=shift, source=(module,))
        if kind is nn.ReLU:
            return _emit(program, Relu, x=x)
        if kind is nn.Identity or (isinstance(module, nn.modules.dropout._DropoutNd) and not module.training):
            return args[0]
    if _is_torch(module):
        return _call_torch_module(program, module, args, kwargs, name)
    mark = len(program.steps), dict(program.renamed)
    try:
        if "forward" in module.__dict__:
            raise Unlowerable("its forward was replaced on the instance")
        graph = program.graphs.get(module) or _OneLevel().trace(module)
        program.graphs[module] = graph
        arguments = _bind(module, graph, args, kwargs)
        return _lower_graph(program, module, graph, arguments)
    except Exception as error:  # what a stranger's forward raises under tracing is not known
        del program.steps[mark[0] :]
        program.renamed = mark[1]
        program.notes.append(f"{name} ({type(module).__name__}) runs as it is: {first_line(error)}")
        return _call(program, module.forward, args, kwargs, name)


class _OneLevel(fx.Tracer):
    """Every submodule is a leaf: each is lowered by itself, so that one that does not trace stops only itself."""

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return True


def _bind(module: nn.Module, graph: fx.Graph, args: tuple, kwargs: dict) -> tuple:
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    if kwargs or any(str(node.target).startswith("*") for node in placeholders) or len(args) > len(placeholders):
        raise Unlowerable("called with keyword arguments")
    rest = placeholders[len(args) :]
    if any(not node.args for node in rest):
        raise Unlowerable("called with too few arguments")
    return args + tuple(node.args[0] for node in rest)


def _lower_function(program: Program, node: fx.Node, args: tuple, kwargs: dict) -> tuple[Any, bool]:
    """-> what the call gives, and whether it also changed its first argument."""
    target = node.target
    name = target if isinstance(target, str) else getattr(target, "__name__", str(target))
    if target is operator.getitem and isinstance(args[0], tuple | list | dict) and not isinstance(args[1], Ref):
        return args[0][args[1]], False
    tensors = bool(args) and isinstance(args[0], Ref)
    in_place = bool(kwargs.get("inplace", False)) or (target is F.relu and len(args) > 1 and bool(args[1]))
    if tensors and (target in (F.relu, torch.relu, torch.relu_) or name in ("relu", "relu_")):
        return _emit(program, Relu, x=args[0].value), in_place or name == "relu_"
    adds = target in (operator.add, operator.iadd, torch.add) or name in ("add", "add_")
    if adds and tensors and len(args) == 2 and isinstance(args[1], Ref) and not kwargs and is_image(node):
        return _emit(program, Add, a=args[0].value, b=args[1].value), target is operator.iadd or name == "add_"
    if target in (torch.cat, torch.concat) and isinstance(args[0], list | tuple):
        dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
        if dim == 1 and all(isinstance(x, Ref) for x in args[0]):
            return _emit(program, Cat, xs=[x.value for x in args[0]]), False
    if target is F.dropout and (args[2] if len(args) > 2 else kwargs.get("training", True)) is False:
        return args[0], False
    if in_place or mutates(node):
        raise Unlowerable(f"{name} changes its argument in place")
    if node.op == "call_method":
        return _call(program, _call_method, (name, *args), kwargs, name), False
    return _call(program, target, args, kwargs, name), False


def _call_method(name: str, obj: Any, *args: Any, **kwargs: Any) -> Any:
    return getattr(obj, name)(*args, **kwargs)


def is_image(node: fx.Node) -> bool:
    """Whether an add joins two results of modules or functions, so that both are tensors and not sizes."""
    return all(isinstance(arg, fx.Node) and not _gives_size(arg) for arg in node.args)


def _gives_size(node: fx.Node) -> bool:
    if node.op == "call_function" and node.target in (getattr, operator.getitem):
        return node.target is getattr or _gives_size(node.args[0])
    if node.op == "call_method":
        return node.target in ("size", "dim", "numel", "item", "tolist")
    arithmetic = (operator.add, operator.sub, operator.mul, operator.floordiv, operator.truediv)
    return node.target in arithmetic and any(isinstance(a, fx.Node) and _gives_size(a) for a in node.args)


IN_PLACE = {
    operator.setitem, operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ifloordiv,
    operator.ior, operator.iand, operator.ixor, operator.imatmul, operator.ipow, operator.imod,
}  # fmt: skip


def mutates(node: fx.Node) -> bool:
    """Whether a function or method call of a traced graph writes one of its arguments."""
    if node.kwargs.get("inplace") or "out" in node.kwargs:
        return True
    if node.op == "call_method":
        return (node.target.endswith("_") and not node.target.endswith("__")) or node.target == "__setitem__"
    if node.op == "call_function":
        name = getattr(node.target, "__name__", "")
        positional = node.target in (F.relu, F.relu6, F.selu, F.celu, F.silu, F.mish, F.hardswish, F.hardsigmoid)
        flagged = positional and len(node.args) > 1 and node.args[-1] is True
        return node.target in IN_PLACE or flagged or (name.endswith("_") and not name.endswith("__"))
    return False


LAYOUT_SAFE = (
    nn.modules.pooling._MaxPoolNd,
    nn.modules.pooling._AvgPoolNd,
    nn.modules.pooling._AdaptiveAvgPoolNd,
    nn.modules.pooling._AdaptiveMaxPoolNd,
    nn.ReLU6, nn.SiLU, nn.GELU, nn.Hardswish, nn.Hardsigmoid, nn.Sigmoid, nn.Tanh, nn.LeakyReLU, nn.ELU, nn.Upsample,
)  # fmt: skip


def _call_torch_module(program: Program, module: nn.Module, args: tuple, kwargs: dict, name: str) -> Ref:
    if getattr(module, "inplace", False):
        module = copy.copy(module)  # shares its tensors; the caller sees to what it changed
        module.inplace = False
    averages = type(module) is nn.AvgPool2d and not any(_pair(module.padding)) and not module.ceil_mode
    flags = {"any_layout": isinstance(module, LAYOUT_SAFE), "averages": module if averages else None}
    return _call(program, module.forward, args, kwargs, name, **flags)


def _is_torch(module: nn.Module) -> bool:
    containers = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
    return type(module).__module__.startswith("torch.nn") and not isinstance(module, containers)


def _emit(program: Program, kind: type[Step], **fields: Any) -> Ref:
    step = kind(out=program.new(), **fields)
    program.steps.append(step)
    return Ref(step.out)


def _call(program: Program, function: Callable, args: tuple, kwargs: dict, name: str, **flags: Any) -> Ref:
    return _emit(program, Call, function=function, args=tuple(args), kwargs=dict(kwargs), name=name, **flags)


def _pair(value: int | tuple) -> tuple:
    return value if isinstance(value, tuple) else (value, value)


def first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}".rstrip(": ")


def batch_norm_affine(norm: nn.modules.batchnorm._BatchNorm) -> tuple[Tensor, Tensor]:
    """-> scale, shift [C] in float64 with norm(x) = scale * x + shift in eval mode."""
    mean, var = norm.running_mean.detach().double(), norm.running_var.detach().double()
    scale = (var + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.detach().double()
    shift = -mean * scale
    if norm.bias is not None:
        shift = shift + norm.bias.detach().double()
    return scale, shift


def affine(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """y = scale[c] * x[:, c] + shift[c] in the dtype of scale and shift, [C]; x [N, C, ...], y in its dtype."""
    # Not F.batch_norm: some torch releases refuse an eps of 0.
    scale, shift = (v.view(-1, *[1] * (x.dim() - 2)) for v in (scale, shift))
    return torch.addcmul(shift, x.to(scale.dtype), scale).to(x.dtype)


# Simplification


def simplify(program: Program) -> Program:
    """Folds affines into convolutions, pools before 1x1 convolutions, and gives each step its ReLU and its add."""
    _drop_unused(program)
    for rewrite in (_fold_affine, _pool_first, _take_relu, _take_add, _take_relu):
        _rewrite_pairs(program, rewrite)
    _drop_unused(program)
    return program


def _rewrite_pairs(program: Program, rewrite: Callable[[Step, Step], str]) -> None:
    """Calls rewrite(producer, step) where `step` alone uses what `producer` gives.

    It returns "" (nothing done), "taken" (the producer now does both, at the step's place) or "swapped" (the step now
    runs first and the producer uses what it gives).
    """
    uses = program.uses()
    steps: list[Step] = []
    producer: dict[int, Step] = {}
    for step in program.steps:
        done = ""
        for value in step.inputs():
            made = producer.get(value)
            if made is not None and uses[value] == 1 and (done := rewrite(made, step)):
                steps = [s for s in steps if s is not made]
                steps += [made] if done == "taken" else [step, made]
                producer[made.out] = made
                break
        if not done:
            steps.append(step)
        if done != "taken":
            producer[step.out] = step
    program.steps = steps


def _fold_affine(made: Step, step: Step) -> str:
    if not (isinstance(made, Conv) and isinstance(step, Affine)) or made.relu or made.add is not None:
        return ""
    if made.scale is None:
        made.scale, made.shift = step.scale, step.shift
    else:
        made.scale, made.shift = made.scale * step.scale, made.shift * step.scale + step.shift
    made.relu, made.key, made.out = step.relu, made.key + step.source, step.out
    return "taken"


def _take_relu(made: Step, step: Step) -> str:
    if isinstance(step, Relu) and isinstance(made, Affine | Conv | Add):
        made.relu, made.out = True, step.out
        return "taken"
    return ""


def _take_add(made: Step, step: Step) -> str:
    if not isinstance(step, Add) or not isinstance(made, Conv) or made.relu or made.add is not None:
        return ""
    if isinstance(made.module, nn.Linear) or step.a == step.b:
        return ""
    made.add = step.b if step.a == made.out else step.a
    made.relu, made.out = step.relu, step.out
    return "taken"


def _pool_first(made: Step, step: Step) -> str:
    """pool(conv1x1(x)) = conv1x1(pool(x)): the convolution then runs on fewer pixels."""
    if not (isinstance(made, Conv) and isinstance(step, Call) and step.averages and isinstance(made.module, nn.Conv2d)):
        return ""
    conv = made.module
    if made.relu or made.add is not None or conv.kernel_size != (1, 1) or conv.stride != (1, 1) or any(conv.padding):
        return ""
    pooled, out = made.out, step.out
    step.args, step.out = (Ref(made.x),), pooled
    made.x, made.out = pooled, out
    return "swapped"


def _drop_unused(program: Program) -> None:
    needed = set(refs(program.outputs))
    kept: list[Step] = []
    for step in reversed(program.steps):
        if step.out in needed:
            kept.append(step)
            needed.update(step.inputs())
    program.steps = kept[::-1]
