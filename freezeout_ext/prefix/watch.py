"""What of a model is the frozen prefix: seen in one real forward, cut into chains of units."""

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..attach import OwnForward
from .chain import Link, Unit
from .code import may_write_lists
from .forms import Form, flatten
from .guard import Guard, autocast_state, guarded, version_of
from .judge import Refused, drawn_since, foreign_random_states

PROBE_SAMPLES = 4


@dataclass
class Segment:
    """Units in order of execution, each given what the one before it returned.

    Attributes:
        inputs: the value that the first unit was given, and the other tensors that the units were given.
        y: what the last unit returned, and its version then.
        few_inputs: copies of the first samples of the inputs.
        few_y: copies of the first samples of y.
    """

    links: list[Link]
    inputs: list[Tensor]
    autocast: tuple[bool, torch.dtype]
    few_inputs: list[Tensor]
    y: Tensor | None = None
    y_version: int = 0
    few_y: Tensor | None = None


@dataclass
class Recording:
    """What was seen: chains; units that run as they are; units to leave out or to cut after, for which
    to watch once more."""

    segments: list[Segment] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    left_out: dict[nn.Module, str] = field(default_factory=dict)
    cut_after: set[nn.Module] = field(default_factory=set)


class Recorder:
    """Watches the frozen units during one forward of the user's own; nothing runs twice.

    By forwards on the instances, not by hooks: nn.TransformerEncoderLayer computes otherwise where it finds hooks.

    Args:
        units: the frozen units, in any order.
        cut_after: units whose output is used by more than the next unit.
        refused: units that run as they are, and why.
    """

    def __init__(self, units: Iterable[Unit], *, cut_after: set[nn.Module], refused: dict[nn.Module, str]) -> None:
        self.recording = Recording()
        self._cut_after = cut_after
        self._segment: Segment | None = None
        self._called: dict[nn.Module, int] = {}
        self._inner: list[tuple[weakref.ref, nn.Module]] = []  # what units returned, for the next one alone so far
        self._forwards: list[OwnForward] = []
        for unit in units:
            if unit.module in refused:
                self.recording.refused[unit.name] = refused[unit.module]
                continue
            own = OwnForward(unit.module, lambda *args, **kwargs: None)
            own.function = partial(self._run, unit, own.original)
            self._forwards.append(own)

    def finish(self) -> Recording:
        """-> what was seen."""
        self.remove()
        recording = self.recording
        often = {module for module, count in self._called.items() if count > 1}
        for link in [link for segment in recording.segments for link in segment.links]:
            if link.unit.module in often:
                recording.left_out[link.unit.module] = "it runs several times in a forward"
            elif link.guard.broken():
                recording.left_out[link.unit.module] = "the model changes it behind its call"
        inner = {link.unit.module for segment in recording.segments for link in segment.links[:-1]}
        recording.cut_after &= inner
        return recording

    def remove(self) -> None:
        for forward in reversed(self._forwards):
            forward.remove()
        self._forwards = []

    def _run(self, unit: Unit, forward: Callable, *args: Any, **kwargs: Any) -> Any:
        self._called[unit.module] = self._called.get(unit.module, 0) + 1
        segment, self._segment = self._segment, None
        try:
            guard = guarded(unit.module)
        except Refused as reason:
            self.recording.refused[unit.name] = str(reason)
            return forward(*args, **kwargs)
        states = foreign_random_states(), _torch_states()
        tensors = list(_tensors((args, kwargs)))
        versions = [version_of(x) for x in tensors]
        self._note_other_uses(segment, tensors)
        output = forward(*args, **kwargs)
        try:
            if drawn_since(states[0]) or not _equal(states[1], _torch_states()):
                raise Refused("it draws random numbers")
            if what := guard.written():
                raise Refused(f"its forward writes {what}")
            written = [t for t, v in zip(tensors, versions, strict=True) if version_of(t) != v]
            if any(t is not output for t in written):
                raise Refused("it changes its input in place")
            before = [v for t, v in zip(tensors, versions, strict=True) if segment is not None and t is segment.y]
            if segment is not None and any(v != segment.y_version for v in before):
                segment = None  # the model's own code wrote to it
            self._add(segment, unit, guard, (args, kwargs), output, bool(written))
        except Refused as reason:
            self.recording.refused[unit.name] = str(reason)
        return output

    def _add(
        self, segment: Segment | None, unit: Unit, guard: Guard, given: tuple, output: Any, in_place: bool
    ) -> None:
        tensors = list(_tensors(given))
        if not tensors:
            raise Refused("it is called without a tensor")
        kinds: list[Any] = [type(m) for m in guard.modules]
        if _has_list(given) and any(map(may_write_lists, kinds)):
            raise Refused("it is called with a list, which it may change")
        if any(type(t) is not Tensor for t in tensors):
            raise Refused("it is called with something else than plain tensors")
        if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
            raise Refused("its input needs a gradient")
        autocast = autocast_state(tensors[0].device)
        call = None if segment is None else self._continued(segment, given, tensors, autocast)
        if segment is None or call is None:
            if in_place:
                raise Refused("it changes its input in place")
            segment = Segment([], [], autocast, [])
            call = self._called_with(given, _NOTHING, segment.inputs, segment.inputs.append)
            segment.few_inputs = [_few(x, tensors[0]) for x in segment.inputs]
        y = self._one_result(output, segment)
        result = self._called_with(output, y, segment.inputs, _no_other, returned=True)
        self._close_to(segment, y, tensors[0])
        segment.links.append(Link(unit, guard, call, result, in_place))
        if segment not in self.recording.segments:
            self.recording.segments.append(segment)
        self._inner.append((weakref.ref(y), unit.module))
        self._segment = None if unit.module in self._cut_after else segment

    def _note_other_uses(self, segment: Segment | None, tensors: list[Tensor]) -> None:
        """A value that is given to another unit than the next one ends its chain."""
        for t in tensors:
            if segment is None or t is not segment.y:
                self.recording.cut_after.update(m for inner, m in self._inner if inner() is t)

    def _continued(self, segment: Segment, given: tuple, tensors: list[Tensor], autocast: tuple) -> Form | None:
        """How the unit is called as the next one of the segment, None where it begins another."""
        mine = sum(t is segment.y for t in tensors)
        if segment.y is None or mine != 1 or autocast != segment.autocast:
            return None
        if any(t is not segment.y and not any(t is x for x in segment.inputs) for t in tensors):
            return None
        return self._called_with(given, segment.y, segment.inputs, _no_other)

    def _called_with(
        self, tree: Any, carried: Tensor, inputs: list[Tensor], new: Callable, *, returned: bool = False
    ) -> Form:
        try:
            return Form.of(tree, carried, inputs, new)
        except Refused as what:
            hint = "; a cache of keys and values is written to: pass use_cache=False" if "Cache" in str(what) else ""
            raise Refused(f"it {'returns' if returned else 'is called with'} {what}{hint}") from None

    def _one_result(self, output: Any, segment: Segment) -> Tensor:
        known = [*segment.inputs] + ([segment.y] if segment.y is not None else [])
        new = [t for t in _tensors(output) if not any(t is x for x in known)]
        if not new and type(output) is Tensor:
            new = [output]  # handed through
        if len(new) != 1:
            raise Refused(f"it returns {len(new)} tensors")
        return new[0]

    def _close_to(self, segment: Segment, y: Tensor, x: Tensor) -> None:
        if type(y) is not Tensor or y.device != x.device or y.requires_grad:
            raise Refused("its output is on another device, no plain tensor, or needs a gradient")
        segment.y, segment.y_version = y, version_of(y)
        segment.few_y = _few(y, segment.inputs[0])


def _has_list(tree: Any) -> bool:
    parts = tree.values() if type(tree) is dict else tree if type(tree) in (tuple, list) else ()
    return type(tree) is list or any(map(_has_list, parts))


_NOTHING = torch.empty(0)


def _no_other(tensor: Tensor) -> None:
    raise Refused("a tensor of its own")


def _tensors(tree: Any) -> Iterable[Tensor]:
    return (leaf for leaf in flatten(tree)[0] if isinstance(leaf, Tensor))


def _few(t: Tensor, x: Tensor) -> Tensor:
    """A copy of t, of its first samples where it has one for each of x's."""
    return (t[:PROBE_SAMPLES] if t.dim() and x.dim() and t.shape[0] == x.shape[0] else t).detach().clone()


def _torch_states() -> list[Tensor]:
    states = [torch.get_rng_state()]
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states.append(torch.cuda.get_rng_state())
    return states


def _equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
