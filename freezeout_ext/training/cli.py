"""freezeout train | compare | plan | tune | plot | report.

Exit status 0; 2 for bad input, and where nothing more can be written, with one sentence on stderr; 130 for Ctrl-C.
"""

import argparse
import contextlib
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from ..prefix import MODES
from ..tasks import DATA
from ..tasks.nets import net_names
from . import commands, plan_command
from .arms import KINDS
from .config import AMP_DTYPES, CACHE_DTYPES, OPTIMIZERS, BadInput, TrainConfig
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


def _how_scale(text: str) -> str | float:
    try:
        return float(text)
    except ValueError:
        return text


def _count_or_name(text: str) -> int | str:
    return int(text) if text.isdecimal() else text


def _file(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("must name a file or folder, got ''")
    return Path(text)


def saving(text: str) -> float:
    """20% or 0.2 -> 0.2."""
    number = text.strip().removesuffix("%").strip()
    try:
        value = float(number) / (100 if "%" in text else 1)
    except ValueError:
        value = math.nan
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"a saving must lie between 0% and 100% (20% or 0.2), got {text!r}")
    return value


# The parser


def _parser() -> Parser:
    parser = Parser(prog="freezeout", description="Train any task with FreezeOut, and measure what it saves.")
    parts = parser.add_subparsers(required=True, metavar="{train,compare,plan,tune,plot,report}")

    train = parts.add_parser("train", help="train one net", argument_default=argparse.SUPPRESS)
    train.set_defaults(command=commands.train)
    _add_run_options(train)
    train.add_argument("--seed", type=int, help="of weights, data order and augmentation (0)")
    train.add_argument("--val-fraction", type=float, help="share of the training images held out (0)")
    _add_freezeout_options(train)
    _add_when_options(train)
    _add_prefix_options(train)
    method = train.add_mutually_exclusive_group()
    for flag, value, text in (
        ("--no-freezeout", "full", "plain training, one cosine"),
        ("--no-anneal", "no-anneal", "one cosine, layers freeze all the same"),
    ):
        method.add_argument(flag, dest="method", action="store_const", const=value, help=text)
    resume = train.add_argument("--resume", nargs="?", type=_file, const=True, default=None, metavar="DIR")
    resume.help = "go on with the run in DIR, or in --out"
    train.add_argument("--tensorboard", action="store_true", default=False, help="also write OUT/tensorboard")

    compare = parts.add_parser(
        "compare", help="train with and without FreezeOut, same net and seeds", argument_default=argparse.SUPPRESS
    )
    compare.set_defaults(command=commands.compare)
    _add_run_options(compare)
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
    _add_freezeout_options(compare, lists=True)
    _add_when_options(compare)
    _add_prefix_options(compare)
    compare.add_argument("--resume", action="store_true", default=False, help="keep what is done in --out and go on")

    compare.add_argument(
        "--accuracy", type=float, nargs="+", default=[], dest="accuracies", metavar="A",
        help="report the time to these values of the metric; accuracies in (0, 1] (a point below full training's last)",
    )  # fmt: skip

    plan = parts.add_parser("plan", help="predict what FreezeOut would save", argument_default=argparse.SUPPRESS)
    plan.set_defaults(command=plan_command.plan)
    _add_run_options(plan, out=False)
    _add_freezeout_options(plan, lists=True)
    _add_when_options(plan)
    _add_cache_options(plan)
    _add_plan_options(plan)

    tune = parts.add_parser(
        "tune",
        help="try few settings, the best against full training in equal seconds",
        argument_default=argparse.SUPPRESS,
    )
    tune.set_defaults(command=commands.tune)
    _add_run_options(tune)
    tune.add_argument("--seed", type=int, help="of weights, data order and augmentation; the first of several (0)")
    tune.add_argument("--seeds", type=int, default=3, help="of the last round, against full training (3)")
    tune.add_argument("--seconds", type=float, default=None, help="of training that the run may take")
    tune.add_argument("--want", type=saving, default=None, metavar="SAVING", help="instead: of full training's seconds")
    tune.add_argument("--resume", action="store_true", default=False, help="keep what is done in --out and go on")

    draw = parts.add_parser("plot", help="draw a run, a comparison or schedules as PNG")
    draw.set_defaults(command=commands.draw)
    draw.add_argument("run", nargs="?", type=_file, help="folder of a train or a compare; none: the schedules")
    draw.add_argument("--layers", type=int, default=20, help="number of layers (20)")
    draw.add_argument("--model", metavar="NAME", help="take the number of layers from this net")
    draw.add_argument("--steps", type=int, default=1000, help="length of the run (1000)")
    draw.add_argument("--lr", type=float, default=0.1, help="base learning rate (0.1)")
    draw.add_argument("--warmup-steps", type=int, default=0)
    _add_freezeout_options(draw, lists=True)
    draw.set_defaults(scale_lr=True, max_transitions=None)
    draw.add_argument("--out", type=_file, metavar="PNG")

    report = parts.add_parser("report", help="one HTML page of runs and comparisons, readable offline")
    report.set_defaults(command=commands.report)
    report.add_argument("runs", nargs="+", type=_file, metavar="RUN", help="folder of a train or a compare")
    report.add_argument("--out", type=_file, metavar="HTML", help="(report.html in the first folder)")
    return parser


def _add_run_options(parser: argparse.ArgumentParser, *, out: bool = True) -> None:
    add = parser.add_argument
    add("task", nargs="?", default=None, metavar="TASK.py[:NAME]", help="your own task; none: a built-in one")
    add("--data", choices=DATA, help=f"({TrainConfig.data})")
    add(
        "--data-dir",
        type=_file,
        default=None,
        metavar="DIR",
        help="the folder of images, or that of the official CIFAR",
    )
    add("--download", action="store_true", default=False, help="fetch CIFAR there first")
    add("--image-size", type=int, metavar="N", help="side of the inputs (imagefolder 224, else that of the images)")
    add("--skip-broken", action="store_true", default=False, help="leave out images that cannot be read")
    add("--workers", type=int, default=None, help="processes that read images (one a core but one, at most 8)")
    add("--model", metavar="NAME", help="; ".join(net_names()) + f" ({TrainConfig.model})")
    add("--weights", metavar="FILE", help="to start from; 'pretrained': those that the net's package brings")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--epochs", type=int, help=f"({TrainConfig.epochs})")
    length.add_argument("--steps", type=int, help="optimizer steps, instead of --epochs")
    add("--batch-size", type=int, help=f"({TrainConfig.batch_size})")
    add("--optimizer", choices=[name for name in OPTIMIZERS if name != "task"], help=f"({TrainConfig.optimizer})")
    add("--lr", type=float, help="peak learning rate (0.1; AdamW 0.001; that of the task's optimizer)")
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
        add("--out", type=_file, default=None, metavar="DIR", help="folder for log, checkpoints and results (runs/...)")


def _add_freezeout_options(parser: argparse.ArgumentParser, *, lists: bool = False) -> None:
    several: dict[str, Any] = {"nargs": "+", "action": "extend", "default": None} if lists else {}
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
    parser.add_argument("--scale-lr", action=argparse.BooleanOptionalAction, help="rates times 1/t_i (yes; AdamW: no)")
    parser.add_argument("--max-transitions", type=int, metavar="K", help="freeze at no more than K moments")


def _add_when_options(parser: argparse.ArgumentParser) -> None:
    """What is frozen before the first step, and what thaws before the last."""
    parser.add_argument(
        "--start-frozen",
        type=_count_or_name,
        metavar="LAYER",
        help="this layer and all before it, or so many, are frozen from the first step on",
    )
    parser.add_argument(
        "--thaw-to",
        metavar="LAYER@PART",
        help="from this part of the steps on only this layer and all before it, or so many, stay frozen: 0@0.8",
    )


def _add_prefix_options(parser: argparse.ArgumentParser) -> None:
    """How the frozen layers run, or are kept."""
    parser.add_argument("--prefix", choices=MODES, help="how the frozen layers run")
    _add_cache_options(parser)


def _add_cache_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--cache", nargs="?", const="device", metavar="device|host|DIR", help="keep what the frozen layers give (off)"
    )
    parser.add_argument(
        "--views", type=_count_or_name, metavar="K|auto", help=f"of each sample, that are kept ({TrainConfig.views})"
    )
    dtypes = [name for name in CACHE_DTYPES if name]
    parser.add_argument("--cache-dtype", choices=dtypes, help="of what is kept (as computed)")


def _add_plan_options(parser: argparse.ArgumentParser) -> None:
    """What `plan` takes beside the options of a run and of FreezeOut."""
    add = parser.add_argument
    text = "count FLOP instead (backward = 1x and 2x forward); needs no data of the built-in sets"
    add("--no-measure", dest="measure", action="store_false", default=True, help=text)
    add("--rounds", type=int, default=3, help="of measuring; each steps twice from every layer on (3)")
    add("--max-seconds", type=float, default=120.0, help="no further round begins after it (120)")
    add("--want", type=saving, default=None, metavar="SAVING", help="suggest t_0 for this saving: 20%% or 0.2")
    add("--json", type=_file, default=None, metavar="FILE", help="write the plan there")
    add("--png", type=_file, default=None, metavar="FILE", help="draw the savings and the layers there")
