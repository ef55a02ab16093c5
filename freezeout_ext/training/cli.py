"""freezeout train | compare | plan | plot | report.

Exit status 0; 2 for bad input, with one sentence on stderr; 130 for Ctrl-C.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path

from ..layers import find_layers
from ..models import build_model, model_names
from ..schedule import Schedule
from . import plot
from .checkpoint import RunFolder, make_folder, read_json
from .cli_plan import add_plan_options, run_plan
from .compare import KINDS, Comparison, curves, make_arms
from .compare_report import comparison_tables
from .config import AMP_DTYPES, OPTIMIZERS, PREFIXES, BadInput, TrainConfig, faults_of_input
from .costing import kept_costs
from .data import NAMES
from .engagement import engagement_text
from .html_report import write_report
from .loop import Run
from .ranks import Ranks, ranks_of_torchrun, traffic_table
from .report import BarReporter, LineReporter, Reporter, Reporters, TensorBoardReporter, has_live_bar, run_summary
from .trainer import TrainingFailed

BAD_INPUT, FAILED, INTERRUPTED, BROKEN_PIPE = 2, 1, 130, 141


DEFAULT_ARMS = [kind for kind in KINDS if kind != "const-time"]


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        self.exit(BAD_INPUT, f"{self.prog}: {message}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status."""
    args = _parser().parse_args(argv)
    try:
        args.command(args)
    except BadInput as error:
        print(f"freezeout: {error}", file=sys.stderr)
        return BAD_INPUT
    except TrainingFailed as error:
        print(f"freezeout: {error}", file=sys.stderr)
        return FAILED
    except BrokenPipeError:
        # Who read it has enough; what Python still flushes at its exit must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except KeyboardInterrupt:
        print("\nfreezeout: interrupted; with --resume it goes on from the last epoch's end", file=sys.stderr)
        return INTERRUPTED
    return 0


def _train(args: argparse.Namespace) -> None:
    with ranks_of_torchrun(_given(args).get("device")) as ranks:
        _train_as(args, ranks)


def _train_as(args: argparse.Namespace, ranks: Ranks) -> None:
    with faults_of_input():
        out = _train_folder(args)
        folder = RunFolder(out)
        config = folder.load_config() if args.resume and folder.holds_run() else TrainConfig()
        reporters: list[Reporter] = []
        if ranks.is_first:
            reporters.append(BarReporter() if has_live_bar(sys.stdout) else LineReporter())
        if args.tensorboard and ranks.is_first:
            reporters.append(TensorBoardReporter(out / "tensorboard"))
        config = replace(config, **_given(args))
    run = Run.prepare(
        config, out, resume=bool(args.resume), data_dir=args.data_dir, download=args.download, ranks=ranks
    )
    reporter = Reporters(*reporters)
    costs = None
    if run.trainer.freezeout and ranks.world == 1:  # the costs of one process know no communication
        costs = kept_costs(out / "costs.json", run.trainer.config, run.trainer.data)
    try:
        result = run.train(reporter, costs)
    finally:
        reporter.close()
    if not ranks.is_first:
        return
    print(run_summary(result))
    if result["traffic"]:
        print(f"\n{traffic_table(result)}")
    if text := engagement_text(result):
        print(f"\n{text}")
    print(f"\nwritten to {out}; its curves: freezeout plot {out}; a page: freezeout report {out}")


def _train_folder(args: argparse.Namespace) -> Path:
    if args.resume and args.resume is not True:
        if args.out not in (None, args.resume):
            raise ValueError(f"--resume and --out must name the same folder, got {args.resume} and {args.out}")
        RunFolder(args.resume).load_config()  # it must hold a run
        return args.resume
    given = _given(args)
    data, model = given.get("data", TrainConfig.data), given.get("model", TrainConfig.model)
    return args.out or Path("runs") / f"{data}-{model}"


def _compare(args: argparse.Namespace) -> None:
    with faults_of_input():
        if args.seeds < 1:
            raise ValueError(f"seeds must be >= 1, got {args.seeds}")
        base = replace(TrainConfig(), **_given(args))
        arms = make_arms([*args.arms, *args.const_time], args.t0s or [base.t_0], args.how_scales or [base.how_scale])
    out = args.out or Path("runs") / f"compare-{base.data}-{base.model}"
    comparison = Comparison(
        base,
        out,
        arms=arms,
        seeds=range(args.seeds),
        resume=args.resume,
        data_dir=args.data_dir,
        download=args.download,
        accuracies=args.accuracies,
    )
    bar = has_live_bar(sys.stdout)
    summary = comparison.run(lambda title: BarReporter(title=title, epochs=False) if bar else Reporter())
    print("\n" + comparison_tables(summary))
    plot.save(_comparison_chart(out, summary), out / "compare.png")
    print(f"\nwritten to {out}: compare.json, compare.png")


def _comparison_chart(out: Path, summary: dict) -> "plot.Figure":
    return plot.plot_comparison(curves(out, summary), f"{summary['config']['data']}, {summary['config']['model']}")


@faults_of_input()
def _plot(args: argparse.Namespace) -> None:
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


def _plan(args: argparse.Namespace) -> None:
    with faults_of_input():
        config = replace(TrainConfig(), **_given(args)).resolved()
        run_plan(args, config)


@faults_of_input()
def _report(args: argparse.Namespace) -> None:
    out = args.out or args.runs[0] / "report.html"
    write_report(args.runs, out)
    print(f"written: {out}")


def _schedules(args: argparse.Namespace) -> dict[str, Schedule]:
    num_layers = len(find_layers(build_model(args.model))) if args.model else args.layers
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


def _given(args: argparse.Namespace) -> dict:
    """The config's fields that were given on the command line."""
    names = {field.name for field in fields(TrainConfig)}
    return {name: value for name, value in vars(args).items() if name in names}


def _how_scale(text: str) -> str | float:
    try:
        return float(text)
    except ValueError:
        return text


# The parser


def _parser() -> Parser:
    parser = Parser(prog="freezeout", description="Train image classifiers with FreezeOut, and measure what it saves.")
    commands = parser.add_subparsers(required=True, metavar="{train,compare,plan,plot,report}")

    train = commands.add_parser("train", help="train one net", argument_default=argparse.SUPPRESS)
    train.set_defaults(command=_train)
    _add_run_options(train)
    train.add_argument("--seed", type=int, help="of weights, data order and augmentation (0)")
    train.add_argument("--val-fraction", type=float, help="share of the training images held out (0)")
    _add_freezeout_options(train)
    method = train.add_mutually_exclusive_group()
    for flag, value, text in (
        ("--no-freezeout", "full", "plain training, one cosine"),
        ("--no-anneal", "no-anneal", "one cosine, layers freeze all the same"),
    ):
        method.add_argument(flag, dest="method", action="store_const", const=value, help=text)
    resume = train.add_argument("--resume", nargs="?", type=Path, const=True, default=None, metavar="DIR")
    resume.help = "go on with the run in DIR, or in --out"
    train.add_argument("--tensorboard", action="store_true", default=False, help="also write OUT/tensorboard")

    compare = commands.add_parser(
        "compare", help="train with and without FreezeOut, same net and seeds", argument_default=argparse.SUPPRESS
    )
    compare.set_defaults(command=_compare)
    _add_run_options(compare)
    compare.add_argument("--seeds", type=int, default=3, help="how many (3)")
    compare.add_argument(
        "--arms", nargs="+", default=DEFAULT_ARMS, choices=KINDS, metavar="ARM",
        help=f"of {', '.join(KINDS)} (all but const-time); short: full training on a cosine as short as FreezeOut's"
        " seconds; no-anneal: one cosine, layers freeze all the same",
    )  # fmt: skip
    compare.add_argument(
        "--const-time", action="store_const", const=["const-time"], default=[],
        help="add the arm const-time: FreezeOut lengthened to full training's seconds",
    )  # fmt: skip
    _add_freezeout_options(compare, lists=True)
    compare.add_argument("--resume", action="store_true", default=False, help="keep what is done in --out and go on")

    compare.add_argument(
        "--accuracy", type=float, nargs="+", default=[], dest="accuracies", metavar="A",
        help="report the time to these test accuracies, in (0, 1] (one point below full training's last)",
    )  # fmt: skip

    plan = commands.add_parser("plan", help="predict what FreezeOut would save", argument_default=argparse.SUPPRESS)
    plan.set_defaults(command=_plan)
    _add_run_options(plan, out=False)
    _add_freezeout_options(plan, lists=True)
    add_plan_options(plan)

    draw = commands.add_parser("plot", help="draw a run, a comparison or schedules as PNG")
    draw.set_defaults(command=_plot)
    draw.add_argument("run", nargs="?", type=Path, help="folder of a train or a compare; none: the schedules")
    draw.add_argument("--layers", type=int, default=20, help="number of layers (20)")
    draw.add_argument("--model", metavar="NAME", help="take the number of layers from this net")
    draw.add_argument("--steps", type=int, default=1000, help="length of the run (1000)")
    draw.add_argument("--lr", type=float, default=0.1, help="base learning rate (0.1)")
    draw.add_argument("--warmup-steps", type=int, default=0)
    _add_freezeout_options(draw, lists=True)
    draw.set_defaults(scale_lr=True, max_transitions=None)
    draw.add_argument("--out", type=Path, metavar="PNG")

    report = commands.add_parser("report", help="one HTML page of runs and comparisons, readable offline")
    report.set_defaults(command=_report)
    report.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a train or a compare")
    report.add_argument("--out", type=Path, metavar="HTML", help="(report.html in the first folder)")
    return parser


def _add_run_options(parser: argparse.ArgumentParser, *, out: bool = True) -> None:
    add = parser.add_argument
    add("--data", choices=NAMES, help=f"({TrainConfig.data})")
    add("--data-dir", type=Path, default=None, metavar="DIR", help="where the official CIFAR folder lies")
    add("--download", action="store_true", default=False, help="fetch it there first")
    add("--model", metavar="NAME", help="; ".join(model_names()) + f" ({TrainConfig.model})")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--epochs", type=int, help=f"({TrainConfig.epochs})")
    length.add_argument("--steps", type=int, help="optimizer steps, instead of --epochs")
    add("--batch-size", type=int, help=f"({TrainConfig.batch_size})")
    add("--optimizer", choices=OPTIMIZERS, help=f"({TrainConfig.optimizer})")
    add("--lr", type=float, help="peak learning rate (0.1; adamw 0.001)")
    add("--momentum", type=float, help=f"Nesterov's, for SGD ({TrainConfig.momentum})")
    add("--weight-decay", type=float, help=f"({TrainConfig.weight_decay})")
    warmup = parser.add_mutually_exclusive_group()
    warmup.add_argument("--warmup-steps", type=int)
    warmup.add_argument("--warmup-epochs", type=float)
    add("--augment", action=argparse.BooleanOptionalAction, help="crop and flip (yes)")
    add("--amp", choices=tuple(AMP_DTYPES), help="mixed precision (bf16 on CUDA, off on CPU)")
    add("--channels-last", action=argparse.BooleanOptionalAction, help="memory format (yes)")
    add("--device", choices=("auto", "cpu", "cuda"), help="(auto)")
    add(
        "--deterministic",
        action="store_true",
        help="bit-identical runs on CUDA and with any --prefix, at some cost",
    )
    add("--threads", type=int, help="CPU threads of torch (torch's choice)")
    add("--graph", action=argparse.BooleanOptionalAction, help="the step as a CUDA graph (no)")
    add("--compile", action=argparse.BooleanOptionalAction, help="torch.compile layer by layer (no)")
    if out:
        add("--out", type=Path, default=None, metavar="DIR", help="folder for log, checkpoints and results (runs/...)")


def _add_freezeout_options(parser: argparse.ArgumentParser, *, lists: bool = False) -> None:
    several = {"nargs": "+", "action": "extend", "default": None} if lists else {}
    end = "; several make several arms or panels" if lists else ""
    parser.add_argument(
        "--t0",
        type=float,
        dest="t0s" if lists else "t_0",
        metavar="T0",
        help=f"where layer 0 freezes, in (0, 1] (0.8){end}",
        **several,
    )
    parser.add_argument(
        "--how-scale",
        type=_how_scale,
        dest="how_scales" if lists else "how_scale",
        metavar="SCALE",
        help=f"linear, squared, cubic or a power (cubic){end}",
        **several,
    )
    parser.add_argument("--scale-lr", action=argparse.BooleanOptionalAction, help="rates times 1/t_i (yes; adamw: no)")
    parser.add_argument("--max-transitions", type=int, metavar="K", help="freeze at no more than K moments")
    parser.add_argument("--prefix", choices=PREFIXES, help="how the frozen layers run")
