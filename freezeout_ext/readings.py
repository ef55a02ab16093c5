"""What can be asked of a FreezeOut: rates, what is frozen, memory, reports. Nothing here changes it."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from .arguments import check_count
from .layers import Layers
from .memory import Memory, SavedBytes, held_memory
from .order import OrderCheck
from .param_groups import ParamGroups
from .prefix import Prefix, PrefixReport
from .schedule import Schedule
from .transition import FrozenLayers, Transition


class Readings:
    """The half of FreezeOut that only looks."""

    model: nn.Module
    optimizers: tuple[torch.optim.Optimizer, ...]
    layers: Layers
    schedule: Schedule
    step_count: int
    transitions: list[Transition]
    _frozen: FrozenLayers
    _groups: ParamGroups
    _order: OrderCheck
    _prefix: Prefix
    _saved_bytes: int | None

    @property
    def num_frozen(self) -> int:
        """So many layers are frozen: layers 0 .. num_frozen - 1."""
        return self._frozen.count

    def __repr__(self) -> str:
        rule = (
            f"t_0={self.schedule.t_0}, how_scale={self.schedule.how_scale!r}"
            if self.schedule.milestones is None
            else f"milestones={self.schedule.milestones}"
        )
        start = f"start_frozen={self.schedule.start_frozen}, " if self.schedule.start_frozen else ""
        return (
            f"FreezeOut(step {self.step_count} of {self.schedule.total_steps}, {self.num_frozen} of {len(self.layers)} "
            f"layers frozen, {start}{rule}, scale_lr={self.schedule.scale_lr}; {self.memory()})"
        )

    def learning_rates(self) -> list[float]:
        """lr_i(step) of each layer, 0 where frozen. A layer with several param groups gives that of the first."""
        return self._groups.rates()

    def anneals_as(self, i: int) -> int:
        """The layer whose rate layer i has: i itself, or the rule's first active layer if i was thawed by hand."""
        check_count("i", i, 0, len(self.layers) - 1)
        return max(i, self.schedule.num_frozen(self.step_count))

    def prefix_report(self) -> PrefixReport:
        """What runs the frozen layers' forward now: route, what was fused, what fell back and why, error, time."""
        return self._prefix.report()

    @property
    def prefix_is_settled(self) -> bool:
        """Whether the frozen layers' forward stays as it is until the next transition: captured, checked, timed."""
        return self._prefix.is_settled

    def memory(self) -> Memory:
        """Bytes of weights, gradients, optimizer state and, once counted, of what is saved for backward."""
        return held_memory(self.model, self.optimizers, self._saved_bytes)

    @contextmanager
    def count_memory(self) -> Iterator[None]:
        """Around a forward pass in training: counts the bytes that autograd saves, for `memory()` and `report()`."""
        saved = SavedBytes(self.model)
        with saved.watch():
            yield
        self._saved_bytes = saved.total

    def report(self) -> str:
        """Text: the step, what is frozen since when, what came frozen, the memory of a step, the prefix."""
        lines = [repr(self)]
        if self.layers.given:
            names = ", ".join(layer.name for layer in self.layers.given)
            lines.append(f"came with requires_grad=False and belongs to the frozen prefix, in eval mode: {names}")
        lines += [str(transition) for transition in self.transitions]
        return "\n".join([*lines, str(self.prefix_report())])

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Within, the model has no hook and no engine of this package, for torch.jit.script and the like.

        Frozen layers stay frozen, in eval mode. The prefix is captured again in the next forward behind it.
        """
        with self._order.paused(), self._frozen.paused():
            yield
