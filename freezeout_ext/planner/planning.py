"""plan: what FreezeOut would save of your training, for every strategy and t_0."""

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from ..arguments import check_kind
from ..batch import Batch
from ..layers import Layers, find_layers
from ..schedule import POWERS, Schedule
from ..text import duration, table
from .costs import Prediction, StepCosts, Suggestion, Tail, predict, suggest_t_0
from .layer_bench import MakeOptimizer
from .measuring import measure_costs, measure_loader

T_0S = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


@dataclass(frozen=True)
class Plan:
    """predictions[j] = predict(costs, schedule j).

    `str()` of a Plan is two tables: the layers' costs and the predictions.

    Attributes:
        costs: of a step.
        schedule: total_steps, warmup_steps and max_transitions, as for `Schedule`.
        predictions: one for each schedule.
        tail: that thaws; None where nothing does.
    """

    costs: StepCosts
    schedule: dict
    predictions: tuple[Prediction, ...]
    tail: Tail | None = None

    def suggest(self, saving: float) -> list[Suggestion]:
        """For each strategy of the predictions the largest t_0 that saves the fraction `saving`, in (0, 1)."""
        scales = dict.fromkeys(p.how_scale for p in self.predictions)
        return [suggest_t_0(self.costs, saving, how_scale=scale, tail=self.tail, **self.schedule) for scale in scales]

    def to_dict(self) -> dict:
        return {
            "costs": self.costs.to_dict(),
            "closure_error": self.costs.closure_error,
            "schedule": self.schedule,
            "tail": self.tail,
            "predictions": [asdict(prediction) for prediction in self.predictions],
        }

    def __str__(self) -> str:
        return f"{layers_table(self.costs)}\n\n{predictions_table(self.predictions, self.costs.unit)}"


def plan(
    model: nn.Module,
    example_inputs: Batch,
    targets: Batch,
    criterion: Callable[..., Tensor],
    *,
    total_steps: int,
    t_0s: Iterable[float] = T_0S,
    how_scales: Iterable[str | float] = tuple(POWERS),
    warmup_steps: int = 0,
    max_transitions: int | None = None,
    layers: Layers | None = None,
    make_optimizer: MakeOptimizer | None = None,
    amp_dtype: torch.dtype | None = None,
    loader: Iterable | None = None,
    rounds: int = 3,
    max_seconds: float = 60.0,
) -> Plan:
    """Plan of every (how_scale, t_0), from forward and backward of each layer measured on the model's device.

    Args:
        example_inputs: the inputs of one batch of the size to train with.
        targets: the targets of that batch.
        criterion: (outputs, targets) -> scalar loss.
        total_steps: of the run.
        t_0s: each is predicted with each of how_scales.
        how_scales: the strategies.
        warmup_steps: see `Schedule`.
        max_transitions: see `Schedule`.
        layers: see `measure_costs`.
        make_optimizer: see `measure_costs`.
        amp_dtype: see `measure_costs`.
        loader: the batches to train with. The wait for them is measured. None: batches are on the device already.
        rounds: see `measure_costs`.
        max_seconds: see `measure_costs`.
    """
    check_kind("t_0s", t_0s, Iterable, "several numbers")
    check_kind("how_scales", how_scales, Iterable, "several names or powers")
    check_kind("loader", loader, Iterable, "an iterable of batches", optional=True)
    check_kind("layers", layers, Layers, "what find_layers gives", optional=True)
    layers = find_layers(model) if layers is None else layers
    schedule: dict[str, Any] = {
        "total_steps": total_steps, "warmup_steps": warmup_steps, "max_transitions": max_transitions
    }  # fmt: skip
    t_0s, how_scales = list(t_0s), list(how_scales)
    for how_scale, t_0 in product(how_scales, t_0s):  # bad arguments raise before anything is measured
        Schedule(len(layers), t_0=t_0, how_scale=how_scale, **schedule)
    wait, ahead = measure_loader(loader) if loader is not None else (0.0, False)
    costs = measure_costs(
        model,
        example_inputs,
        targets,
        criterion,
        layers=layers,
        make_optimizer=make_optimizer,
        amp_dtype=amp_dtype,
        rounds=rounds,
        max_seconds=max_seconds,
        loader=wait,
        loader_ahead=ahead,
    )
    return plan_from_costs(costs, schedule, t_0s, how_scales)


def plan_from_costs(
    costs: StepCosts,
    schedule: dict,
    t_0s: Iterable[float] = T_0S,
    how_scales: Iterable[str | float] = tuple(POWERS),
    *,
    tail: Tail | None = None,
) -> Plan:
    """Plan of every (how_scale, t_0) from costs that are known already.

    Args:
        costs: of a step.
        schedule: see `Plan`.
        t_0s: each is predicted with each of how_scales.
        how_scales: the strategies.
        tail: see `Plan`.
    """
    t_0s = list(t_0s)
    predictions = (
        predict(costs, Schedule(len(costs.layers), t_0=t_0, how_scale=how_scale, **schedule), tail)
        for how_scale in how_scales
        for t_0 in t_0s
    )
    return Plan(costs, schedule, tuple(predictions), tail)


def layers_table(costs: StepCosts) -> str:
    """Forward, backward and share of each layer, the rest of the step, and how well they add up."""
    factor, unit = (1e3, "ms") if costs.unit == "s" else (1e-6, "MFLOP")
    full = costs.step(0)
    rows: list[tuple[str, ...]] = [
        ("layer", "name", f"forward, {unit}", "frozen", "backward", "as first", "share of step")
    ]
    for i, name in enumerate(costs.layers):
        whole = costs.forward[i] + costs.backward[i]
        parts = (costs.forward[i], costs.frozen_forward[i], costs.backward[i], costs.backward_first[i])
        rows.append((str(i), name, *(f"{factor * part:.3f}" for part in parts), f"{100 * whole / full:.1f} %"))
    lines = [table(rows, left=[1], rule=False)]
    rest = {"loss": costs.loss, "optimizer": costs.optimizer[0], "loader": costs.loader}
    lines += [
        f"{name}: {factor * value:.3f} {unit} ({100 * value / full:.1f} %)" for name, value in rest.items() if value
    ]
    if costs.whole_step is not None and costs.closure_error is not None:
        lines.append(
            f"whole step: {factor * costs.whole_step:.3f} {unit} without instruments; the parts add up to"
            f" {100 * costs.closure_error:+.1f} % of it"
        )
    lines.append(costs.source)
    return "\n".join(lines)


def predictions_table(predictions: Iterable[Prediction], unit: str = "s") -> str:
    rows: list[tuple[str, ...]] = [
        ("strategy", "t_0", "saving", "ceiling", "run", "without", "peak MiB at start", "mean", "at end")
    ]
    for p in predictions:
        memory = ["-"] * 3
        if p.memory:
            start, end, mean = (f"{value / 2**20:.1f}" for value in p.memory)
            memory = [start, mean, end]
        error = "" if p.saving_error is None else f" ± {100 * p.saving_error:.1f}"
        percents = f"{100 * p.saving:.1f}{error} %", f"{100 * p.ceiling:.1f} %"
        runs = (duration(cost, 1) if unit == "s" else f"{cost:.3g} {unit}" for cost in (p.cost, p.full_cost))
        rows.append((str(p.how_scale), f"{p.t_0:g}", *percents, *runs, *memory))
    note = "saving: of the whole run, ± its standard deviation; ceiling: were the frozen layers' forward free"
    return f"{table(rows, left=[0], rule=False)}\n{note}"


def suggestions_text(suggestions: Iterable[Suggestion]) -> str:
    lines = []
    for s in suggestions:
        if s.t_0 is None:
            lines.append(f"{s.how_scale}: saves at most {100 * s.saving:.1f} %, not {100 * s.wanted:g} %")
        else:
            lines.append(f"{s.how_scale}: t_0 = {s.t_0:.2f} saves {100 * s.saving:.1f} % (wanted {100 * s.wanted:g} %)")
    return "\n".join(lines)
