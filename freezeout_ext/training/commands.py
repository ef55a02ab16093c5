"""What the commands of the command line do, given its arguments."""

import argparse
import math
import shlex
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch

from ..layers import find_layers
from ..models import build_model
from ..planner import T_0S, Plan, StepCosts, flop_costs, plan_from_costs, suggestions_text
from ..schedule import POWERS, Schedule
from ..tasks import Task, built_in, load_task
from ..tasks.images import SETS, image_task, random_images
from . import plot
from .compare import Comparison, curves, default_kinds, make_arms
from .config import OWN_MODEL, TrainConfig, faults_of_input
from .costing import kept_costs, schedule_of, training_costs
from .html import write_report
from .measure import conditions
from .ranks import Ranks, ranks_of_torchrun
from .reporters import (
    BarReporter,
    LineReporter,
    Reporter,
    Reporters,
    StepReporter,
    TensorBoardReporter,
    has_live_bar,
)
from .run import Run
from .run_folder import RunFolder, check_file, make_folder, read_json, write_json
from .tables import comparison_tables, engagement_text, run_summary, traffic_table, what_was_trained
from .trainer import Trainer
from .tune import Tuning

BACKWARDS = (1.0, 2.0)
MOST_LAYERS = 10_000  # of schedules that are drawn


def train(args: argparse.Namespace) -> None:
    with ranks_of_torchrun(given(args).get("device")) as ranks:
        _train_as(args, ranks)


def _train_as(args: argparse.Namespace, ranks: Ranks) -> None:
    with faults_of_input():
        own = own_task(args)
        out = _train_folder(args, own)
        folder = RunFolder(out)
        there = folder.load_config() if args.resume and folder.holds_run() else None
        if there is not None and there.model == OWN_MODEL and own is None:
            raise ValueError(f"the run in {out} is of {there.data}: name that file too")
        config = replace(there or _base(own, args), **given(args))
        if own is not None:
            config = replace(config, data=own.name, fingerprint=own.fingerprint)
        reporters: list[Reporter] = []
        if ranks.is_first:
            reporters.append(BarReporter() if has_live_bar(sys.stdout) else LineReporter())
        if args.tensorboard and ranks.is_first:
            reporters.append(TensorBoardReporter(out / "tensorboard"))
        task = own or task_of(args, config.resolved())
    run = Run.prepare(config, out, task=task, resume=bool(args.resume), ranks=ranks)
    if ranks.is_first:
        print(*task.notes, sep="\n", flush=True)
    reporter = Reporters(*reporters)
    costs = None
    if run.trainer.freezeout and ranks.world == 1:  # the costs of one process know no communication
        with faults_of_input():
            costs = kept_costs(out / "costs.json", run.trainer.config, task, run.trainer.layer_names)
    try:
        result = run.train(reporter, costs)
    finally:
        reporter.close()
    if not ranks.is_first:
        return
    print(run_summary(result))
    if result["features"]:
        print(f"\n{result['features']['text']}")
    if result["traffic"]:
        print(f"\n{traffic_table(result)}")
    if text := engagement_text(result):
        print(f"\n{text}")
    print(f"\nwritten to {out}; its curves: freezeout plot {out}; a page: freezeout report {out}")


def _train_folder(args: argparse.Namespace, own: Task | None) -> Path:
    if args.resume and args.resume is not True:
        if args.out not in (None, args.resume):
            raise ValueError(f"--resume and --out must name the same folder, got {args.resume} and {args.out}")
        RunFolder(args.resume).load_config()  # it must hold a run
        return args.resume
    return args.out or Path("runs") / folder_name(replace(_base(own, args), **given(args)))


def compare(args: argparse.Namespace) -> None:
    with faults_of_input():
        if args.seeds < 1:
            raise ValueError(f"seeds must be >= 1, got {args.seeds}")
        own = own_task(args)
        base = replace(_base(own, args), **given(args)).resolved()
        kinds = [*(args.arms or default_kinds(base)), *args.const_time]
        arms = make_arms(kinds, args.t0s or [base.t_0], args.how_scales or [base.how_scale], args.shorter)
        task = own or task_of(args, base)
    out = args.out or Path("runs") / f"compare-{folder_name(base)}"
    comparison = Comparison(
        base, out, arms=arms, seeds=range(args.seeds), task=task, resume=args.resume, accuracies=args.accuracies
    )
    print(*task.notes, sep="\n", flush=True)
    summary = comparison.run(run_reporter)
    print("\n" + comparison_tables(summary))
    plot.save(_comparison_chart(out, summary), out / "compare.png")
    print(f"\nwritten to {out}: compare.json, compare.png; a page: freezeout report {out}")


def tune(args: argparse.Namespace) -> None:
    with faults_of_input():
        own = own_task(args)
        base = replace(_base(own, args), **given(args)).resolved()
        task = own or task_of(args, base)
    out = args.out or Path("runs") / f"tune-{folder_name(base)}"
    tuning = Tuning(base, out, task=task, seconds=args.seconds, saving=args.want, resume=args.resume)
    print(*task.notes, sep="\n", flush=True)
    try:
        tuning.run(run_reporter)
    except KeyboardInterrupt:
        if not tuning.rows:
            raise
        print("\ninterrupted: the best of what is done; --resume goes on", file=sys.stderr)
        print(f"\n{tuning.text(_train_command(args))}")
        raise
    print(f"\n{tuning.text(_train_command(args))}\n\nwritten to {out}: tune.json")


def _train_command(args: argparse.Namespace) -> str:
    """The command that trains what `args` name, without what tune has chosen."""
    words = ["freezeout", "train", *([args.task] if args.task else [])]
    left_out = {"steps", "epochs", "method", "start_frozen", "t_0", "how_scale", "cache", "views", "seed"}
    flags = {"data_dir": args.data_dir, "workers": args.workers, **given(args)}
    for name, value in flags.items():
        flag = name.replace("_", "-")
        if value is None or name in left_out:
            continue
        words += (
            ([f"--{flag}"] if value else [f"--no-{flag}"]) if isinstance(value, bool) else [f"--{flag}", str(value)]
        )
    return shlex.join(words)


def run_reporter(title: str) -> Reporter:
    """What shows the progress of one run of several."""
    return BarReporter(title=title, epochs=False) if has_live_bar(sys.stdout) else StepReporter(title)


def _comparison_chart(out: Path, summary: dict) -> "plot.Figure":
    return plot.plot_comparison(curves(out, summary), summary, what_was_trained(summary["config"]))


@faults_of_input()
def draw(args: argparse.Namespace) -> None:
    check_file("--out", args.out)
    if args.run is None:
        figure, out = plot.plot_schedules(_schedules(args), base_lr=args.lr), args.out or Path("schedule.png")
    elif (args.run / "compare.json").exists():
        figure = _comparison_chart(args.run, read_json(args.run / "compare.json"))
        out = args.out or args.run / "compare.png"
    else:
        rows = RunFolder(args.run).read_log()
        if not rows:
            raise ValueError(f"run must be the folder of a run with at least one epoch, {args.run} has no log")
        figure, out = plot.plot_run(rows, args.run.name), args.out or args.run / "curves.png"
    make_folder(out.parent)
    plot.save(figure, out)
    print(f"written: {out}")


@faults_of_input()
def report(args: argparse.Namespace) -> None:
    check_file("--out", args.out)
    out = args.out or args.runs[0] / "report.html"
    write_report(args.runs, out)
    print(f"written: {out}")


@faults_of_input()
def plan(args: argparse.Namespace) -> None:
    """Prints the plans of a task, and writes what was asked for."""
    check_file("--json", args.json)
    check_file("--png", args.png)
    if args.rounds < 1:
        raise ValueError(f"rounds must be >= 1, got {args.rounds}")
    if not (args.max_seconds >= 0 and math.isfinite(args.max_seconds)):
        raise ValueError(f"max_seconds must be >= 0, got {args.max_seconds}")
    own = own_task(args)
    config = replace(_base(own, args), **given(args)).resolved()
    if args.measure:
        plans, where = [_measured(args, config, own)], conditions(torch.device(config.device))
    else:
        plans, where = [_counted(args, config, own, backward) for backward in BACKWARDS], None
    print(f"{config.title}, batch {config.batch_size}, {plans[0].schedule['total_steps']} steps")
    suggestions = []
    for found in plans:
        print(f"\n{found}")
        if args.want is not None:
            suggestions.append(found.suggest(args.want))
            print(f"\n{suggestions_text(suggestions[-1])}")
    if args.json is not None:
        values = {
            "config": config.to_dict(),
            "conditions": where,
            "plans": [found.to_dict() for found in plans],
            "suggestions": [[asdict(suggestion) for suggestion in found] for found in suggestions],
        }
        make_folder(args.json.parent)
        write_json(args.json, values)
        print(f"written: {args.json}")
    if args.png is not None:
        make_folder(args.png.parent)
        plot.save(plot.plot_plan(plans[-1], f"{config.title}, batch {config.batch_size}"), args.png)
        print(f"written: {args.png}")


def _measured(args: argparse.Namespace, config: TrainConfig, own: Task | None) -> Plan:
    steps_per_epoch = None
    if own is not None or args.data_dir is not None or config.data not in SETS or config.data == "digits":
        task = own or task_of(args, config)
    else:
        print(f"no --data-dir: measured on random images of {config.data}'s shape")
        data = random_images(config.data, 2 * config.batch_size, config.seed, config.device)
        task = image_task(data, config.model, image_size=config.image_size, weights=config.weights)
        steps_per_epoch = _steps_per_epoch(config)
    trainer = Trainer(config, task)
    costs = training_costs(trainer, rounds=args.rounds, max_seconds=args.max_seconds)
    return _plan(args, config, costs, steps_per_epoch or trainer.steps_per_epoch)


def _counted(args: argparse.Namespace, config: TrainConfig, own: Task | None, backward: float) -> Plan:
    if own is not None or config.data not in SETS:
        trainer = Trainer(config, own or task_of(args, config))
        inputs, _ = next(iter(trainer.train_batches()))
        layers = find_layers(trainer.model, trainer.task.layers)
        costs = flop_costs(trainer.model, inputs, backward=backward, layers=layers)
        return _plan(args, config, costs, trainer.steps_per_epoch)
    known = SETS[config.data]
    channels, side, _ = known.shape
    side = config.image_size or side
    with torch.device("meta"):
        model = build_model(config.model, known.num_classes, in_channels=channels, image_size=side)
        inputs = torch.empty(config.batch_size, channels, side, side)
    return _plan(args, config, flop_costs(model, inputs, backward=backward), _steps_per_epoch(config))


def _plan(args: argparse.Namespace, config: TrainConfig, costs: StepCosts, steps_per_epoch: int) -> Plan:
    schedule = schedule_of(config, steps_per_epoch, costs.layers)
    return plan_from_costs(costs, schedule, args.t0s or T_0S, args.how_scales or tuple(POWERS))


def _steps_per_epoch(config: TrainConfig) -> int:
    """Of training without the set: whole batches alone, as `Trainer` takes."""
    return max(1, SETS[config.data].train_images // config.batch_size)


def _schedules(args: argparse.Namespace) -> dict[str, Schedule]:
    num_layers = len(find_layers(build_model(args.model))) if args.model else args.layers
    if not 1 <= num_layers <= MOST_LAYERS:
        raise ValueError(f"layers must be in 1..{MOST_LAYERS}, got {num_layers}")
    if not (args.lr >= 0 and math.isfinite(args.lr)):
        raise ValueError(f"lr must be >= 0, got {args.lr}")
    return {
        f"{how_scale}, t_0 = {t_0:g}{'' if args.scale_lr else ', not scaled'}": Schedule(
            num_layers,
            args.steps,
            t_0=t_0,
            how_scale=how_scale,
            scale_lr=args.scale_lr,
            warmup_steps=args.warmup_steps,
            max_transitions=args.max_transitions,
        )
        for how_scale in args.how_scales or [TrainConfig.how_scale]
        for t_0 in args.t0s or [TrainConfig.t_0]
    }


# The task and the config that the arguments name


def own_task(args: argparse.Namespace) -> Task | None:
    """The task of the user's file, where one is named."""
    if args.task is None:
        return None
    for name in ("data", "model", "image_size", "weights", "data_dir", "augment"):
        if getattr(args, name, None) is not None:
            raise ValueError(f"--{name.replace('_', '-')} is for the built-in tasks, {args.task} brings its own")
    return load_task(args.task)


def task_of(args: argparse.Namespace, config: TrainConfig) -> Task:
    """The built-in task of a resolved config."""
    return built_in(
        config.data,
        config.model,
        data_dir=args.data_dir,
        download=args.download,
        val_fraction=config.val_fraction,
        seed=config.seed,
        device=config.device,
        augment=config.augment,
        image_size=config.image_size,
        weights=config.weights,
        workers=args.workers,
        skip_broken=args.skip_broken,
    )


def given(args: argparse.Namespace) -> dict:
    """The config's fields that were given on the command line."""
    names = {field.name for field in fields(TrainConfig)}
    return {name: value for name, value in vars(args).items() if name in names}


def _base(own: Task | None, args: argparse.Namespace) -> TrainConfig:
    if own is not None:
        return TrainConfig.of_task(own)
    # A pretrained net wants a smaller rate than a fresh one, and fewer epochs.
    pretrained: dict[str, Any] = {"optimizer": "adamw", "weight_decay": 0.01, "epochs": 10, "batch_size": 50}
    return TrainConfig(**(pretrained if getattr(args, "weights", None) else {}))


def folder_name(config: TrainConfig) -> str:
    name = Path(config.data).stem if config.model == OWN_MODEL else f"{config.data}-{config.model}"
    return name.replace("/", "-")
