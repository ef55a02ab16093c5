"""torch.fx split: the model's own code traced once and cut into a prefix graph and a suffix graph.

Only what straddles the frontier is opened; a module that is wholly frozen, wholly trainable or torch's own is called
as it is. What tracing would silently get wrong is refused.
"""

import copy
import inspect
import operator
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_flatten

from ..attach import OwnForward, TransientHook
from .folding import mutates
from .guard import Guard, autocast_state, has_hooks, plain_tensor
from .runtime import Refused, Runner, constant, same, same_random_numbers
from .trees import map_tensors

SCALARS = (bool, int, float, str, type(None))
RANDOM_MODULES = (nn.modules.dropout._DropoutNd, nn.RReLU, nn.modules.batchnorm._NormBase, nn.FractionalMaxPool2d)
RANDOM_FUNCTIONS = {
    F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout, F.rrelu,
    F.gumbel_softmax, F.fractional_max_pool2d, F.multi_head_attention_forward, torch.bernoulli, torch.multinomial,
    torch.normal, torch.poisson, torch.rand_like, torch.randn_like, torch.randint_like, torch.dropout, torch.rrelu,
    torch.rand, torch.randn, torch.randint, torch.randperm,
}  # fmt: skip
RANDOM_METHODS = {"bernoulli", "multinomial", "bernoulli_", "normal_", "uniform_", "random_", "exponential_"}


class _Tracer(fx.Tracer):
    proxy_buffer_attributes = True

    def __init__(self, opened: set[nn.Module]) -> None:
        super().__init__()
        self._opened = opened

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return module not in self._opened


@dataclass
class Cut:
    """The two graphs: frontier = prefix(*inputs), output = suffix(*inputs, *frontier); and what was baked in."""

    prefix: fx.GraphModule
    suffix: fx.GraphModule
    signature: inspect.Signature
    scalars: dict[str, Any]
    opened: list[nn.Module]
    frozen: list[nn.Module]


def cut(model: nn.Module, args: tuple, kwargs: dict) -> Cut:
    """Traces the model for such arguments and cuts it behind everything that depends on inputs and frozen state only.

    Raises:
        Refused: tracing does not work, or would change what the model does.
    """
    if "forward" in model.__dict__:
        raise Refused("the model's forward was replaced on the instance")
    signature = inspect.signature(type(model).forward)
    bound = _bind(signature, model, args, kwargs)
    scalars = {name: value for name, value in bound.items() if isinstance(value, SCALARS)}
    opened = _straddlers(model)
    for module in opened:
        if module is not model and has_hooks(module):
            raise Refused(f"a hook is registered on a {type(module).__name__} that holds frozen and active layers")
        if module is not model and "forward" in module.__dict__:
            raise Refused(f"the forward of a {type(module).__name__} was replaced on the instance")
        if getattr(module, "_compiled_call_impl", None) is not None:
            raise Refused(f"a {type(module).__name__} that holds frozen and active layers is compiled")
    graph = _trace(model, opened, scalars)
    names = list(bound)
    prefix, suffix, frozen = _partition(model, graph, names)
    if not frozen:
        raise Refused("no frozen module runs before the first active one")
    return Cut(prefix, suffix, signature, scalars, list(opened), frozen)


def _bind(signature: inspect.Signature, model: nn.Module, args: tuple, kwargs: dict) -> dict[str, Any]:
    try:
        bound = signature.bind(model, *args, **kwargs)
    except TypeError as error:
        raise Refused(str(error)) from None
    bound.apply_defaults()
    arguments = dict(list(bound.arguments.items())[1:])
    for name, value in arguments.items():
        kind = signature.parameters[name].kind
        if kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD) and value:
            raise Refused(f"the model was called with {name!r} beyond its named arguments")
    return {
        name: value
        for name, value in arguments.items()
        if signature.parameters[name].kind not in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    }


def _straddlers(model: nn.Module) -> dict[nn.Module, None]:
    """The model and what has frozen parameters below it besides trainable ones, or is not itself in eval mode."""
    found: dict[nn.Module, None] = {model: None}
    for module in model.modules():
        trainable = {p.requires_grad for p in module.parameters()}
        if False in trainable and (True in trainable or module.training) and list(module.children()):
            found[module] = None
    return found


def _trace(model: nn.Module, opened: dict[nn.Module, None], scalars: dict[str, Any]) -> fx.Graph:
    before = [_attributes(module) for module in opened]
    buffers = [(b, b._version) for module in opened for b in module.buffers(recurse=False)]
    states = torch.get_rng_state(), random.getstate()
    with _no_checkpoint():
        try:
            graph = _Tracer(set(opened)).trace(model, concrete_args=scalars or None)
        except Refused:
            raise
        except Exception as error:  # what a stranger's forward raises under tracing is not known
            raise Refused(
                f"tracing: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            ) from error
        finally:
            drew = not torch.equal(states[0], torch.get_rng_state()) or random.getstate() != states[1]
            torch.set_rng_state(states[0])
            random.setstate(states[1])
            changed = [_restore(module, attributes) for module, attributes in zip(opened, before, strict=True)]
    if drew:
        raise Refused("the model's own code draws random numbers without an input; tracing would bake them in")
    if any(changed) or any(b._version != version for b, version in buffers):
        raise Refused("the model's own code writes its attributes or buffers; tracing would do that once only")
    for node in list(graph.nodes):
        # fx asserts the values of arguments that were baked in; the call checks them itself.
        if node.op == "call_function" and node.target in (torch._assert, fx._symbolic_trace._assert_is_none):
            _erase(graph, node)
    return graph


def _erase(graph: fx.Graph, node: fx.Node) -> None:
    arguments = node.all_input_nodes
    graph.erase_node(node)
    for argument in arguments:
        if not argument.users and argument.op != "placeholder":
            _erase(graph, argument)


def _attributes(module: nn.Module) -> tuple[dict, list[tuple]]:
    """The module's attributes, and the contents of those (parameters and buffers too) that are containers."""
    containers = [v for v in module.__dict__.values() if isinstance(v, list | dict | set)]
    return dict(module.__dict__), [(value, copy.copy(value)) for value in containers]


def _restore(module: nn.Module, before: tuple[dict, list[tuple]]) -> bool:
    """Whether the module's attributes are others than `before`; puts them back."""
    attributes, containers = before
    changed = not _identical(module.__dict__, attributes)
    if changed:
        module.__dict__.clear()
        module.__dict__.update(attributes)
    for value, contents in containers:
        if not _identical(value, contents):
            changed = True
            value.clear()
            value.extend(contents) if isinstance(value, list) else value.update(contents)
    return changed


def _identical(a: list | dict | set, b: list | dict | set) -> bool:
    if isinstance(a, dict):
        return list(a) == list(b) and all(a[key] is b[key] for key in a)
    return len(a) == len(b) and all(x is y for x, y in zip(a, b, strict=True))


@contextmanager
def _no_checkpoint() -> Iterator[None]:
    """checkpoint() inside refuses: tracing would go through it and drop it."""
    module = torch.utils.checkpoint
    names = [n for n in ("CheckpointFunction", "_checkpoint_without_reentrant_generator") if hasattr(module, n)]
    kept = {name: getattr(module, name) for name in names}

    class Refuse:
        def __call__(self, *args: Any, **kwargs: Any) -> None:
            raise Refused("checkpoint() is called in code that holds frozen and active layers; tracing would drop it")

        apply = __call__

    for name in names:
        setattr(module, name, Refuse())
    try:
        yield
    finally:
        for name, value in kept.items():
            setattr(module, name, value)


# The cut


def _partition(model: nn.Module, graph: fx.Graph, names: list[str]) -> tuple[fx.GraphModule, fx.GraphModule, list]:
    behind: set[fx.Node] = set()  # the suffix
    frozen: list[nn.Module] = []
    for node in graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        if any(source in behind for source in node.all_input_nodes) or not _constant(model, node):
            behind.add(node)
            if mutates(node) and any(s not in behind for s in node.all_input_nodes[:1] if s.op != "placeholder"):
                raise Refused(f"{node.name} behind the frontier writes into a value in front of it")
        elif node.op == "call_module":
            module = model.get_submodule(node.target)
            if next(module.parameters(), None) is not None:
                frozen.append(module)
    if not frozen:
        raise Refused("no frozen module runs before the first active one")
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    if [node.name for node in placeholders] and len(placeholders) != len(names):
        raise Refused("the model takes more inputs than its named arguments")
    output = next(node for node in graph.nodes if node.op == "output")
    crossing = [
        node
        for node in graph.nodes
        if node.op not in ("placeholder", "output")
        and node not in behind
        and any(user in behind or user is output for user in node.users)
    ]
    first, copies = fx.Graph(), {}
    for node in graph.nodes:
        if node.op != "output" and node not in behind:
            copies[node] = first.node_copy(node, lambda n: copies[n])
    first.output(tuple(copies[node] for node in crossing))
    second, copies = fx.Graph(), {}
    for i, node in enumerate([*placeholders, *crossing]):
        copies[node] = second.placeholder(f"input_{i}")
    for node in graph.nodes:
        if node in behind or node is output:
            copies[node] = second.node_copy(node, lambda n: copies[n])
    return fx.GraphModule(model, first), fx.GraphModule(model, second), frozen


def _constant(model: nn.Module, node: fx.Node) -> bool:
    """Whether the node gives the same for the same inputs now and later on: frozen, and no chance in it."""
    if node.op == "get_attr":
        tensor = operator.attrgetter(node.target)(model)
        return not (isinstance(tensor, Tensor) and tensor.requires_grad) and not any(map(mutates, node.users))
    if node.op == "call_module":
        module = model.get_submodule(node.target)
        if any(p.requires_grad for p in module.parameters()) or any(has_hooks(m) for m in module.modules()):
            return False
        if getattr(module, "_compiled_call_impl", None) is not None:
            return False
        if not any(m.training for m in module.modules()):
            return True
        # A torch module without state does the same in training mode, unless it is made of chance.
        return type(module).__module__.startswith("torch.nn") and not any(
            isinstance(m, RANDOM_MODULES) and getattr(m, "p", 1) != 0 for m in module.modules()
        ) and next(module.parameters(), None) is None  # fmt: skip
    if node.op == "call_method":
        return node.target not in RANDOM_METHODS
    if node.target is F.scaled_dot_product_attention:
        return not (node.kwargs.get("dropout_p") or (len(node.args) > 4 and node.args[4]))
    if node.target in (F.dropout, torch.dropout):
        training = node.args[2] if len(node.args) > 2 else node.kwargs.get("training", node.kwargs.get("train", True))
        return training is False
    return node.target not in RANDOM_FUNCTIONS


# The check: the user's own forward, played back


class Playback:
    """Records what the suffix's modules were given and gave in one real forward, and plays it back to the two graphs.

    No module of the suffix runs a second time, so that its buffers, hooks and random numbers stay as they are.
    """

    def __init__(self, parts: Cut, model: nn.Module, args: tuple, kwargs: dict) -> None:
        self.parts, self.model = parts, model
        arguments = _bind(parts.signature, model, args, kwargs)
        # Whoever writes into the input (relu_) would make it another input.
        self.inputs = map_tensors(lambda x: x.detach().clone(), list(arguments.values()))
        self.device = next(
            (x.device for x in tree_flatten(self.inputs)[0] if isinstance(x, Tensor)), torch.device("cpu")
        )
        self.autocast = autocast_state(self.device)
        self.random_state = _random_state(self.device)
        self.calls: dict[str, list[tuple]] = {}
        self.buffers = [(b, b.detach().clone()) for m in parts.opened for b in m.buffers(recurse=False)]
        self._handles = []
        for name in {node.target for node in parts.suffix.graph.nodes if node.op == "call_module"}:
            self.calls[name] = []
            module = model.get_submodule(name)
            if getattr(module, "_compiled_call_impl", None) is not None:
                self.remove()
                raise Refused(f"{name} is compiled in place and cannot be watched")
            hook = TransientHook(lambda m, args, kwargs, output, name=name: self._note(name, args, kwargs, output))
            self._handles.append(module.register_forward_hook(hook, with_kwargs=True))

    def _note(self, name: str, args: tuple, kwargs: dict, output: Any) -> None:
        # The containers as they are now: whoever made a list may go on appending to it.
        args, kwargs, output = map_tensors(lambda x: x, (args, kwargs, output))
        self.calls[name].append((args, kwargs, output, _random_state(self.device)))

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def check(self, output: Any) -> tuple:
        """-> the frontier for these inputs; raises Refused unless the graphs do bit for bit what the model did."""
        self.remove()
        after = [(b, b.detach().clone()) for b, _ in self.buffers]
        try:
            with same_random_numbers(self.device), constant(), torch.autocast(
                self.device.type, enabled=self.autocast[0], dtype=self.autocast[1]
            ):  # fmt: skip
                for b, value in self.buffers:
                    b.copy_(value)
                _set_random_state(self.device, self.random_state)
                inputs = map_tensors(Tensor.clone, self.inputs)
                frontier = self.parts.prefix(*inputs)
                kept = map_tensors(Tensor.clone, frontier)
                found = _Player(self).run(*inputs, *frontier)
                if not _equal(found, output):
                    raise Refused("the traced model gives another output")
                for b, value in after:
                    if not same(b, value):
                        raise Refused("the traced model leaves other buffers behind")
                return kept
        finally:
            with torch.no_grad():
                for b, value in after:
                    b.copy_(value)


class _Player(fx.Interpreter):
    def __init__(self, playback: Playback) -> None:
        super().__init__(playback.parts.suffix)
        self.extra_traceback = False  # the message is for the report
        self._playback = playback
        self._remaining = {name: iter(calls) for name, calls in playback.calls.items()}

    def call_module(self, target: str, args: tuple, kwargs: dict) -> Any:
        call = next(self._remaining[target], None)
        if call is None:
            raise Refused(f"{target} ran less often than the traced model runs it")
        given, given_kwargs, output, random_state = call
        if not _equal((args, kwargs), (given, given_kwargs)):
            raise Refused(f"the traced model gives {target} another input")
        _set_random_state(self._playback.device, random_state)
        return map_tensors(lambda x: x.detach().clone(), output)

    def run(self, *args: Any) -> Any:
        result = super().run(*args)
        if any(next(calls, None) is not None for calls in self._remaining.values()):
            raise Refused("the model runs a module more often than the traced model does")
        return result


def _equal(a: Any, b: Any) -> bool:
    (x, x_spec), (y, y_spec) = tree_flatten(_plain(a)), tree_flatten(_plain(b))
    if x_spec != y_spec:
        return False
    return all(
        same(p.detach(), q.detach())
        if isinstance(p, Tensor) and isinstance(q, Tensor)
        else type(p) is type(q) and p == q
        for p, q in zip(x, y, strict=True)
    )


def _plain(tree: Any) -> Any:
    """The tree without fx's immutable lists and dicts."""
    if isinstance(tree, fx.immutable_collections.immutable_list):
        return [_plain(item) for item in tree]
    if isinstance(tree, fx.immutable_collections.immutable_dict):
        return {key: _plain(item) for key, item in tree.items()}
    return tuple(map(_plain, tree)) if type(tree) is tuple else tree


def _random_state(device: torch.device) -> tuple:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _set_random_state(device: torch.device, state: tuple) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)


# The installed split


class Split:
    """output = suffix(*inputs, *runner(*inputs)), as the model's own forward, for calls like the captured one.

    Other calls (eval mode, another kind of arguments or autocast, an input that needs a gradient, an attribute of an
    opened module that changed) run the model's own code.
    """

    def __init__(self, model: nn.Module, parts: Cut, autocast: tuple) -> None:
        self.model, self.parts, self.autocast = model, parts, autocast
        self.guard = Guard(parts.frozen)
        self.runner: Runner | None = None
        self.bypassed: dict[str, int] = {}
        self.on_bypass: Callable[[str], None] = lambda reason: None
        self._opened_state = self._state()
        self._forward_object: OwnForward | None = None

    def originals(self, *inputs: Any) -> tuple:
        return self.parts.prefix(*inputs)

    def install(self, runner: Runner) -> None:
        self.runner = runner
        self._forward_object = OwnForward(self.model, self._forward)

    def remove(self) -> None:
        if self._forward_object is not None:
            self._forward_object.remove()
        self._forward_object = None

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        try:
            arguments = _bind(self.parts.signature, self.model, args, kwargs)
        except Refused:
            return self._forward_object.original(*args, **kwargs)
        if not self._usable(arguments):
            return self._forward_object.original(*args, **kwargs)
        inputs = list(arguments.values())
        return self.parts.suffix(*inputs, *self.runner(*inputs))

    @torch.compiler.disable
    def _usable(self, arguments: dict[str, Any]) -> bool:
        reason = self._unusable(arguments)
        if reason is not None:
            self.bypassed[reason] = self.bypassed.get(reason, 0) + 1
            self.on_bypass(reason)
        return reason is None

    def _unusable(self, arguments: dict[str, Any]) -> str | None:
        if not self.model.training:
            return "the model is in eval mode"
        for name, value in arguments.items():
            baked = self.parts.scalars.get(name, _ABSENT)
            if isinstance(value, SCALARS) != (baked is not _ABSENT) or (baked is not _ABSENT and value != baked):
                return f"argument {name} is another than at the capture"
        for leaf in tree_flatten(list(arguments.values()))[0]:
            if isinstance(leaf, Tensor):
                if not plain_tensor(leaf):
                    return "an input is not a plain tensor"
                if leaf.requires_grad and torch.is_grad_enabled():
                    return "an input needs a gradient"
                if autocast_state(leaf.device) != self.autocast:
                    return "another autocast than at the capture"
        if self._state() != self._opened_state:
            return "an attribute, hook or training flag of an opened module changed"
        return self.guard.broken()

    def _state(self) -> list[tuple]:
        return [
            (
                m is not self.model and has_hooks(m),
                # The graphs hold what these names meant at the capture.
                *map(id, (*m._modules.values(), *m._parameters.values(), *m._buffers.values())),
                *((k, v) for k, v in m.__dict__.items() if isinstance(v, SCALARS) and type(v) is not str),
            )
            for m in self.parts.opened
        ]


_ABSENT = object()
