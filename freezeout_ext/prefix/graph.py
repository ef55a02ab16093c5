"""What of a model is the frozen prefix: seen in one real forward, cut into chains of units."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..attach import OwnForward
from .chain import Chain, Unit
from .guard import autocast_state, ineligible
from .runtime import PROBE_SAMPLES


@dataclass
class Segment:
    """Units in order of execution, each given the very tensor that the one before it returned.

    For the probe, as eager had them: x, y, input of the unit at `start` and output of the last one, and their versions;
    few, copies of the first samples of the input of the first unit watched and of the last one's output. The first
    `kept` units are of an installed chain and were not watched; seconds: what the others took.
    """

    units: list[Unit]
    start: int
    x: Tensor
    autocast: tuple
    x_version: int
    y: Tensor | None = None
    y_version: int = 0
    few: tuple[Tensor, Tensor] | None = None
    kept: int = 0
    seconds: float = 0.0

    def probe(self) -> tuple[int, Tensor, Tensor]:
        """-> the first unit to probe, its input and the last one's output; a few samples where they were written to."""
        if _version(self.x) != self.x_version or _version(self.y) != self.y_version:
            return self.kept, *self.few
        return self.start, self.x, self.y


@dataclass
class Recording:
    segments: list[Segment] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)

    def single_chain(self, units: Iterable[Unit]) -> bool:
        return len(self.segments) == 1 and len(self.segments[0].units) == len(list(units)) and not self.refused


class Recorder:
    """Watches the frozen units during one forward of the user's own; nothing runs twice.

    By forwards on the instances, not by hooks: nn.TransformerEncoderLayer computes otherwise where it finds hooks.

    Args:
        units: the frozen units, in any order.
        verified: units whose part of a chain was verified before; the probe starts at the first other one.
        cut_after: units whose output is used by more than the next unit.
        kept: an installed chain in front of the units, which runs and is extended.
    """

    def __init__(
        self, units: list[Unit], *, verified: set[nn.Module], cut_after: set[nn.Module], kept: Chain | None = None
    ) -> None:
        self.recording = Recording()
        self._verified, self._cut_after = verified, cut_after
        self._segment: Segment | None = None
        self._given: Any = None
        self._called: dict[nn.Module, int] = {}
        self._forwards: list[OwnForward] = []
        if kept is not None:
            self._watch(kept.units[-1].module, partial(self._run_kept, kept, dict(kept.bypassed)))
        for unit in units:
            reason = ineligible(unit.module)
            if reason is not None:
                self.recording.refused[unit.name] = reason
                continue
            self._watch(unit.module, partial(self._run, unit))

    def finish(self) -> Recording:
        self.remove()
        recording = self.recording
        often = {module for module, count in self._called.items() if count > 1}
        kept = []
        for segment in recording.segments:
            if any(unit.module in often for unit in segment.units):
                for unit in segment.units:
                    if unit.module in often:
                        recording.refused[unit.name] = "it runs several times in a forward"
                continue
            kept.append(segment)
        recording.segments = kept
        return recording

    def remove(self) -> None:
        for forward in reversed(self._forwards):
            forward.remove()
        self._forwards = []

    def _watch(self, module: nn.Module, run: Callable) -> None:
        own = OwnForward(module, lambda *args, **kwargs: run(own.original, *args, **kwargs))
        self._forwards.append(own)

    def _run(self, unit: Unit, forward: Callable, *args: Any, **kwargs: Any) -> Any:
        self._before(unit, args, kwargs)
        start = time.perf_counter()
        output = forward(*args, **kwargs)
        self._after(unit, output, time.perf_counter() - start)
        return output

    def _run_kept(self, kept: Chain, bypassed: dict, forward: Callable, *args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        self._segment = None
        if type(output) is Tensor and kept.bypassed == bypassed:
            count, version = len(kept.units), _version(output)
            self._segment = Segment(
                list(kept.units), count, output, kept.autocast, version, output, version, kept=count
            )
            self.recording.segments.append(self._segment)
        return output

    def _before(self, unit: Unit, args: tuple, kwargs: dict) -> None:
        self._called[unit.module] = self._called.get(unit.module, 0) + 1
        self._given = None
        if len(args) != 1 or kwargs or type(args[0]) is not Tensor:
            self.recording.refused[unit.name] = "it is called with something else than one tensor"
        elif args[0].requires_grad and torch.is_grad_enabled():
            self.recording.refused[unit.name] = "its input needs a gradient"
        else:
            self._given = (args[0], _version(args[0]))

    def _after(self, unit: Unit, output: Any, seconds: float) -> None:
        given, self._given = self._given, None
        if given is None:
            self._segment = None
            return
        x, version = given
        if type(output) is not Tensor:
            self.recording.refused[unit.name] = f"it returns a {type(output).__name__}"
            self._segment = None
            return
        if output.device != x.device or output.requires_grad:
            self.recording.refused[unit.name] = "its output is on another device or needs a gradient"
            self._segment = None
            return
        if _version(x) != version and x is not output:
            self.recording.refused[unit.name] = "it changes its input in place"
            self._segment = None
            return
        autocast = autocast_state(x.device)
        segment = self._segment
        if segment is None or segment.y is not x or segment.autocast != autocast:
            segment = Segment([], 0, x, autocast, _version(x))
            self.recording.segments.append(segment)
        self._extend(segment, unit, x, output)
        segment.seconds += seconds
        self._segment = None if unit.module in self._cut_after else segment

    def _extend(self, segment: Segment, unit: Unit, x: Tensor, y: Tensor) -> None:
        segment.units.append(unit)
        given = x[:PROBE_SAMPLES].detach().clone() if segment.few is None else segment.few[0]
        segment.few = (given, y[:PROBE_SAMPLES].detach().clone())
        if unit.module in self._verified and segment.start == len(segment.units) - 1:
            # Verified in an earlier transition: the probe may start behind it.
            segment.start += 1
            segment.x, segment.x_version = y, _version(y)
        segment.y, segment.y_version = y, _version(y)


def _version(x: Tensor) -> int:
    return -1 if x.is_inference() else x._version
