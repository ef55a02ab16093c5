"""The costs of a run's steps, for the prediction that stands beside what the run measures."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from ..batch import Batch
from ..layers import Layers
from ..planner import Plan, StepCosts, flop_costs, measure_costs, measure_loader, plan_from_costs
from ..tasks import Task
from .config import TrainConfig
from .course import Length, schedule_options, tail_of
from .optimizer import make_optimizer
from .reporters import Progress
from .run_folder import read_json, write_json
from .trainer import Trainer

# What measuring may take of the runs that it is for: its steps over theirs. Else FLOP are counted.
LARGEST_SHARE = 0.1
MAX_ROUNDS, MAX_SECONDS = 10, 60.0


def kept_costs(path: Path, config: TrainConfig, task: Task, layers: Sequence[str], *, runs: int = 1) -> StepCosts:
    """The costs that `path` keeps. They are measured and written there where the file does not exist.

    Raises:
        ValueError: the file is damaged, or of a net with other layers than `layers`.
    """
    if path.exists():
        try:
            costs = StepCosts.from_dict(read_json(path))
            if costs.layers != tuple(layers):
                raise ValueError(f"its layers are {', '.join(costs.layers)[:100]}, the net's {', '.join(layers)[:100]}")
        except ValueError as error:
            raise ValueError(f"{path} must hold this net's costs: {error}; delete it, they are measured anew") from None
        return costs
    costs = run_costs(config, task, runs=runs)
    write_json(path, costs.to_dict())
    return costs


def run_costs(config: TrainConfig, task: Task, *, runs: int = 1) -> StepCosts:
    """The step's costs for `runs` runs of `config`: measured on its device, or FLOP counted where they are too short.

    The net that steps is another one than the run's. torch's generators are left as they are.
    """
    with torch.random.fork_rng([] if config.device == "cpu" else None):
        trainer = Trainer(replace(unfrozen(config), compile=False), task)
        # A round steps eight times whole, and twice from each layer on, which takes about half.
        round_steps = 8 + len(trainer.layer_names)
        rounds = min(MAX_ROUNDS, int(LARGEST_SHARE * runs * trainer.total_steps / round_steps))
        if rounds:
            return training_costs(trainer, rounds=rounds, max_seconds=MAX_SECONDS)
        return flop_costs(trainer.model, _batch(trainer)[0], layers=trainer.layers)


def unfrozen(config: TrainConfig) -> TrainConfig:
    """The config of full training, in which all layers of the net are there to be measured."""
    return replace(config, method="full", start_frozen=0, thaw_to=None, cache=None)


def training_costs(trainer: Trainer, *, rounds: int, max_seconds: float) -> StepCosts:
    """measure_costs with the trainer's net, batches, optimizer and precision. The net's weights stay as they are."""
    loader = 0.0
    if trainer.length.steps_per_epoch > 1:
        loader, _ = measure_loader(trainer.train_batches(), on_progress=Progress("measuring the loader, batches"))
    return measure_costs(
        trainer.model,
        *_batch(trainer),
        trainer.task.criterion,
        layers=trainer.layers,
        make_optimizer=lambda groups: make_optimizer(trainer.config, trainer.task, groups),
        amp_dtype=trainer.amp_dtype,
        rounds=rounds,
        max_seconds=max_seconds,
        loader=loader,
        loader_ahead=trainer.feed.works_ahead,
        on_progress=Progress("measuring the layers"),
    )


def plan_of(
    config: TrainConfig,
    length: Length,
    layers: Layers,
    costs: StepCosts,
    t_0s: Iterable[float],
    how_scales: Iterable[str | float],
) -> Plan:
    """The plan of a run of `config` and that length, for every t_0 and how_scale."""
    options, tail = schedule_options(config, length, layers), tail_of(config, length, layers)
    return plan_from_costs(costs, options, t_0s, how_scales, tail=tail)


def _batch(trainer: Trainer) -> tuple[Batch, Batch]:
    return next(iter(trainer.train_batches()))
