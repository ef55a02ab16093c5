"""One module's forward, read by one run on stand-ins for tensors. Submodules are leaves.

Nothing of torch is patched. During the run each submodule has a forward on the instance, which notes the call.
Parameters, buffers, attributes and what is computed from these alone are constants of the trace: the guard compares
parameters, buffers and attributes at each call.
"""

import dis
import operator
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, fx, nn

from ..torch_state import generator_states
from .code import asks
from .judge import first_line
from .program import Ref, Size, map_tree

SIZE = "size"  # how stand-ins for numbers among the arguments are named


class Unlowerable(Exception):
    """The module cannot be written as ops. The engine calls the module as it is."""


@dataclass
class Trace:
    """graph(*placeholders) of one forward, with modules and constants by the targets of nodes."""

    graph: fx.Graph
    modules: dict[str, nn.Module] = field(default_factory=dict)
    constants: dict[str, Tensor] = field(default_factory=dict)


class _Proxy(fx.Proxy):
    """What is done with a stand-in becomes a node.

    A stand-in has no hash and is no text: a set, a dict or "%s" would answer for it what they do not for the size. A
    tensor's says that it is a tensor, as the value will be, where Python code asks isinstance. To torch's code in C++
    it must not say so: torch.arange(x.max()) would read its memory as a tensor's.
    """

    __hash__ = None  # type: ignore[assignment]  # Python's way to say so

    def __repr__(self) -> str:
        raise Unlowerable("its forward asks for a value as text")

    __str__ = __repr__

    def __getattr__(self, name: str) -> fx.proxy.Attribute:
        return _Attribute(self, name)

    @property  # type: ignore[misc]  # it can only be read
    def __class__(self) -> type:
        asked = type(self) is _TensorProxy and _calls_isinstance(sys._getframe(1))
        return Tensor if asked else type(self)


class _Attribute(_Proxy, fx.proxy.Attribute):
    pass


class _TensorProxy(_Proxy):
    pass


IN_PLACE: set[Callable] = {
    operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ifloordiv,
    operator.ior, operator.iand, operator.ixor, operator.imatmul, operator.ipow, operator.imod,
}  # fmt: skip


def _in_place(function: Callable) -> Callable:
    def change(self: _Proxy, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return change


for _function in IN_PLACE:  # fx would take x += 1 for x = x + 1
    setattr(_TensorProxy, f"__{_function.__name__}__", _in_place(_function))


def _calls_isinstance(frame: types.FrameType) -> bool:
    """Whether the frame is at a call of isinstance."""
    code = frame.f_code
    if "isinstance" not in code.co_names or sys.version_info < (3, 11):  # which has no positions
        return "isinstance" in code.co_names
    instructions = {i.offset: (i.argval, i.positions) for i in dis.get_instructions(code)}
    _, here = instructions[frame.f_lasti]
    starts = {(at.lineno, at.col_offset) for name, at in instructions.values() if name == "isinstance" and at}
    return here is not None and (here.lineno, here.col_offset) in starts


class _Tracer(fx.Tracer):
    def __init__(self) -> None:
        super().__init__()
        self.graph = fx.Graph()
        self.root = nn.Module()
        self.found = Trace(self.graph)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        known = node.op == "call_module" or not (gives_size(node) or node.op == "get_attr")
        return (_TensorProxy if known else _Proxy)(node, self)

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, Tensor) and not issubclass(type(a), fx.Proxy):
            name = f"constant_{len(self.found.constants)}"
            self.found.constants[name] = a
            return self.create_node("get_attr", name, (), {})
        if type(a) is list or type(a) is tuple:  # fx asks isinstance, which a stand-in answers as a tensor
            return type(a)(self.create_arg(item) for item in a)
        return super().create_arg(a) if not issubclass(type(a), fx.Proxy) else a.node

    def call(self, module: nn.Module, forward: Callable, *args: Any, **kwargs: Any) -> Any:
        if not any(issubclass(type(leaf), fx.Proxy) for leaf in _leaves((args, kwargs))):
            return forward(*args, **kwargs)  # of constants; or another thread's call
        name = next((n for n, m in self.found.modules.items() if m is module), f"module_{len(self.found.modules)}")
        self.found.modules[name] = module
        return self.create_proxy("call_module", name, args, kwargs)


def trace(module: nn.Module, args: tuple, kwargs: dict) -> Trace:
    """-> the trace of module.forward(*args, **kwargs), Refs in the arguments being what varies.

    Raises:
        Unlowerable: the forward looks at values, draws random numbers, or writes.
    """
    if question := asks(type(module)):
        raise Unlowerable(f"its forward asks {question}")
    tracer, forward = _Tracer(), module.forward
    placed: dict[Ref, fx.Proxy] = {}  # one value, one stand-in: a forward may ask `query is key`

    def stand_in(leaf: Any) -> Any:
        if not isinstance(leaf, Ref):
            return leaf
        if leaf not in placed:
            kind = SIZE if isinstance(leaf, Size) else "x"
            placed[leaf] = tracer.create_proxy("placeholder", f"{kind}{len(placed)}", (), {})
        return placed[leaf]

    args, kwargs = map_tree(stand_in, (args, kwargs))
    sizes = _list_sizes((args, kwargs))
    inner = [m for m in module.modules() if m is not module]
    before, states = [(m, dict(vars(m))) for m in module.modules()], generator_states()
    for each in inner:
        object.__setattr__(each, "forward", partial(tracer.call, each, each.forward))
    during = [dict(vars(m)) for m, _ in before]
    try:
        output = forward(*args, **kwargs)
    except Exception as error:  # what a stranger's forward raises for a stand-in is not known
        raise Unlowerable(first_line(error)) from error
    finally:
        writes = any(not _same(vars(m), attributes) for (m, _), attributes in zip(before, during, strict=True))
        for m, attributes in before:
            vars(m).clear()
            vars(m).update(attributes)
    if writes:
        raise Unlowerable("its forward writes an attribute")
    if generator_states() != states:
        raise Unlowerable("its forward draws random numbers")
    if sizes != _list_sizes((args, kwargs)):
        raise Unlowerable("its forward changes a list that it was given")
    try:
        tracer.graph.output(tracer.create_arg(output))
    except NotImplementedError as error:
        raise Unlowerable(f"it returns {str(error)[:80]}") from error
    return tracer.found


def _same(now: dict, before: dict) -> bool:
    return now.keys() == before.keys() and all(now[key] is value for key, value in before.items())


def _leaves(tree: Any) -> list:
    found: list[Any] = []
    map_tree(found.append, tree)
    return found


def _list_sizes(tree: Any) -> list[int]:
    if isinstance(tree, dict):
        tree = list(tree.values())
    if type(tree) not in (tuple, list):
        return []
    return [len(tree), *(size for item in tree for size in _list_sizes(item))]


def gives_size(node: fx.Node) -> bool:
    """Whether a node is a number or a shape and no tensor, as far as its operation tells."""
    if node.op == "placeholder":
        return str(node.target).startswith(SIZE)
    if node.op == "call_function" and node.target in (getattr, operator.getitem):
        return node.target is getattr or (isinstance(node.args[0], fx.Node) and gives_size(node.args[0]))
    if node.op == "call_method":
        return node.target in ("size", "dim", "numel", "item", "tolist", "ndimension", "stride", "element_size")
    nodes = [a for a in node.args if isinstance(a, fx.Node)]
    return getattr(node.target, "__module__", None) == "_operator" and bool(nodes) and all(map(gives_size, nodes))
