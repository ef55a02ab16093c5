"""The units of the frozen prefix as one real forward runs them, cut into segments that may become chains."""

import weakref
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..attach import OwnForward
from ..torch_state import autocast_state, generator_states, version_of
from .code import may_write_lists
from .forms import Form, flatten
from .guard import Guard
from .judge import Refused, first_line, now
from .units import Unit

PROBE_SAMPLES = 4
_NOTHING = torch.empty(0)  # before the first unit


@dataclass
class Segment:
    """Units in order of execution, each given what the one before it returned.

    Attributes:
        inputs: the value that the first unit was given, and the other tensors that the units were given.
        y: what the last unit returned.
        y_version: of y, then.
        few_inputs: copies of the first samples of the inputs.
        few_y: copies of the first samples of y.
        seconds: that the units take.
    """

    autocast: tuple[bool, torch.dtype]
    units: list[Unit] = field(default_factory=list)
    inputs: list[Tensor] = field(default_factory=list)
    few_inputs: list[Tensor] = field(default_factory=list)
    y: Tensor = _NOTHING
    y_version: int = 0
    few_y: Tensor = _NOTHING
    seconds: float = 0.0


class Recorder:
    """Watches the frozen units during one forward of the user's own. Nothing runs twice.

    The recorder puts forwards on the instances. A module may compute otherwise where it finds hooks.

    Args:
        names: of the frozen units' modules, in any order.
        cut_after: units whose output is used by more than the next unit.
        refused: units that run as they are, and why.

    Attributes:
        segments: what may become chains.
        refused: units that run as they are, by name, and why.
        left_out: units to leave out, and why. Another forward has to be watched then.
        written: inner units whose output was written to later. Another forward has to be watched then, cut there.
    """

    def __init__(
        self,
        names: dict[nn.Module, str],
        *,
        cut_after: set[nn.Module],
        refused: dict[nn.Module, str],
    ) -> None:
        self.segments: list[Segment] = []
        self.refused: dict[str, str] = {}
        self.left_out: dict[nn.Module, str] = {}
        self.written: set[nn.Module] = set()
        self._cut_after = cut_after
        self._segment: Segment | None = None  # which the next unit may go on with
        self._called: Counter[nn.Module] = Counter()
        self._returned: list[tuple[weakref.ref, int, nn.Module]] = []  # outputs and their versions
        self._forwards = [OwnForward(module, lambda: None) for module in names]
        for own in self._forwards:
            name, own.function = names[own.module], own.original
            try:
                if own.module in refused:
                    raise Refused(refused[own.module])
                own.function = partial(self._run, own, name, Guard(own.module))
            except Refused as reason:
                self.refused[name] = str(reason)
            except Exception as error:  # what a stranger's module holds is not known
                self.refused[name] = first_line(error)

    def finish(self) -> None:
        """The forward has ended."""
        for unit in [unit for segment in self.segments for unit in segment.units]:
            if self._called[unit.module] > 1:
                self.left_out[unit.module] = "it runs several times in a forward"
            elif unit.guard.broken():
                self.left_out[unit.module] = "the model changes it behind its call"
        inner = {unit.module for segment in self.segments for unit in segment.units[:-1]}
        written = {m for y, version, m in self._returned if (t := y()) is not None and version_of(t) != version}
        self.written = inner & written
        self.remove()

    def remove(self) -> None:
        for forward in reversed(self._forwards):
            forward.remove()
        self._forwards = []

    def _run(self, own: OwnForward, name: str, guard: Guard, *args: Any, **kwargs: Any) -> Any:
        self._called[own.module] += 1
        segment, self._segment = self._segment, None
        tensors = _tensors((args, kwargs))
        versions, states = list(map(version_of, tensors)), generator_states(tensors)
        if segment is not None and version_of(segment.y) != segment.y_version:
            segment = None  # the model's own code wrote to it
        changed = guard.broken()
        start = now(tensors)
        output = own.original(*args, **kwargs)
        seconds = now(tensors) - start
        try:
            if changed:
                raise Refused("the model changes it in its forward")
            if generator_states(tensors) != states:
                raise Refused("it draws random numbers")
            if what := guard.written():
                raise Refused(f"its forward writes {what}")
            written = [t for t, version in zip(tensors, versions, strict=True) if version_of(t) != version]
            kinds = map(type, guard.modules)
            if _has_list((args, kwargs)) and any(map(may_write_lists, kinds)):
                raise Refused("it is called with a list, which it may change")
            segment, call = self._called_with(segment, (args, kwargs), tensors, bool(written))
            if any(t is not output for t in written):
                raise Refused("it changes its input in place")
            y, result = self._returned_by(segment, output)
            self._add(segment, Unit(name, own.module, own.original, guard, call, result), y)
            segment.seconds += seconds
        except Refused as reason:
            self.refused[name] = str(reason)
        return output

    def _called_with(
        self, segment: Segment | None, given: tuple, tensors: list[Tensor], writes: bool
    ) -> tuple[Segment, Form]:
        """-> the segment that a unit goes on with, or a new one, and how the unit is called."""
        if not tensors or any(type(t) is not Tensor for t in tensors):
            raise Refused("it is called with something else than plain tensors" if tensors else "no tensor is given")
        if any(map(vars, tensors)):
            raise Refused("an attribute was set on its input")
        if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
            raise Refused("its input needs a gradient")
        autocast = autocast_state(tensors[0].device)
        if segment is not None and autocast == segment.autocast and sum(t is segment.y for t in tensors) == 1:
            known = [segment.y, *segment.inputs]
            if all(any(t is x for x in known) for t in tensors):
                return segment, _form(given, segment.y, segment.inputs, "is called with")
        if writes:
            raise Refused("it changes its input in place")
        inputs = list({id(t): t for t in tensors}.values())
        segment = Segment(autocast, inputs=inputs, few_inputs=[_few(x, tensors[0]) for x in inputs])
        return segment, _form(given, None, inputs, "is called with")

    def _returned_by(self, segment: Segment, output: Any) -> tuple[Tensor, Form]:
        """-> the value that goes on, and what the unit returns."""
        known = [*segment.inputs, segment.y]
        new = [t for t in _tensors(output) if not any(t is x for x in known)]
        if not new and type(output) is Tensor:
            new = [output]  # handed through
        if len(new) != 1:
            raise Refused(f"it returns {len(new)} tensors")
        (y,) = new
        result = _form(output, y, segment.inputs, "returns")
        if type(y) is not Tensor or y.device != segment.inputs[0].device or y.requires_grad:
            raise Refused("its output is on another device, no plain tensor, or needs a gradient")
        return y, result

    def _add(self, segment: Segment, unit: Unit, y: Tensor) -> None:
        segment.y, segment.y_version = y, version_of(y)
        segment.few_y = _few(y, segment.inputs[0])
        segment.units.append(unit)
        if len(segment.units) == 1:
            self.segments.append(segment)
        # What a unit wrote in place, as the chain's next one, nobody else wrote.
        self._returned = [(ref, segment.y_version if ref() is y else v, m) for ref, v, m in self._returned]
        self._returned.append((weakref.ref(y), segment.y_version, unit.module))
        self._segment = None if unit.module in self._cut_after else segment


def _form(tree: Any, carried: Tensor | None, inputs: list[Tensor], how: str) -> Form:
    try:
        return Form.of(tree, carried, inputs)
    except Refused as what:
        hint = "; a cache of keys and values is written to: pass use_cache=False" if "Cache" in str(what) else ""
        raise Refused(f"it {how} {what}{hint}") from None


def _has_list(tree: Any) -> bool:
    parts = tree.values() if type(tree) is dict else tree if type(tree) in (tuple, list) else ()
    return type(tree) is list or any(map(_has_list, parts))


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in flatten(tree)[0] if isinstance(leaf, Tensor)]


def _few(t: Tensor, x: Tensor) -> Tensor:
    """A copy of t, of its first samples where it has one for each of x's."""
    return (t[:PROBE_SAMPLES] if t.dim() and x.dim() and t.shape[0] == x.shape[0] else t).detach().clone()
