"""What the commands of the command line do, given its arguments."""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from ..arguments import check_count, check_number
from ..layers import find_layers
from ..models import build_model
from ..schedule import Schedule
from ..tasks import Task
from . import plot
from .arms import DEFAULT_KINDS, make_arms
from .chosen import chosen, config_of, folder_name, given, own_task, task_of
from .compare import MOST_SEEDS, Comparison
from .config import OWN_MODEL, TrainConfig, faults_of_input
from .html import write_report
from .ranks import Ranks, ranks_of_torchrun
from .reporters import BarReporter, LineReporter, Reporter, Reporters, TensorBoardReporter, has_live_bar
from .run import Run
from .run_folder import RunFolder, check_file, make_folder, read_json
from .tables import as_text, comparison_blocks, run_blocks
from .tune import Tuning

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
        config = replace(there, **given(args)) if there else config_of(args, own)
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
