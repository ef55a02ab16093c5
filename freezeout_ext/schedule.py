"""When each layer freezes and what its learning rate is until then: pure maths of (layer, step)."""

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import TypeGuard

from .arguments import check_count, check_flag

MOST_LAYERS = 1_000_000  # t_i is computed for each
POWERS = {"linear": 1.0, "squared": 2.0, "cubic": 3.0}


@dataclass(frozen=True)
class Schedule:
    """t_i = (t_0 + (1 - t_0) * i / L) ** power; lr_i(step) = base_lr * lr_factor(i, step), 0 from milestone_i on.

    Layers 0..L are in forward order. Steps are optimizer steps, counted from 0. Layer L has t = 1 and never freezes.

    Args:
        num_layers: L + 1, and `start_frozen` more.
        total_steps: optimizer steps of the whole run.
        t_0: where layer 0 freezes, before the power, in (0, 1]; 1 freezes nothing.
        how_scale: "linear", "squared", "cubic", or any positive power.
        scale_lr: multiply layer i's learning rate by 1 / t_i. The rate's sum over the run then does not depend on t_i.
        warmup_steps: the rates rise linearly to their peak over these steps. The cosines begin there.
        max_transitions: the most moments at which layers freeze. Neighbours freeze together, at the mean of their t_i:
            the layers' active time, summed, stays the same.
        start_frozen: so many layers have t = 0, frozen before the first step. i and L count the layers behind them.
        milestones: t_i itself of each layer behind the `start_frozen` ones, in place of `t_0` and `how_scale`.
            Fractions in [0, 1] that do not fall, the last one 1. A layer with 0 is frozen before the first step.

    Raises:
        ValueError, TypeError: an argument out of its range, by name.

    Source: Brock et al. 2017, arXiv 1706.04983. The factor 1/2 of the cosine is in the authors' code, not the paper.
    """

    num_layers: int
    total_steps: int
    t_0: float = 0.8
    how_scale: str | float = "cubic"
    scale_lr: bool = True
    warmup_steps: int = 0
    max_transitions: int | None = None
    start_frozen: int = 0
    milestones: Sequence[float] | None = None

    def __post_init__(self) -> None:
        check_count("num_layers", self.num_layers, 1, MOST_LAYERS)
        check_count("total_steps", self.total_steps, 1)
        check_count("warmup_steps", self.warmup_steps, 0)
        check_flag("scale_lr", self.scale_lr)
        check_count("start_frozen", self.start_frozen, 0)
        if self.max_transitions is not None:
            check_count("max_transitions", self.max_transitions, 1)
        if self.start_frozen >= self.num_layers:
            raise ValueError(
                f"start_frozen must leave a layer to train, got {self.start_frozen} of {self.num_layers} layers"
            )
        if not _is_real(self.t_0) or not 0 < self.t_0 <= 1:
            raise ValueError(f"t_0 must be in (0, 1], got {self.t_0!r}")
        _power(self.how_scale)
        if self.milestones is not None:
            self._check_milestones()
        first = next(m for m in self._milestones if m > 0)
        if self.warmup_steps >= first:
            raise ValueError(
                f"warmup_steps must end before the first layer freezes at step {first:g}, got {self.warmup_steps}"
            )

    def _check_milestones(self) -> None:
        given, layers = self.milestones, self.num_layers - self.start_frozen
        if isinstance(given, str) or not isinstance(given, Sequence):
            raise TypeError(f"milestones must be a sequence of numbers, got {type(given).__name__}")
        object.__setattr__(self, "milestones", tuple(given))
        defaults = {f.name: f.default for f in fields(self)}
        for name in ("t_0", "how_scale"):
            if getattr(self, name) != defaults[name]:
                raise ValueError(f"milestones must stand alone: {name} has no meaning beside them")
        if len(given) != layers:
            behind = f" behind the {self.start_frozen} of start_frozen" if self.start_frozen else ""
            raise ValueError(
                f"milestones must have one entry for each of the {layers} layers{behind}, got {len(given)}"
            )
        for i, t in enumerate(given):
            if not _is_real(t) or not 0 <= t <= 1:
                raise ValueError(f"milestones must be fractions in [0, 1], got {t!r} for layer {i}")
            if i and t < given[i - 1]:
                raise ValueError(f"milestones must not fall, got {given[i - 1]} and then {t} for layer {i}")
        if given[-1] != 1:
            raise ValueError(f"milestones must end with 1 (the last layer never freezes), got {given[-1]}")

    @cached_property
    def _times(self) -> tuple[float, ...]:
        power, last = _power(self.how_scale), self.num_layers - self.start_frozen - 1
        if self.milestones is None:
            times = [(self.t_0 + (1 - self.t_0) * i / last) ** power for i in range(last)] + [1.0]
        else:
            times = [float(t) for t in self.milestones]
        begun = self.start_frozen + times.count(0)
        times = [t for t in times if t > 0]
        freezing = sum(t < 1 for t in times)
        if self.max_transitions is not None and self.max_transitions < freezing:
            snapped = []
            for k in range(self.max_transitions):
                first = k * freezing // self.max_transitions
                end = (k + 1) * freezing // self.max_transitions
                snapped += [math.fsum(times[first:end]) / (end - first)] * (end - first)
            times = snapped + times[freezing:]
        return tuple([0.0] * begun + times)

    @cached_property
    def _milestones(self) -> tuple[float, ...]:
        # Rounded far below a step: 0.55 * 100 is 55.00000000000001, and must be step 55. A t above 0 trains in step 0.
        return tuple(max(round(t * self.total_steps, 6), 1e-6) if t else 0.0 for t in self._times)

    @cached_property
    def _freezing(self) -> tuple[float, ...]:
        """Milestones of the layers that freeze at all."""
        return tuple(m for m, t in zip(self._milestones, self._times, strict=True) if t < 1)

    @cached_property
    def _peaks(self) -> tuple[float, ...]:
        return tuple(1 / t if self.scale_lr and t else 1.0 for t in self._times)

    def t(self, i: int) -> float:
        """t_i: the fraction of the run for which layer i trains (after the power and max_transitions), 0 to 1."""
        check_count("i", i, 0, self.num_layers - 1)
        return self._times[i]

    def milestone(self, i: int) -> float:
        """milestone_i = t_i * total_steps: layer i is active while step < milestone_i."""
        check_count("i", i, 0, self.num_layers - 1)
        return self._milestones[i]

    def lr_factor(self, i: int, step: float) -> float:
        """lr_i(step) / base_lr = (1 / t_i if scale_lr else 1) * 0.5 * (1 + cos(pi * progress)), 0 once frozen.

        progress runs from 0 at the end of the warm-up to 1 at milestone_i.
        """
        check_count("i", i, 0, self.num_layers - 1)
        return self.lr_factors(step, i, i + 1)[0]

    def lr_factors(self, step: float, start: int = 0, end: int | None = None) -> list[float]:
        """lr_factor(i, step) of the layers i in start .. end - 1, end None: of all from `start` on."""
        _check_step(step)
        warmup, cos, pi = self.warmup_steps, math.cos, math.pi
        layers = zip(self._peaks[start:end], self._milestones[start:end], strict=True)
        if step < warmup:
            # Reaches 1 at step == warmup, and the first step is not lost to a rate of 0.
            return [peak * (step + 1) / (warmup + 1) if step < milestone else 0.0 for peak, milestone in layers]
        return [
            peak * 0.5 * (1 + cos(pi * (step - warmup) / (milestone - warmup))) if step < milestone else 0.0
            for peak, milestone in layers
        ]

    def num_frozen(self, step: float) -> int:
        """How many layers are frozen at `step`: layers 0 .. num_frozen - 1."""
        _check_step(step)
        return bisect_right(self._freezing, step)

    def next_milestone(self, step: int) -> int | None:
        """The first step after `step` at which more layers are frozen than at `step`; None if none are left."""
        frozen = self.num_frozen(step)
        return math.ceil(self._freezing[frozen]) if frozen < len(self._freezing) else None


def _power(how_scale: str | float) -> float:
    if isinstance(how_scale, str) and how_scale in POWERS:
        return POWERS[how_scale]
    if _is_real(how_scale) and 0 < how_scale < math.inf:
        return float(how_scale)
    raise ValueError(f"how_scale must be one of {', '.join(POWERS)} or a positive power, got {how_scale!r}")


def _is_real(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check_step(step: object) -> None:
    if not _is_real(step) or not step >= 0:
        raise ValueError(f"step must be a number >= 0, got {step!r}")
