"""The task and the config that the arguments of a command name."""

import argparse
from dataclasses import fields, replace
from pathlib import Path

from ..tasks import Task, built_in, load_task
from ..tasks.nets import is_papers
from .config import OWN_MODEL, TUNED, TrainConfig
from .reporters import Progress


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
    names = {field.name for field in fields(TrainConfig)}
    return {name: value for name, value in vars(args).items() if name in names}


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
