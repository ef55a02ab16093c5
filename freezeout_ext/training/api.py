"""train, plan, compare: what the command line does, for a task in Python."""

from collections.abc import Iterable, Sequence
from dataclasses import fields, replace
from pathlib import Path

from ..arguments import check_count, check_flag, check_kind
from ..planner import T_0S, Plan
from ..schedule import POWERS
from ..tasks import Task
from . import plot
from .arms import DEFAULT_KINDS, make_arms
from .compare import MOST_SEEDS, Comparison
from .config import TrainConfig, faults_of_input
from .costing import plan_of, training_costs, unfrozen
from .reporters import LineReporter, Reporter
from .run import Run
from .trainer import Trainer


def train(task: Task, out: str | Path, *, resume: bool = False, reporter: Reporter | None = None, **options) -> dict:
    """Trains the task in the folder `out` and returns what its result.json then holds.

    Args:
        resume: go on with the run in `out`, where there is one.
        reporter: is told of each step and epoch. None: lines on stdout.
        options: fields of `TrainConfig`, such as epochs, lr, t_0, start_frozen, cache.

    Raises:
        BadInput: one sentence on what is wrong; nothing was written.
    """
    config = _config(task, options)
    with faults_of_input():
        _check_place(out, resume)
        check_kind("reporter", reporter, Reporter, "a Reporter", optional=True)
    run = Run.prepare(config, out, task=task, resume=resume)
    return run.train(reporter or LineReporter(), run.costs())


@faults_of_input()
def plan(
    task: Task,
    *,
    t_0s: Iterable[float] = T_0S,
    how_scales: Iterable[str | float] = tuple(POWERS),
    rounds: int = 3,
    max_seconds: float = 120.0,
    **options,
) -> Plan:
    """What each schedule would save of training the task, from the times of its layers on this machine.

    Args:
        t_0s: each is predicted with each of how_scales.
        how_scales: the strategies.
        rounds: see `planner.measure_costs`.
        max_seconds: see `planner.measure_costs`.
        options: fields of `TrainConfig`.
    """
    check_kind("t_0s", t_0s, Iterable, "several numbers")
    check_kind("how_scales", how_scales, Iterable, "several names or powers")
    config = _config(task, options).resolved()
    trainer = Trainer(unfrozen(config), task)
    costs = training_costs(trainer, rounds=rounds, max_seconds=max_seconds)
    return plan_of(config, trainer.length, trainer.layers, costs, t_0s, how_scales)


def compare(
    task: Task,
    out: str | Path,
    *,
    seeds: int = 3,
    kinds: Sequence[str] | None = None,
    t_0s: Sequence[float] | None = None,
    how_scales: Sequence[str | float] | None = None,
    shorter: Sequence[float] = (),
    resume: bool = False,
    accuracies: Sequence[float] = (),
    **options,
) -> dict:
    """Trains the task in several ways and returns what compare.json then holds. Writes compare.png beside it.

    `tables.as_text(tables.comparison_blocks(summary))` is the text of a summary. Its last line says who won.

    Args:
        seeds: how many.
        kinds: of arms, see `arms.KINDS`.
        t_0s: of the freezing arms, one arm for each pair of t_0 and how_scale.
        how_scales: of the freezing arms.
        shorter: parts of full training's steps, see `make_arms`.
        resume: keep what is done in `out` and go on.
        accuracies: see `Comparison`.
        options: fields of `TrainConfig`.
    """
    with faults_of_input():
        _check_place(out, resume)
        check_count("seeds", seeds, 1, MOST_SEEDS)
        for name, names in (("kinds", kinds), ("t_0s", t_0s), ("how_scales", how_scales)):
            check_kind(name, names, Sequence, "a sequence", optional=True)
        for name, numbers in (("shorter", shorter), ("accuracies", accuracies)):
            check_kind(name, numbers, Sequence, "a sequence of numbers")
        base = _config(task, options).resolved()
        kinds = DEFAULT_KINDS if kinds is None else kinds
        arms = make_arms(kinds, t_0s or [base.t_0], how_scales or [base.how_scale], shorter)
    comparison = Comparison(base, out, arms=arms, seeds=range(seeds), task=task, resume=resume, accuracies=accuracies)
    summary = comparison.run(lambda title: LineReporter(title=title, epochs=False))
    plot.save(plot.plot_comparison(Path(out), summary), Path(out) / "compare.png")
    return summary


def _check_place(out: object, resume: object) -> None:
    check_kind("out", out, str | Path, "the path of a folder")
    check_flag("resume", resume)


def _config(task: Task, options: dict) -> TrainConfig:
    with faults_of_input():
        check_kind("task", task, Task, "a Task")
        if odd := options.keys() - {field.name for field in fields(TrainConfig)}:
            raise TypeError(f"options must be fields of TrainConfig, got {', '.join(sorted(odd))}")
        return replace(TrainConfig.of_task(task), **options)
