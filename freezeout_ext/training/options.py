"""The options that the commands of the command line share, and how their values are read."""

import argparse
import math
from pathlib import Path
from typing import Any

from ..prefix import MODES
from ..tasks import DATA
from ..tasks.nets import net_names
from .config import AMP_DTYPES, CACHE_DTYPES, OPTIMIZERS, TUNED, TrainConfig


def _how_scale(text: str) -> str | float:
    try:
        return float(text)
    except ValueError:
        return text


def _count_or_name(text: str) -> int | str:
    return int(text) if text.isdecimal() else text


def file(text: str) -> Path:
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


def add_run_options(parser: argparse.ArgumentParser, *, out: bool = True) -> None:
    """What is trained, how long and by what steps."""
    add, tuned = parser.add_argument, TUNED
    own = " with weights or a net of timm; a task's own"
    add("task", nargs="?", default=None, metavar="TASK.py[:NAME]", help="your own task; none: a built-in one")
    add("--data", choices=DATA, help=f"built-in data ({TrainConfig.data})")
    add(
        "--data-dir",
        type=file,
        default=None,
        metavar="DIR",
        help="the folder of images, or the one that holds CIFAR's official folder",
    )
    add("--download", action="store_true", default=False, help="fetch CIFAR there first")
    add("--image-size", type=int, metavar="N", help="side of the inputs (imagefolder 224, else that of the images)")
    add("--skip-broken", action="store_true", default=False, help="leave out images that cannot be read")
    add("--workers", type=int, default=None, help="processes that read images (one a core but one, at most 8)")
    add("--model", metavar="NAME", help="; ".join(net_names()) + f" ({TrainConfig.model})")
    add(
        "--weights",
        metavar="FILE",
        help="state dict to start from; pretrained: the weights that the net's package brings",
    )
    length = parser.add_mutually_exclusive_group()
    text = f"length of the run ({TrainConfig.epochs}; {tuned['epochs']}{own})"
    length.add_argument("--epochs", type=int, help=text)
    length.add_argument("--steps", type=int, help="length of the run in optimizer steps, instead of --epochs")
    add("--batch-size", type=int, help=f"samples a step ({TrainConfig.batch_size}; {tuned['batch_size']}{own})")
    text = f"({TrainConfig.optimizer}; {tuned['optimizer']}{own})"
    add("--optimizer", choices=[name for name in OPTIMIZERS if name != "task"], help=text)
    add("--lr", type=float, help="peak learning rate (0.1; AdamW 0.001; that of the task's optimizer)")
    add("--momentum", type=float, help=f"Nesterov's, for SGD ({TrainConfig.momentum})")
    add("--weight-decay", type=float, help=f"({TrainConfig.weight_decay}; {tuned['weight_decay']}{own})")
    warmup = parser.add_mutually_exclusive_group()
    warmup.add_argument("--warmup-steps", type=int, help="steps in which the rates rise to their peak (0)")
    warmup.add_argument("--warmup-epochs", type=float, help="the same in epochs")
    add("--augment", action=argparse.BooleanOptionalAction, help="crop and flip (yes)")
    add("--amp", choices=tuple(AMP_DTYPES), help="mixed precision (bf16 on CUDA, off on CPU)")
    add("--channels-last", action=argparse.BooleanOptionalAction, help="memory format of nets of images (yes)")
    add("--device", choices=("auto", "cpu", "cuda"), help="(auto: CUDA where there is one)")
    add(
        "--deterministic",
        action="store_true",
        help="bit-identical runs on CUDA and with any --prefix, at some cost",
    )
    add("--threads", type=int, help="CPU threads of torch (torch's choice: all cores; 1 where other programs run)")
    add("--graph", action=argparse.BooleanOptionalAction, help="the step as a CUDA graph (no)")
    add("--compile", action=argparse.BooleanOptionalAction, help="torch.compile layer by layer (no)")
    if out:
        add("--out", type=file, default=None, metavar="DIR", help="folder for log, checkpoints and results (runs/...)")


def add_freezeout_options(parser: argparse.ArgumentParser, *, lists: bool = False) -> None:
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


def add_when_options(parser: argparse.ArgumentParser) -> None:
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


def add_prefix_options(parser: argparse.ArgumentParser) -> None:
    """How the frozen layers run, or are kept."""
    parser.add_argument("--prefix", choices=MODES, help="how the frozen layers run")
    add_cache_options(parser)


def add_cache_options(parser: argparse.ArgumentParser) -> None:
    """Whether and how the frozen layers' outputs are kept."""
    parser.add_argument(
        "--cache", nargs="?", const="device", metavar="device|host|DIR", help="keep what the frozen layers give (off)"
    )
    parser.add_argument(
        "--views", type=_count_or_name, metavar="K|auto", help=f"of each sample, that are kept ({TrainConfig.views})"
    )
    dtypes = [name for name in CACHE_DTYPES if name]
    parser.add_argument("--cache-dtype", choices=dtypes, help="of what is kept (as computed)")


def add_plan_options(parser: argparse.ArgumentParser) -> None:
    """What `plan` takes beside the options of a run and of FreezeOut."""
    add = parser.add_argument
    text = "count FLOP instead (backward = 1x and 2x forward); needs no data of the built-in sets"
    add("--no-measure", dest="measure", action="store_false", default=True, help=text)
    add("--rounds", type=int, default=3, help="of measuring; each steps twice from every layer on (3)")
    add("--max-seconds", type=float, default=120.0, help="no further round begins after it (120)")
    add("--want", type=saving, default=None, metavar="SAVING", help="suggest t_0 for this saving: 20%% or 0.2")
    add("--json", type=file, default=None, metavar="FILE", help="write the plan there")
    add("--png", type=file, default=None, metavar="FILE", help="draw the savings and the layers there")
