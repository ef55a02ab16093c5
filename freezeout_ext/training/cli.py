"""freezeout train | compare | plan | tune | plot | report.

Exit status 0; 2 for bad input, and where nothing more can be written, with one sentence on stderr; 130 for Ctrl-C.
"""

import argparse
import contextlib
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from . import commands
from .arms import KINDS
from .config import BadInput
from .options import KEPT, WHEN, add_fields, add_freezeout_options, add_run_options, file, saving
from .trainer import TrainingFailed

BAD_INPUT, FAILED, INTERRUPTED, BROKEN_PIPE = 2, 1, 130, 141


class Parser(argparse.ArgumentParser):
    """Options are written out: --seed is not --seeds."""

    def __init__(self, **options) -> None:
        super().__init__(**options, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        self.exit(BAD_INPUT, f"{self.prog}: {message}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status."""
    if sys.stdout is None:  # closed: whoever started this does not want to read
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, for the rest of the process
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # of what a terminal's encoding lacks
    args = _parser().parse_args(argv)
    try:
        args.command(args)
        sys.stdout.flush()
    except BrokenPipeError:
        _drop_output()
        return BROKEN_PIPE
    except TrainingFailed as error:
        return _failed(error, FAILED)
    except OSError as error:  # no room, no rights, a full pipe
        _drop_output()
        return _failed(f"{' '.join(str(error).split())}; what is done is kept, --resume goes on", BAD_INPUT)
    except (BadInput, ValueError, ImportError) as error:
        return _failed(" ".join(str(error).split()), BAD_INPUT)
    except RuntimeError as error:
        if not _is_out_of_memory(error):
            raise
        return _failed(f"out of memory: {str(error).splitlines()[0]}; a smaller batch or net needs less", BAD_INPUT)
    except KeyboardInterrupt:
        return _failed("interrupted; with --resume it goes on from the last epoch's end", INTERRUPTED, "\n")
    return 0


def _failed(sentence: object, status: int, before: str = "") -> int:
    print(f"{before}freezeout: {sentence}", file=sys.stderr)
    return status


def _drop_output() -> None:
    """What Python still flushes at its exit must not fail again."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _is_out_of_memory(error: RuntimeError) -> bool:
    return type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)


def _parser() -> Parser:
    parser = Parser(prog="freezeout", description="Train any task with FreezeOut, and measure what it saves.")
    parts = parser.add_subparsers(required=True, metavar="{train,compare,plan,tune,plot,report}")

    train = parts.add_parser("train", help="train once", argument_default=argparse.SUPPRESS)
    train.set_defaults(command=commands.train)
    add_run_options(train)
    add_fields(train, "seed", "val_fraction")
    add_freezeout_options(train)
    add_fields(train, *WHEN, "prefix", *KEPT)
    method = train.add_mutually_exclusive_group()
    for flag, value, text in (
        ("--no-freezeout", "full", "plain training, one cosine"),
        ("--no-anneal", "no-anneal", "one cosine, layers freeze all the same"),
    ):
        method.add_argument(flag, dest="method", action="store_const", const=value, help=text)
    resume = train.add_argument("--resume", nargs="?", type=file, const=True, default=None, metavar="DIR")
    resume.help = "go on with the run in DIR, or in --out"
    train.add_argument("--tensorboard", action="store_true", default=False, help="also write OUT/tensorboard")

    compare = parts.add_parser(
        "compare", help="train in several ways from the same seeds, and say who won", argument_default=argparse.SUPPRESS
    )
    compare.set_defaults(command=commands.compare)
    add_run_options(compare)
    compare.add_argument("--seeds", type=int, default=3, help="how many (3)")
    compare.add_argument(
        "--shorter", type=float, nargs="+", default=[], metavar="PART",
        help="add full training on cosines of these parts of its steps, such as 0.25 0.5: the line to lie above",
    )  # fmt: skip
    compare.add_argument(
        "--arms", nargs="+", default=None, choices=KINDS, metavar="ARM",
        help=f"of {', '.join(KINDS)} (all but const-time); short: full training on a cosine as short as the seconds of"
        " FreezeOut, or of cached; no-anneal: one cosine, layers freeze all the same; cached: the same with kept"
        " features, with as many views as are worth it unless --cache or --views says more",
    )  # fmt: skip
    compare.add_argument(
        "--const-time", action="store_const", const=["const-time"], default=[],
        help="add the arm const-time: FreezeOut lengthened to full training's seconds",
    )  # fmt: skip
    add_freezeout_options(compare, lists=True)
    add_fields(compare, *WHEN, "prefix", *KEPT)
    compare.add_argument("--resume", action="store_true", default=False, help="keep what is done in --out and go on")

    compare.add_argument(
        "--accuracy", type=float, nargs="+", default=[], dest="accuracies", metavar="A",
        help="report the time to these values of the metric; accuracies in (0, 1] (a point below full training's last)",
    )  # fmt: skip

    plan = parts.add_parser("plan", help="predict what FreezeOut would save", argument_default=argparse.SUPPRESS)
    plan.set_defaults(command=commands.plan)
    add_run_options(plan, out=False)
    add_freezeout_options(plan, lists=True)
    add_fields(plan, *WHEN, *KEPT)
    text = "count FLOP instead (backward = 1x and 2x forward); needs no data of the built-in sets"
    plan.add_argument("--no-measure", dest="measure", action="store_false", default=True, help=text)
    plan.add_argument("--rounds", type=int, default=3, help="of measuring; each steps twice from every layer on (3)")
    plan.add_argument("--max-seconds", type=float, default=120.0, help="no further round begins after it (120)")
    text = "suggest t_0 for this saving: 20%% or 0.2"
    plan.add_argument("--want", type=saving, default=None, metavar="SAVING", help=text)
    plan.add_argument("--json", type=file, default=None, metavar="FILE", help="write the plan there")
    plan.add_argument("--png", type=file, default=None, metavar="FILE", help="draw the savings and the layers there")

    tune = parts.add_parser(
        "tune",
        help="try few settings, the best against full training in equal seconds",
        argument_default=argparse.SUPPRESS,
    )
    tune.set_defaults(command=commands.tune)
    add_run_options(tune)
    add_fields(tune, "seed", help="of weights, data order and augmentation; the first of several (0)")
    tune.add_argument("--seeds", type=int, default=3, help="of the last round, against full training (3)")
    tune.add_argument("--seconds", type=float, default=None, help="of training that the run may take")
    tune.add_argument("--want", type=saving, default=None, metavar="SAVING", help="instead: of full training's seconds")
    tune.add_argument("--resume", action="store_true", default=False, help="keep what is done in --out and go on")

    draw = parts.add_parser("plot", help="draw a run, a comparison or schedules as PNG")
    draw.set_defaults(command=commands.draw)
    draw.add_argument("run", nargs="?", type=file, help="folder of a train or a compare; none: the schedules")
    draw.add_argument("--layers", type=int, default=20, help="number of layers (20)")
    draw.add_argument("--model", metavar="NAME", help="take the number of layers from this net")
    draw.add_argument("--steps", type=int, default=1000, help="length of the run (1000)")
    draw.add_argument("--lr", type=float, default=0.1, help="base learning rate (0.1)")
    add_fields(draw, "warmup_steps", default=0)
    add_freezeout_options(draw, lists=True)
    draw.set_defaults(scale_lr=True, max_transitions=None)
    draw.add_argument("--out", type=file, metavar="PNG")

    report = parts.add_parser("report", help="one HTML page of runs and comparisons, readable offline")
    report.set_defaults(command=commands.report)
    report.add_argument("runs", nargs="+", type=file, metavar="RUN", help="folder of a train or a compare")
    report.add_argument("--out", type=file, metavar="HTML", help="(report.html in the first folder)")
    return parser
