"""Frozen units that feed the next one, run as one engine at the call of the first.

The first unit's call runs the engine for all units. All units but the last return a placeholder, `Deferred`. The last
unit returns what the engine gave. Each unit looks again, at its own call, whether it is called as at the capture.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from ..attach import OwnForward
from ..torch_state import autocast_state, version_of
from .forms import Input
from .guard import HOOKED, STALE, has_global_hooks, other_values, plain_tensor, watched_by_user
from .judge import Trial, constant
from .units import Unit, values_of


@dataclass
class Passage:
    """One run of a chain.

    Attributes:
        given: the chain's inputs at the first unit's call.
        y: what the engine gave.
        inputs: what inner values are computed from. The first passage, which shows who looks at values, has copies.
        versions: of `given` at the first unit's call.
        reached: the last unit that was called.
        values: of the units that were reached when somebody first looked at one. Later units run as they are.
    """

    chain: "Chain"
    given: tuple[Tensor, ...]
    y: Tensor
    inputs: tuple[Tensor, ...]
    versions: list[int]
    reached: int = 0
    values: list[Tensor] = field(default_factory=list)

    def is_as_it_was(self) -> bool:
        return list(map(version_of, self.given)) == self.versions

    def value(self, index: int) -> Tensor:
        """-> what unit `index` gives, by the units' own forwards.

        All units that were called run. One may write what another returned.

        Raises:
            RuntimeError: the chain's input was changed since.
        """
        if not self.values:
            units = self.chain.units
            if self.inputs is self.given and not self.is_as_it_was():
                raise RuntimeError(
                    f"the output of frozen module {units[index].name} was looked at after the input of {units[0].name} "
                    "was changed in place: it cannot be computed any more; pass prefix='off'"
                )
            enabled, dtype = self.chain.autocast
            with constant(), torch.autocast(self.given[0].device.type, enabled=enabled, dtype=dtype):
                self.values = list(islice(values_of(units, self.inputs), self.reached + 1))
        return self.values[index]


class Deferred(torch.Tensor):
    """What one unit of a chain gives in one passage. The units compute the value once anyone looks at it."""

    passage: Passage
    unit: int

    @staticmethod
    def __new__(cls, passage: Passage, unit: int) -> "Deferred":
        dtype, device, *_ = passage.chain.kinds[0]
        # No size that anyone could use by mistake; everything below goes through value().
        self = torch.Tensor._make_wrapper_subclass(cls, (0,), dtype=dtype, device=device)
        self.__dict__.update(passage=passage, unit=unit)
        passage.chain.placeholders.add(self)
        return self

    @property  # type: ignore[misc]  # it can only be read
    def __class__(self) -> type:
        return Tensor

    def value(self) -> Tensor:
        self.passage.chain.looked_inside.add(self.unit)
        return self.known()

    def known(self) -> Tensor:
        """The value, which does not count as looked at."""
        return self.passage.value(self.unit)

    @classmethod
    def __torch_function__(cls, func: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None) -> Any:
        # What checkpoint() and DDP ask of their inputs is known without computing them.
        if func in _KNOWN and isinstance(args[0], Deferred):
            return getattr(args[0].passage.given[0], _KNOWN[func])
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


def real(tree: Any, value: Callable[[Deferred], Tensor] = Deferred.value) -> Any:
    """-> the tree with the values of what is deferred in it."""
    return tree_map_only(Deferred, value, tree)


class Chain:
    """y = unit_n(... unit_1(x)) by an engine on trial, installed as the units' own forwards.

    A call that the chain was not captured for (an input that needs a gradient, another dtype, device or autocast,
    changed state of a unit) runs the units' own forwards. A unit that is called otherwise than at the capture, or whose
    state changed since the first unit's call, runs its own forward, and is given the right values.

    Attributes:
        error: of the engine against the units, on the probe.
        kinds: dtype, device, rank and memory format of each input.
        placeholders: that were handed out since the model's forward ended last, and are held.
        passed: whether all units ran once in a row, called as at the capture.
        looked_inside: units whose output was used by something else than the next unit.
        bypassed: calls that ran the units as they are, by reason.
        was_changed: whether one of them ran so because of a change of a unit.
    """

    def __init__(
        self, units: list[Unit], inputs: list[Tensor], autocast: tuple[bool, torch.dtype], trial: Trial, error: float
    ) -> None:
        self.units, self.autocast, self.trial, self.error = units, autocast, trial, error
        self.kinds = list(map(_kind, inputs))
        self.passed = self.was_changed = False
        self.looked_inside: set[int] = set()
        self.bypassed = Counter[str]()
        self.placeholders: WeakSet[Deferred] = WeakSet()
        self._forwards = [OwnForward(unit.module, partial(self._forward, i)) for i, unit in enumerate(units)]

    @property
    def is_settled(self) -> bool:
        """Whether the chain has shown that nobody looks inside, and is not timed any more."""
        return self.passed and not self.looked_inside and not self.trial.open

    def remove(self) -> None:
        for forward in self._forwards:
            forward.remove()
        self._forwards = []

    def settle(self) -> None:
        """The model's forward is over: placeholders that somebody has kept become values, before a weight changes."""
        for placeholder in self.placeholders:
            placeholder.value()
        self.placeholders.clear()

    @torch.compiler.disable
    def _forward(self, i: int, *args: Any, **kwargs: Any) -> Any:
        passage = self._start(args, kwargs) if i == 0 else self._goes_on(i, args, kwargs)
        if passage is None or passage.values:
            value = Deferred.value if passage is None else Deferred.known
            return self.units[i].forward(*real(args, value), **real(kwargs, value))
        passage.reached, is_last = i, i == len(self.units) - 1
        self.passed |= is_last
        return self.units[i].result.fill(passage.y if is_last else Deferred(passage, i), passage.given)

    def _start(self, args: tuple, kwargs: dict) -> Passage | None:
        """The first unit's call -> the passage; None where the units run as they are."""
        call = self.units[0].call
        leaves = call.match((args, kwargs))
        given = None if leaves is None else call.inputs(leaves)
        reason = "called otherwise than at the capture" if given is None else self._unusable(given)
        if given is None or reason is not None:
            self.bypassed[str(reason)] += 1
            self.was_changed |= reason in (STALE, HOOKED)
            return None
        copies = given if self.passed else tuple(x.clone() for x in given)
        versions = list(map(version_of, given))
        (y,) = self.trial(*given)
        return Passage(self, given, y, copies, versions)

    def _unusable(self, inputs: tuple) -> str | None:
        for x, kind in zip(inputs, self.kinds, strict=True):
            if not plain_tensor(x):
                return "an input is not a plain tensor"
            if x.requires_grad and torch.is_grad_enabled():
                return "an input needs a gradient"
            if _kind(x) != kind:
                return "another dtype, device, rank or memory format than at the capture"
        if autocast_state(inputs[0].device) != self.autocast:
            return "another autocast than at the capture"
        if has_global_hooks():
            return "a global module hook is registered"
        if watched_by_user():
            return "a mode is active that sees each operation"
        guards = [unit.guard for unit in self.units]
        reasons = (reason for guard in guards if (reason := guard.broken(values=False)))
        return next(reasons, None) or (STALE if other_values(guards) else None)

    def _goes_on(self, i: int, args: tuple, kwargs: dict) -> Passage | None:
        """A later unit's call -> the passage whose value the unit was given; None where the unit runs as it is."""
        unit = self.units[i]
        found = args if unit.call.alone and len(args) == 1 and not kwargs else unit.call.match((args, kwargs))
        value = found and found[unit.call.at]
        if type(value) is not Deferred or value.passage.chain is not self or value.unit != i - 1:
            return None
        passage = value.passage
        same = unit.call.alone or all(
            leaf is passage.given[known.index]
            for leaf, known in zip(found or (), unit.call.leaves, strict=True)
            if type(known) is Input
        )
        # Bytes were compared at the first unit's call.
        changed = unit.guard.broken(values=False) or autocast_state(passage.given[0].device) != self.autocast
        if passage.values or (same and not changed and (len(passage.given) == 1 or passage.is_as_it_was())):
            return passage
        self.looked_inside.add(i - 1)
        return None


def _kind(x: Tensor) -> tuple:
    images = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return x.dtype, x.device, x.dim(), x.is_contiguous(), images
