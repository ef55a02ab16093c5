"""Frozen units that feed only the next one, run as one engine: the first unit defers, the last one computes."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..attach import OwnForward
from .guard import Guard, autocast_state, plain_tensor
from .runtime import Runner, constant


@dataclass(frozen=True)
class Unit:
    """A wholly frozen top module of a layer, by name."""

    name: str
    module: nn.Module


class Deferred(torch.Tensor):
    """What unit `index` of a chain gives for `source`, computed by the original modules once anyone looks at it."""

    @staticmethod
    def __new__(cls, chain: "Chain", index: int, source: Tensor) -> "Deferred":
        # No size that anyone could use by mistake; everything below goes through value().
        self = torch.Tensor._make_wrapper_subclass(cls, (0,), dtype=source.dtype, device=source.device)
        self._chain, self._index, self._source, self._value = chain, index, source, None
        return self

    def value(self) -> Tensor:
        if self._value is None:
            self._value = self._chain.look_inside(self._index, self._source)
        return self._value

    @classmethod
    def __torch_function__(cls, func: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None) -> Any:
        # What checkpoint() and DDP ask of their inputs is known without computing them.
        if func in _KNOWN and isinstance(args[0], Deferred):
            return getattr(args[0]._source, _KNOWN[func])
        with torch._C.DisableTorchFunctionSubclass():
            return func(*_real(args), **_real(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None) -> Any:
        # Where C++ was handed the tensor without asking Python first (autograd.Function).
        return func(*_real(args), **_real(kwargs or {}))


# A deferred value is on its source's device and needs no gradient, as the source: the chain was captured so.
_KNOWN = {getattr(Tensor, name).__get__: name for name in ("device", "requires_grad", "is_cuda")}


def _real(tree: Any) -> Any:
    return tree_map(lambda leaf: leaf.value() if isinstance(leaf, Deferred) else leaf, tree)


class Chain:
    """y = unit_n(... unit_1(x)) by a runner, installed as the units' own forwards.

    A call that the chain was not captured for (input that needs a gradient, other dtype, device or autocast, changed
    state of a unit) runs the original forwards; so does every unit that is given something else than the chain's own
    deferred value. The code between the units sees tensors with the right values in either case.
    """

    def __init__(self, units: list[Unit], probe: Tensor, autocast: tuple) -> None:
        self.units = units
        self.guard = Guard([unit.module for unit in units])
        self.runner: Runner | None = None
        self.looked_inside: set[int] = set()
        self.on_bypass: Callable[[str], None] = lambda reason: None
        self.bypassed: dict[str, int] = {}
        self.autocast = autocast
        self.few: tuple[Tensor, Tensor] | None = None  # some samples of an input and what eager makes of them
        self._kind = (probe.dtype, probe.device, probe.dim(), autocast)
        self._forwards: list[OwnForward] = []

    @property
    def name(self) -> str:
        first, last = self.units[0].name, self.units[-1].name
        return first if first == last else f"{first} .. {last}"

    def originals(self, x: Tensor) -> tuple:
        """The units' own forwards one after the other."""
        return (self._original(len(self.units) - 1, x),)

    def install(self, runner: Runner) -> None:
        self.runner = runner
        self._forwards = [OwnForward(u.module, partial(self._forward, i)) for i, u in enumerate(self.units)]

    def remove(self) -> None:
        for forward in self._forwards:
            forward.remove()
        self._forwards = []

    def look_inside(self, index: int, source: Tensor) -> Tensor:
        self.looked_inside.add(index)
        with constant():
            return self._original(index, source)

    def _original(self, index: int, x: Any) -> Any:
        for i in range(index + 1):
            x = self._forwards[i].original(x) if self._forwards else self.units[i].module.forward(x)
        return x

    def _forward(self, i: int, *args: Any, **kwargs: Any) -> Any:
        x = args[0] if len(args) == 1 and not kwargs else None
        last = len(self.units) - 1
        if type(x) is Deferred and x._chain is self and x._index == i - 1:
            if i < last:
                return Deferred(self, i, x._source)
            return self.runner(x._source)[0]
        if i == 0 and self._usable(x):
            return self.runner(x)[0] if last == 0 else Deferred(self, 0, x)
        return self._forwards[i].original(*args, **kwargs)

    @torch.compiler.disable
    def _usable(self, x: Any) -> bool:
        reason = self._unusable(x)
        if reason is not None:
            self.bypassed[reason] = self.bypassed.get(reason, 0) + 1
            self.on_bypass(reason)
        return reason is None

    def _unusable(self, x: Any) -> str | None:
        if not plain_tensor(x):
            return "the input is not a plain tensor"
        if x.requires_grad and torch.is_grad_enabled():
            return "the input needs a gradient"
        if (x.dtype, x.device, x.dim(), autocast_state(x.device)) != self._kind:
            return "another dtype, device, rank or autocast than at the capture"
        return self.guard.broken()
