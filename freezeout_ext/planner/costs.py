"""StepCosts is what a training step costs with k layers frozen. predict is what a schedule then saves."""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, NamedTuple

from ..schedule import Schedule

LEAST_T_0 = 0.01


@dataclass(frozen=True)
class StepCosts:
    """T(k) = sum_{i<k} frozen_forward_i + sum_{i>=k} forward_i + loss + backward_first_k + sum_{i>k} backward_i
    + optimizer_k: the step with layers 0 .. k-1 frozen, in `unit`.

    A loader that works ahead costs only what T(k) does not cover. The time of any other loader is added to T(k).

    Attributes:
        forward: of layer i in training.
        frozen_forward: of layer i in eval mode, with nothing saved for backward. The last layer never freezes: its
            entry is its `forward`.
        backward: of layer i, with the gradients of its weights and its input.
        backward_first: of layer i where layer i is the first active one, so that its input needs no gradient.
        optimizer: the update with k layers frozen, k = 0 .. L.
        loss: the criterion's forward. The criterion's backward counts with layer L.
        loader: to fetch one batch while nothing else runs.
        loader_ahead: whether the loader works while the step runs.
        memory: bytes at the peak with k layers frozen, None where not measured. Counted are parameters, buffers,
            gradients, optimizer state and tensors saved for backward. Workspaces are not.
        whole_step: the step with nothing frozen, measured whole and without instruments; None where costs are counted.
        saving_error: the sd of saving(k), from its scatter over the rounds of measuring; None for fewer than two
            rounds.
        unit: "s" or "FLOP".
        source: how the costs were found, for people.
    """

    layers: tuple[str, ...]
    forward: tuple[float, ...]
    frozen_forward: tuple[float, ...]
    backward: tuple[float, ...]
    backward_first: tuple[float, ...]
    optimizer: tuple[float, ...]
    loss: float = 0.0
    loader: float = 0.0
    loader_ahead: bool = False
    memory: tuple[int, ...] | None = None
    whole_step: float | None = None
    saving_error: tuple[float, ...] | None = None
    unit: str = "s"
    source: str = ""

    def __post_init__(self) -> None:
        for name in ("forward", "frozen_forward", "backward", "backward_first", "optimizer", "memory", "saving_error"):
            values = getattr(self, name)
            if values is not None and len(values) != len(self.layers):
                raise ValueError(f"{name} must have one value a layer, got {len(values)} for {len(self.layers)} layers")

    def step(self, num_frozen: int, *, free_prefix: bool = False) -> float:
        """T(num_frozen), with the wait for the loader.

        Args:
            num_frozen: layers.
            free_prefix: leaves the frozen layers' forward out.
        """
        k = num_frozen
        prefix = 0.0 if free_prefix else sum(self.frozen_forward[:k])
        compute = prefix + sum(self.forward[k:]) + self.loss + self.optimizer[k]
        compute += self.backward_first[k] + sum(self.backward[k + 1 :])
        return max(compute, self.loader) if self.loader_ahead else compute + self.loader

    def saving(self, num_frozen: int) -> float:
        """1 - T(num_frozen) / T(0): what a step saves while num_frozen layers are frozen."""
        return 1 - self.step(num_frozen) / self.step(0)

    @property
    def closure_error(self) -> float | None:
        """(sum of the parts - the whole step) / the whole step, nothing frozen, the loader left out."""
        if self.whole_step is None:
            return None
        parts = sum(self.forward) + self.loss + self.backward_first[0] + sum(self.backward[1:]) + self.optimizer[0]
        return parts / self.whole_step - 1

    def to_dict(self) -> dict:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict) -> "StepCosts":
        """The StepCosts of which to_dict returned `values`.

        Raises:
            ValueError: `values` are not what to_dict returns.
        """
        try:
            known: dict[str, Any] = {
                name: value for name, value in values.items() if name != "other"
            }  # always 0 in earlier versions
            known = {name: tuple(value) if isinstance(value, list) else value for name, value in known.items()}
            costs = cls(**known)
            numbers = [costs.loss, costs.loader, *costs.forward, *costs.frozen_forward, *costs.backward]
            numbers += [*costs.backward_first, *costs.optimizer, *(costs.saving_error or ()), *(costs.memory or ())]
            whole = all(isinstance(name, str) for name in costs.layers)
            whole &= all(isinstance(number, int | float) and math.isfinite(number) for number in numbers)
            whole &= len(costs.layers) > 0 and costs.step(0) > 0
        except TypeError as error:
            raise ValueError(f"costs cannot be read: {error}") from None
        if not whole:
            raise ValueError("costs must be finite numbers for each of one or more named layers")
        return costs


@dataclass(frozen=True)
class Prediction:
    """saving = 1 - sum over the run's steps of T(num_frozen(step)) / (total_steps * T(0)).

    Attributes:
        how_scale: the strategy.
        t_0: of the schedule.
        saving: a fraction of the run's cost without FreezeOut.
        saving_error: the sd of `saving`, as if the errors of all phases were one error; None where the costs have no
            saving_error.
        ceiling: what `saving` would be if the frozen layers' forward were free.
        cost: of the whole run with FreezeOut, in the costs' unit.
        full_cost: of the whole run without FreezeOut, in the costs' unit.
        memory: three numbers of bytes; None where not measured. The first is at the peak, while nothing is frozen, as
            without FreezeOut. The second is at the end of the run. The third is the mean over the steps.
    """

    how_scale: str | float
    t_0: float
    saving: float
    ceiling: float
    cost: float
    full_cost: float
    memory: tuple[int, int, float] | None
    saving_error: float | None = None


@dataclass(frozen=True)
class Suggestion:
    """The largest t_0 whose predicted saving reaches `wanted`, None where none does; and the most that is possible."""

    how_scale: str | float
    wanted: float
    t_0: float | None
    saving: float


class Tail(NamedTuple):
    """From `step` on only the first `num_frozen` layers are frozen, and no further layer freezes."""

    step: int
    num_frozen: int


def phases(schedule: Schedule, tail: Tail | None = None) -> Iterator[tuple[int, int]]:
    """(num_frozen, steps) of each stretch of the run between two transitions."""
    end = schedule.total_steps if tail is None else tail.step
    starts = [0]
    while (step := schedule.next_milestone(starts[-1])) is not None and step < end:
        starts.append(step)
    for start, stop in pairwise([*starts, end]):
        yield schedule.num_frozen(start), stop - start
    if tail is not None:
        yield min(tail.num_frozen, schedule.num_frozen(starts[-1])), schedule.total_steps - end


def predict(costs: StepCosts, schedule: Schedule, tail: Tail | None = None) -> Prediction:
    """What `schedule` would save of a run whose steps cost `costs`.

    Raises:
        ValueError: `schedule` and `costs` have different numbers of layers.
    """
    if schedule.num_layers != len(costs.layers):
        raise ValueError(f"schedule must have the {len(costs.layers)} layers of costs, got {schedule.num_layers}")
    spans = list(phases(schedule, tail))
    full = schedule.total_steps * costs.step(0)
    cost = sum(steps * costs.step(k) for k, steps in spans)
    least = sum(steps * costs.step(k, free_prefix=True) for k, steps in spans)
    memory = error = None
    if costs.saving_error:
        error = sum(steps * costs.saving_error[k] for k, steps in spans) / schedule.total_steps
    if costs.memory:
        mean = sum(steps * costs.memory[k] for k, steps in spans) / schedule.total_steps
        memory = costs.memory[0], costs.memory[spans[-1][0]], mean
    return Prediction(schedule.how_scale, schedule.t_0, 1 - cost / full, 1 - least / full, cost, full, memory, error)


def suggest_t_0(
    costs: StepCosts, wanted: float, *, how_scale: str | float = "cubic", tail: Tail | None = None, **schedule
) -> Suggestion:
    """The largest t_0, in hundredths, with predict(...).saving >= wanted.

    Args:
        wanted: a fraction in (0, 1).
        schedule: total_steps and further arguments of `Schedule`.
    """
    if not 0 < wanted < 1:
        raise ValueError(f"wanted must be a saving in (0, 1), got {wanted}")

    def saving(hundredths: int) -> float:
        t_0 = hundredths / 100
        return predict(costs, Schedule(len(costs.layers), t_0=t_0, how_scale=how_scale, **schedule), tail).saving

    # A warm-up must end before the first layer freezes, which bounds t_0 from below.
    low, high = _least_hundredths(len(costs.layers), how_scale, schedule), 100
    if saving(low) < wanted:
        return Suggestion(how_scale, wanted, None, saving(low))
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if saving(middle) >= wanted else (low, middle)
    return Suggestion(how_scale, wanted, low / 100, saving(low))


def _least_hundredths(num_layers: int, how_scale: str | float, schedule: dict) -> int:
    for hundredths in range(round(100 * LEAST_T_0), 100):
        try:
            Schedule(num_layers, t_0=hundredths / 100, how_scale=how_scale, **schedule)
        except ValueError:
            continue
        return hundredths
    Schedule(num_layers, t_0=1.0, how_scale=how_scale, **schedule)
    return 100
