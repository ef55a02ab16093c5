"""The transition: layers freeze or are thawed in the model, the optimizers and the prefix, all of it or nothing."""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from .attach import TrainingPath, is_pinned, pin, unpin
from .checks import DDPCheck
from .layers import Layer, Layers
from .memory import nbytes
from .param_groups import ParamGroups
from .prefix import Prefix


@dataclass(frozen=True)
class Transition:
    """One moment at which layers froze or were thawed.

    step: optimizer steps done until then; 0 for what is frozen before the first.
    num_frozen: so many layers are frozen from then on.
    layers: names of those that froze or were thawed.
    parameters_frozen: how many scalars left training; negative where they came back.
    state_bytes_freed: bytes of optimizer state.
    seconds: what the transition took.
    by_hand: freeze_to or thaw_to was called; False: the rule was due.
    """

    step: int
    num_frozen: int
    layers: tuple[str, ...]
    parameters_frozen: int
    state_bytes_freed: int
    seconds: float
    by_hand: bool = False

    def __str__(self) -> str:
        thawed = self.parameters_frozen < 0
        return (
            f"step {self.step}: {'thawed' if thawed else 'froze'} {', '.join(self.layers)}; "
            f"{self.num_frozen} layers frozen, {abs(self.parameters_frozen)} parameters, "
            f"{self.state_bytes_freed} bytes of optimizer state freed{', by hand' if self.by_hand else ''}"
        )


class FrozenLayers:
    """Layers 0 .. count-1 are frozen.

    Args:
        model: whose layers they are.
        layers: all of them; those of `layers.given` are frozen from the start and stay so.
        optimizers: where the state of frozen parameters is freed.
        groups: of these optimizers.
        prefix: runs the forward of `layers.given` and of the frozen layers.
        ddp_check: told of each transition.

    Attributes:
        count: how many are frozen.
        hooks: key -> a function that is called with the Transition when all else is done. If it raises, the
            transition is undone.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Layers,
        optimizers: tuple[torch.optim.Optimizer, ...],
        groups: ParamGroups,
        prefix: Prefix,
        ddp_check: DDPCheck,
    ) -> None:
        self.count = 0
        self.hooks: dict[int, Callable[[Transition], None]] = {}
        self._model = model
        self._layers, self._optimizers, self._groups = layers, optimizers, groups
        self._prefix, self._ddp_check = prefix, ddp_check
        self._paths: list[TrainingPath] = []
        self.keep_paths()

    def add_hook(self, hook: Callable[[Transition], None]) -> Callable[[], None]:
        """Calls the hook from now on; returns what removes it."""
        key = max(self.hooks, default=0) + 1
        self.hooks[key] = hook

        def remove() -> None:
            self.hooks.pop(key, None)

        return remove

    def keep_paths(self) -> None:
        """Keeps frozen modules on the paths that they ran while they trained."""
        kinds = TrainingPath.KINDS
        self._paths = [TrainingPath(module) for module in self._model.modules() if isinstance(module, kinds)]

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Within, no hook and no engine stands on the model. What is frozen stays so."""
        in_prefix = self._prefix.num_frozen
        self._remove_hooks()
        with self._ddp_check.paused():
            try:
                yield
            finally:
                self.keep_paths()
                self._prefix.freeze(in_prefix)

    def _remove_hooks(self) -> None:
        self._prefix.freeze(0)
        for path in self._paths:
            path.remove()

    def pin_given(self) -> None:
        """What came with requires_grad=False in front of all layers joins the prefix."""
        with ExitStack() as undo:
            for layer in self._layers.given:
                _pin_all(layer.submodules, undo)
            self._prefix.freeze(len(self._layers.given))
            undo.pop_all()

    def move_to(self, count: int, step: int, *, by_hand: bool = False) -> Transition | None:
        """Freezes or thaws until `count` layers are frozen; None where that is so already.

        Raises:
            RuntimeError: a parameter of these layers is no longer the one that the optimizer has.
        """
        if count == self.count:
            return None
        start, freezes, freed = time.perf_counter(), count > self.count, 0
        layers = self._layers[min(count, self.count) : max(count, self.count)]
        self._check_in_place(layers)
        with ExitStack() as undo:
            for layer in layers:
                if freezes:
                    freed += _freeze(layer, self._optimizers, undo)
                else:
                    _thaw(layer, undo)
            self._groups.set_frozen(count, undo)
            undo.callback(setattr, self, "count", self.count)
            self.count = count
            self._ddp_check.watch()
            undo.callback(self._prefix.freeze, self._prefix.num_frozen)
            self._prefix.freeze(len(self._layers.given) + count)
            size = sum(layer.num_parameters for layer in layers)
            transition = Transition(
                step=step,
                num_frozen=count,
                layers=tuple(layer.name for layer in layers),
                parameters_frozen=size if freezes else -size,
                state_bytes_freed=freed,
                seconds=time.perf_counter() - start,
                by_hand=by_hand,
            )
            for hook in list(self.hooks.values()):
                hook(transition)
            undo.pop_all()
        return transition

    def _check_in_place(self, layers: Iterable[Layer]) -> None:
        for layer in layers:
            for name, p in layer.parameters.items():
                if (now := _parameter(self._model, name)) is not None and now is not p:
                    raise RuntimeError(
                        f"{name} of layer {layer.name} is another parameter than when FreezeOut was made (a module was "
                        "replaced, or load_state_dict(assign=True) was called): the optimizer trains the old one; make "
                        "optimizer and FreezeOut anew"
                    )

    def close(self) -> None:
        """Thaws all layers. Those that came frozen follow model.train() again, and still need no gradient."""
        self._remove_hooks()
        with ExitStack() as undo:
            for layer in self._layers[: self.count]:
                _thaw(layer, undo)
            undo.pop_all()
        for layer in self._layers.given:
            for module in layer.submodules:
                unpin(module)
        self.count = 0
        self._groups.set_frozen(0)


def _freeze(layer: Layer, optimizers: Iterable[torch.optim.Optimizer], undo: ExitStack) -> int:
    """No gradient, no optimizer state, eval mode for good. Returns the bytes of optimizer state that it freed."""
    freed = 0
    for p in layer.parameters.values():
        undo.callback(_restore, p, p.grad)
        p.grad = None
        p.requires_grad_(False)
        for optimizer in optimizers:
            state = optimizer.state.pop(p, None)
            if state is not None:
                undo.callback(optimizer.state.__setitem__, p, state)
                freed += nbytes(state.values())
    _pin_all(layer.submodules, undo)
    return freed


def _thaw(layer: Layer, undo: ExitStack) -> None:
    """The layer's parameters train again, without optimizer state. Its modules follow model.train() again."""
    for p in layer.parameters.values():
        undo.callback(p.requires_grad_, False)
        p.requires_grad_(True)
    for module in layer.submodules:
        if is_pinned(module):
            undo.callback(pin, module)
            unpin(module)


def _pin_all(modules: Iterable[nn.Module], undo: ExitStack) -> None:
    for module in modules:
        if not is_pinned(module):
            undo.callback(unpin, module)
            pin(module)


def _restore(p: nn.Parameter, grad: torch.Tensor | None) -> None:
    p.requires_grad_(True)
    p.grad = grad


def _parameter(model: nn.Module, name: str) -> nn.Parameter | None:
    module, _, own_name = name.rpartition(".")
    try:
        return model.get_submodule(module)._parameters.get(own_name)
    except AttributeError:  # of a module that is gone
        return None
