"""The options that the commands of the command line share, and the config and the task that they name."""

import argparse
import math
import shlex
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from ..tasks import Task, built_in, load_task
from ..tasks.nets import is_papers
from .config import OWN_MODEL, TUNED, TrainConfig
from .reporters import Progress

FIELDS = {field.name: field for field in fields(TrainConfig)}
# Of a tail, of kept features, and of how the frozen layers run.
WHEN, KEPT = ("start_frozen", "thaw_to"), ("cache", "views", "cache_dtype")


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


def add_fields(parser: Any, *names: str, **others: Any) -> None:
    """An option for each of these fields of TrainConfig; `others` are further arguments of add_argument."""
    for name in names:
        given = {"dest": name, **FIELDS[name].metadata["option"], **others}
        if name == "optimizer":
            given["choices"] = [each for each in given["choices"] if each != "task"]
        parser.add_argument(_flag(name), **given)


def _flag(name: str, no: str = "") -> str:
    return f"--{no}{'t0' if name == 't_0' else name.replace('_', '-')}"


def command(part: str, given: Mapping[str, Any]) -> str:
    """The command line that gives these fields of TrainConfig and other options; `task` is a position."""
    words = ["freezeout", part, *([given["task"]] if given.get("task") else [])]
    for name, value in given.items():
        if name == "method":
            words += {"full": ["--no-freezeout"], "no-anneal": ["--no-anneal"]}.get(value, [])
        elif isinstance(value, bool):
            words.append(_flag(name, "" if value else "no-"))
        elif value is not None and name != "task":
            words += [_flag(name), str(value)]
    return shlex.join(words)


def add_run_options(parser: argparse.ArgumentParser, *, out: bool = True) -> None:
    """What is trained, how long and by what steps."""
    add = parser.add_argument
    add("task", nargs="?", default=None, metavar="TASK.py[:NAME]", help="your own task; none: a built-in one")
    add_fields(parser, "data")
    text = "the folder of images, or the one that holds CIFAR's official folder"
    add("--data-dir", type=file, default=None, metavar="DIR", help=text)
    add("--download", action="store_true", default=False, help="fetch CIFAR there first")
    add("--skip-broken", action="store_true", default=False, help="leave out images that cannot be read")
    add("--workers", type=int, default=None, help="processes that read images (one a core but one, at most 8)")
    add_fields(parser, "image_size", "model", "weights")
    add_fields(parser.add_mutually_exclusive_group(), "epochs", "steps")
    add_fields(parser, "batch_size", "optimizer", "lr", "momentum", "weight_decay")
    add_fields(parser.add_mutually_exclusive_group(), "warmup_steps", "warmup_epochs")
    add_fields(parser, "augment", "amp", "channels_last", "device", "deterministic", "threads", "graph", "compile")
    if out:
        add("--out", type=file, default=None, metavar="DIR", help="folder for log, checkpoints and results (runs/...)")


def add_freezeout_options(parser: argparse.ArgumentParser, *, lists: bool = False) -> None:
    """The rule. With `lists` t_0 and how_scale are lists, t0s and how_scales."""
    for name, several in (("t_0", "t0s"), ("how_scale", "how_scales")):
        text = f"{FIELDS[name].metadata['option']['help']}; several make several arms or panels"
        more = {"nargs": "+", "action": "extend", "default": None, "dest": several, "help": text} if lists else {}
        add_fields(parser, name, **more)
    add_fields(parser, "scale_lr", "max_transitions")


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
        on_progress=Progress("trying all images"),
    )


def given(args: argparse.Namespace) -> dict:
    """The config's fields that were given on the command line."""
    return {name: value for name, value in vars(args).items() if name in FIELDS}


def config_of(args: argparse.Namespace, own: Task | None) -> TrainConfig:
    """The config of a task, changed by what is given."""
    if own is not None:
        return replace(TrainConfig.of_task(own), **given(args))
    fresh = getattr(args, "weights", None) is None and is_papers(getattr(args, "model", TrainConfig.model))
    return TrainConfig(**(({} if fresh else TUNED) | given(args)))


def chosen(args: argparse.Namespace) -> tuple[TrainConfig, Task]:
    """The resolved config and the task."""
    own = own_task(args)
    config = config_of(args, own).resolved()
    return config, own or task_of(args, config)


def folder_name(config: TrainConfig) -> str:
    """Of the folder in runs/ that a command writes to where none is named."""
    name = Path(config.data).stem if config.model == OWN_MODEL else f"{config.data}-{config.model}"
    return name.replace("/", "-")
