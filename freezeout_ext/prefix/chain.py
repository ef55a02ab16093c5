"""Frozen units that feed the next one, run as one engine at the call of the first.

The first unit's call runs the engine for all of them. It and the middle ones return a placeholder, `Deferred`; the last
one returns what the engine gave. Each unit looks again, at its own call, whether it is called as at the capture.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ..attach import OwnForward
from .forms import Carried, Form, Input
from .guard import Guard, autocast_state, has_global_hooks, plain_tensor, version_of
from .judge import Runner, constant


@dataclass
class Unit:
    """A wholly frozen top module of a layer, by name."""

    name: str
    module: nn.Module


@dataclass
class Link:
    """A unit in a chain: its guard, how it is called, what it returns, whether it writes that into what it is given."""

    unit: Unit
    guard: Guard
    call: Form
    result: Form
    in_place: bool = False


class Deferred(torch.Tensor):
    """What unit `index` of a chain gives in one passage, computed by the unit itself once anyone looks at it."""

    _passage: "Passage"
    _index: int
    _value: Tensor | None

    @staticmethod
    def __new__(cls, passage: "Passage", index: int, value: Tensor | None = None) -> "Deferred":
        kind = passage.chain.kinds[0]
        # No size that anyone could use by mistake; everything below goes through value().
        self = torch.Tensor._make_wrapper_subclass(cls, (0,), dtype=kind[0], device=kind[1])
        self._passage, self._index, self._value = passage, index, value
        return self

    def value(self) -> Tensor:
        self._passage.chain.looked_inside.add(self._index)
        if self._value is None:
            self._value = self._passage.value(self._index)
        return self._value

    @classmethod
    def __torch_function__(cls, func: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None) -> Any:
        # What checkpoint() and DDP ask of their inputs is known without computing them.
        if func in _KNOWN and isinstance(args[0], Deferred):
            return getattr(args[0]._passage.inputs[0], _KNOWN[func])
        with torch._C.DisableTorchFunctionSubclass():
            return func(*real(args), **real(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch declares the function that stands for none
        cls, func: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        # Where C++ was handed the tensor without asking Python first (autograd.Function).
        return func(*real(args), **real(kwargs or {}))


# A deferred value is on its input's device and needs no gradient, as the input: the chain was captured so.
_KNOWN = {getattr(Tensor, name).__get__: name for name in ("device", "requires_grad", "is_cuda")}


def real(tree: Any) -> Any:
    """-> the tree with the values of what is deferred in it."""
    return tree_map_only(Deferred, Deferred.value, tree)


@dataclass
class Passage:
    """One run of a chain: its inputs at the first unit's call, their versions then, the last unit's output.

    `reached` is the last unit that was called.
    """

    chain: "Chain"
    inputs: tuple[Tensor, ...]
    y: Tensor | None
    versions: list[int] = field(default_factory=list)
    reached: int = 0

    def __post_init__(self) -> None:
        self.versions = [version_of(x) for x in self.inputs]

    def is_as_it_was(self) -> bool:
        return [version_of(x) for x in self.inputs] == self.versions

    def value(self, index: int) -> Tensor:
        """-> what unit `index` gives, by the units' own forwards."""
        links = self.chain.links
        if not self.is_as_it_was() or (index < self.reached and links[index + 1].in_place):
            raise RuntimeError(
                f"the output of frozen module {links[index].unit.name} was looked at after it, or the input of "
                f"{links[0].unit.name}, was changed in place: it cannot be computed any more; pass prefix='off'"
            )
        with constant():
            return self.chain.run(self.inputs, index)


class Chain:
    """y = unit_n(... unit_1(x)) by a runner, installed as the units' own forwards.

    A call that the chain was not captured for (an input that needs a gradient, another dtype, device or autocast,
    changed state of a unit) runs the units' own forwards. So does a unit that is called otherwise than at the capture,
    or whose state changed since the first unit's call: it gets the right values. The first passage, the rehearsal, runs
    all units as they are and shows whether anyone looks at a value in between.

    Attributes:
        rehearsed: whether all units ran once as they are, called as at the capture.
        looked_inside: units whose output was used by something else than the next unit.
        bypassed: why calls ran the units as they are, and how many.
    """

    runner: Runner  # from `install` on

    def __init__(self, links: list[Link], inputs: list[Tensor], autocast: tuple[bool, torch.dtype]) -> None:
        self.links = links
        self.autocast = autocast
        self.kinds = [(x.dtype, x.device, x.dim()) for x in inputs]
        self.looked_inside: set[int] = set()
        self.bypassed: dict[str, int] = {}
        self.on_bypass: Callable[[str], None] = lambda reason: None
        self.is_paused: Callable[[], bool] = lambda: False
        self.rehearsed = False
        self._forwards: list[OwnForward] = []

    @property
    def name(self) -> str:
        first, last = self.links[0].unit.name, self.links[-1].unit.name
        return first if first == last else f"{first} .. {last}"

    def originals(self, *inputs: Tensor) -> tuple:
        """(y,) by the units' own forwards one after the other."""
        return (self.run(inputs, len(self.links) - 1),)

    def run(self, inputs: tuple[Tensor, ...], last: int) -> Tensor:
        """-> what unit `last` gives by the units' own forwards."""
        x: Any = None
        for i in range(last + 1):
            args, kwargs = self.links[i].call.fill(x, inputs)
            x = self._carried(i, self._original(i)(*args, **kwargs))
        return x

    def install(self, runner: Runner) -> None:
        self.runner = runner
        self._forwards = [OwnForward(link.unit.module, partial(self._forward, i)) for i, link in enumerate(self.links)]

    def remove(self) -> None:
        for forward in self._forwards:
            forward.remove()
        self._forwards = []

    def _original(self, i: int) -> Callable:
        return self._forwards[i].original if self._forwards else self.links[i].unit.module.forward

    def _carried(self, i: int, output: Any) -> Tensor:
        form = self.links[i].result
        found = form.match(output)
        if found is None:
            raise RuntimeError(f"frozen module {self.links[i].unit.name} returned something else than at the capture")
        return next(leaf for leaf, known in zip(found, form.leaves, strict=True) if known is Carried)

    def _forward(self, i: int, *args: Any, **kwargs: Any) -> Any:
        passage = self._start(args, kwargs) if i == 0 else self._goes_on(i, args, kwargs)
        if passage is None:
            return self._original(i)(*real(args), **real(kwargs))
        link, last, y = self.links[i], len(self.links) - 1, passage.y
        passage.reached = i
        if y is None:  # the rehearsal
            y = self._carried(i, self._original(i)(*_silently(args), **_silently(kwargs)))
            self.rehearsed |= i == last
            return link.result.fill(y if i == last else Deferred(passage, i, y), passage.inputs)
        return link.result.fill(y if i == last else Deferred(passage, i), passage.inputs)

    @torch.compiler.disable
    def _start(self, args: tuple, kwargs: dict) -> Passage | None:
        """The first unit's call: the engine runs, unless there is a reason not to."""
        found = self.links[0].call.match((args, kwargs))
        inputs: dict[int, Any] = {}
        for leaf, known in zip(found or (), self.links[0].call.leaves if found else (), strict=True):
            if type(known) is Input:
                inputs[known.index] = leaf
        given = tuple(inputs[i] for i in sorted(inputs))
        reason = "called otherwise than at the capture" if found is None else self._unusable(given)
        if self.is_paused() and (reason is not None or not self.rehearsed):
            return None
        if reason is not None:
            self.bypassed[reason] = self.bypassed.get(reason, 0) + 1
            self.on_bypass(reason)
            return None
        passage = Passage(self, given, None)
        if self.rehearsed:
            passage.y = self.runner(*given)[0]
        return passage

    def _unusable(self, inputs: tuple) -> str | None:
        for x, kind in zip(inputs, self.kinds, strict=True):
            if not plain_tensor(x):
                return "an input is not a plain tensor"
            if x.requires_grad and torch.is_grad_enabled():
                return "an input needs a gradient"
            if (x.dtype, x.device, x.dim()) != kind:
                return "another dtype, device or rank than at the capture"
        if autocast_state(inputs[0].device) != self.autocast:
            return "another autocast than at the capture"
        if has_global_hooks():
            return "a global module hook is registered"
        return next((reason for link in self.links if (reason := link.guard.broken())), None)

    @torch.compiler.disable
    def _goes_on(self, i: int, args: tuple, kwargs: dict) -> Passage | None:
        """A later unit's call: the passage whose value it was given, if all else is as at the capture too."""
        link = self.links[i]
        found = link.call.match((args, kwargs))
        at = link.call.leaves.index(Carried)
        if found is None or type(found[at]) is not Deferred:
            return None
        value, passage = found[at], found[at]._passage
        if (
            passage.chain is not self
            or value._index != i - 1
            or (passage.y is not None and i - 1 in self.looked_inside)
        ):
            return None
        same = all(
            leaf is passage.inputs[known.index]
            for leaf, known in zip(found, link.call.leaves, strict=True)
            if type(known) is Input
        )
        # Values were compared at the first unit's call; in the rehearsal once more.
        changed = (
            link.guard.broken(values=passage.y is None) or autocast_state(passage.inputs[0].device) != self.autocast
        )
        others = len(passage.inputs) > 1 and not passage.is_as_it_was()
        if same and not changed and not others:
            return passage
        self.looked_inside.add(i - 1)
        return None


def _silently(tree: Any) -> Any:
    """-> the tree with the values of what is deferred in it, which do not count as looked at."""
    return tree_map_only(Deferred, lambda deferred: deferred._value, tree)
