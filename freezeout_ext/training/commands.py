"""What the commands of the command line do, given its arguments."""

import argparse
import sys
from dataclasses import asdict, replace
from pathlib import Path

import torch

from ..arguments import check_count, check_number
from ..layers import find_layers
from ..models import build_model
from ..planner import T_0S, Plan, flop_costs, suggestions_text
from ..schedule import POWERS, Schedule
from ..tasks import Task
from ..tasks.images import SETS, image_task, random_images
from . import plot
from .arms import DEFAULT_KINDS, make_arms
from .compare import MOST_SEEDS, Comparison
from .config import OWN_MODEL, TrainConfig, faults_of_input
from .costing import plan_of, training_costs, unfrozen
from .course import Length
from .html import write_report
from .keeping import Keeping, Kept
from .measure import conditions
from .options import chosen, config_of, folder_name, given, own_task, task_of
from .ranks import Ranks, ranks_of_torchrun
from .reporters import BarReporter, LineReporter, Reporter, Reporters, TensorBoardReporter, has_live_bar
from .run import Run
from .run_folder import RunFolder, check_file, make_folder, read_json, write_json
from .tables import as_text, comparison_blocks, run_blocks
from .trainer import Trainer
from .tune import Tuning

MOST_LAYERS = 10_000  # of schedules that are drawn
BACKWARDS = (1.0, 2.0)  # over forward, where FLOP are counted


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
        config = replace(there, **given(args)) if there else config_of(args, own)
        if own is not None:
            config = replace(config, data=own.name, fingerprint=own.fingerprint)
        for name in ("views", "cache_dtype"):
            if name in given(args) and config.cache is None:
                raise ValueError(f"{name} is of kept features, and none are kept: pass --cache too")
        reporters: list[Reporter] = []
        if ranks.is_first:
            reporters.append(BarReporter() if has_live_bar(sys.stdout) else LineReporter())
        if args.tensorboard and ranks.is_first:
            reporters.append(TensorBoardReporter(out / "tensorboard"))
        task = own or task_of(args, config.resolved())
    run = Run.prepare(config, out, task=task, resume=bool(args.resume), ranks=ranks)
    if ranks.is_first:
        print(*task.notes, sep="\n", flush=True)
    result = run.train(Reporters(*reporters), run.costs())
    if not ranks.is_first:
        return
    print(as_text(run_blocks(result)))
    print(f"\nwritten to {out}; its curves: freezeout plot {out}; a page: freezeout report {out}")


def _train_folder(args: argparse.Namespace, own: Task | None) -> Path:
    if args.resume and args.resume is not True:
        if args.out not in (None, args.resume):
            raise ValueError(f"--resume and --out must name the same folder, got {args.resume} and {args.out}")
        RunFolder(args.resume).load_config()  # it must hold a run
        return args.resume
    return args.out or Path("runs") / folder_name(config_of(args, own))


def compare(args: argparse.Namespace) -> None:
    with faults_of_input():
        check_count("seeds", args.seeds, 1, MOST_SEEDS)
        base, task = chosen(args)
        kinds = [*(args.arms or DEFAULT_KINDS), *args.const_time]
        arms = make_arms(kinds, args.t0s or [base.t_0], args.how_scales or [base.how_scale], args.shorter)
    out = args.out or Path("runs") / f"compare-{folder_name(base)}"
    comparison = Comparison(
        base, out, arms=arms, seeds=range(args.seeds), task=task, resume=args.resume, accuracies=args.accuracies
    )
    print(*task.notes, sep="\n", flush=True)
    summary = comparison.run(run_reporter)
    print("\n" + as_text(comparison_blocks(summary)))
    plot.save(plot.plot_comparison(out, summary), out / "compare.png")
    write_report([out], out / "report.html")
    print(f"\nwritten to {out}: compare.json, compare.png, report.html")


@faults_of_input()
def plan(args: argparse.Namespace) -> None:
    """Prints the plans of a task, and writes what was asked for."""
    check_file("--json", args.json)
    check_file("--png", args.png)
    check_count("rounds", args.rounds, 1)
    check_number("max_seconds", args.max_seconds)
    own = own_task(args)
    config = config_of(args, own).resolved()
    if config.cache and not args.measure:
        raise ValueError("--cache needs measured times: leave --no-measure out")
    # Random images take the set's place where FLOP are counted, or where no --data-dir says where the set lies.
    away = not args.measure or (args.data_dir is None and config.data != "digits")
    made = own is None and config.data in SETS and away
    if made:
        if args.measure:
            print(f"no --data-dir: measured on random images of {config.data}'s shape", flush=True)
        count = 2 * config.batch_size if args.measure else 1
        data = random_images(config.data, count, config.seed, config.device)
        task = image_task(data, config.model, image_size=config.image_size, weights=config.weights)
    else:
        task = own or task_of(args, config)
        print(*task.notes, sep="\n", flush=True)
    trainer = Trainer(unfrozen(config), task)
    length = Length.of(config, SETS[config.data].train_images) if made else trainer.length
    if args.measure:
        found = [training_costs(trainer, rounds=args.rounds, max_seconds=args.max_seconds)]
    else:
        (inputs, _), layers, model = next(iter(trainer.train_batches())), trainer.layers, trainer.model
        if made:  # nothing needs to be computed
            model, inputs = model.to("meta"), inputs.to("meta").expand(config.batch_size, -1, -1, -1)
        found = [flop_costs(model, inputs, backward=backward, layers=layers) for backward in BACKWARDS]
    rules = args.t0s or T_0S, args.how_scales or tuple(POWERS)
    plans = [plan_of(config, length, trainer.layers, costs, *rules) for costs in found]
    kept = Keeping(trainer, config, plans[0], length).predicted() if config.cache else []
    _show(args, config, plans, kept)


def _show(args: argparse.Namespace, config: TrainConfig, plans: list[Plan], kept: list[Kept]) -> None:
    where = conditions(torch.device(config.device)) if args.measure else None
    print(f"{config.title}, batch {config.batch_size}, {plans[0].schedule['total_steps']} steps")
    suggestions = []
    for found in plans:
        print(f"\n{found}")
        if args.want is not None:
            suggestions.append(found.suggest(args.want))
            print(f"\n{suggestions_text(suggestions[-1])}")
    if kept:
        print(f"\n{Keeping.table(kept)}")
    if args.json is not None:
        values = {
            "config": config.to_dict(),
            "conditions": where,
            "plans": [found.to_dict() for found in plans],
            "kept": [asdict(each) for each in kept],
            "suggestions": [[asdict(suggestion) for suggestion in found] for found in suggestions],
        }
        make_folder(args.json.parent)
        write_json(args.json, values)
        print(f"written: {args.json}")
    if args.png is not None:
        make_folder(args.png.parent)
        plot.save(plot.plot_plan(plans[-1], f"{config.title}, batch {config.batch_size}"), args.png)
        print(f"written: {args.png}")


def tune(args: argparse.Namespace) -> None:
    with faults_of_input():
        base, task = chosen(args)
    out = args.out or Path("runs") / f"tune-{folder_name(base)}"
    tuning = Tuning(base, out, task=task, seconds=args.seconds, saving=args.want, seeds=args.seeds, resume=args.resume)
    print(*task.notes, sep="\n", flush=True)
    kept = {"task": args.task, "data_dir": args.data_dir, "workers": args.workers, **given(args)}
    kept = {name: value for name, value in kept.items() if name not in ("epochs", "steps", "seed")}
    try:
        tuning.run(run_reporter)
    except KeyboardInterrupt:
        if not tuning.rows:
            raise
        print("\ninterrupted: the best of what is done; --resume goes on", file=sys.stderr)
        print(f"\n{tuning.text(kept)}")
        raise
    print(f"\n{tuning.text(kept)}\n\nwritten to {out}: tune.json")


def run_reporter(title: str) -> Reporter:
    """What shows the progress of one run of several."""
    return (BarReporter if has_live_bar(sys.stdout) else LineReporter)(title=title, epochs=False)


@faults_of_input()
def draw(args: argparse.Namespace) -> None:
    check_file("--out", args.out)
    if args.run is None:
        figure, out = plot.plot_schedules(_schedules(args), base_lr=args.lr), args.out or Path("schedule.png")
    elif (args.run / "compare.json").exists():
        figure = plot.plot_comparison(args.run, read_json(args.run / "compare.json"))
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


def _schedules(args: argparse.Namespace) -> dict[str, Schedule]:
    num_layers = len(find_layers(build_model(args.model))) if args.model else args.layers
    check_count("layers", num_layers, 1, MOST_LAYERS)
    check_number("lr", args.lr)
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
