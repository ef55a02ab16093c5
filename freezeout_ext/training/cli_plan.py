"""freezeout plan: what FreezeOut would save, before anything is trained."""

import argparse
import math
from dataclasses import asdict
from pathlib import Path

import torch

from ..models import build_model
from ..planner import T_0S, Plan, StepCosts, flop_costs, plan_from_costs, suggestions_text
from ..schedule import POWERS
from . import plot
from .checkpoint import make_folder, write_json
from .config import TrainConfig
from .costing import training_costs
from .data import DataSplits, Split, load_data
from .measure import conditions
from .plan_report import plot_plan
from .trainer import Trainer

# (channels, side, classes, training images) of the sets, for a plan without them.
SHAPES = {"digits": (1, 8, 10, 1347), "cifar10": (3, 32, 10, 50_000), "cifar100": (3, 32, 100, 50_000)}
BACKWARDS = (1.0, 2.0)


def run_plan(args: argparse.Namespace, config: TrainConfig) -> None:
    """Prints the plans of `config`, and writes what was asked for."""
    if args.measure:
        plans, where = [_measured(args, config)], conditions(torch.device(config.device))
    else:
        plans, where = [_counted(args, config, backward) for backward in BACKWARDS], None
    print(f"{config.data}, {config.model}, batch {config.batch_size}, {plans[0].schedule['total_steps']} steps")
    suggestions = []
    for plan in plans:
        print(f"\n{plan}")
        if args.want is not None:
            suggestions.append(plan.suggest(args.want))
            print(f"\n{suggestions_text(suggestions[-1])}")
    if args.json is not None:
        values = {
            "config": config.to_dict(),
            "conditions": where,
            "plans": [plan.to_dict() for plan in plans],
            "suggestions": [[asdict(suggestion) for suggestion in found] for found in suggestions],
        }
        make_folder(args.json.parent)
        write_json(args.json, values)
        print(f"written: {args.json}")
    if args.png is not None:
        make_folder(args.png.parent)
        plot.save(plot_plan(plans[-1], f"{config.model}, batch {config.batch_size}"), args.png)
        print(f"written: {args.png}")


def _measured(args: argparse.Namespace, config: TrainConfig) -> Plan:
    if config.data == "digits" or args.data_dir is not None:
        data = load_data(config.data, args.data_dir, download=args.download, device=config.device)
        steps_per_epoch = None
    else:
        print(f"no --data-dir: measured on random images of {config.data}'s shape")
        data = _random_images(config)
        steps_per_epoch = _steps_per_epoch(config)
    trainer = Trainer(config, data)
    costs = training_costs(trainer, rounds=args.rounds, max_seconds=args.max_seconds)
    return _plan(args, config, costs, steps_per_epoch or trainer.steps_per_epoch)


def _counted(args: argparse.Namespace, config: TrainConfig, backward: float) -> Plan:
    channels, side, classes, _ = SHAPES[config.data]
    with torch.device("meta"):
        model = build_model(config.model, classes, in_channels=channels, image_size=side)
        inputs = torch.empty(config.batch_size, channels, side, side)
    return _plan(args, config, flop_costs(model, inputs, backward=backward), _steps_per_epoch(config))


def _plan(args: argparse.Namespace, config: TrainConfig, costs: StepCosts, steps_per_epoch: int) -> Plan:
    total_steps = config.steps or config.epochs * steps_per_epoch
    warmup = config.warmup_steps or round(config.warmup_epochs * steps_per_epoch)
    schedule = {"total_steps": total_steps, "warmup_steps": warmup, "max_transitions": config.max_transitions}
    return plan_from_costs(costs, schedule, args.t0s or T_0S, args.how_scales or tuple(POWERS))


def _steps_per_epoch(config: TrainConfig) -> int:
    """Of training without the set: whole batches alone, as `Trainer` takes."""
    return max(1, SHAPES[config.data][3] // config.batch_size)


def _random_images(config: TrainConfig) -> DataSplits:
    channels, side, classes, _ = SHAPES[config.data]
    count = 2 * config.batch_size
    generator = torch.Generator().manual_seed(config.seed)
    images = torch.randint(256, (count, channels, side, side), dtype=torch.uint8, generator=generator)
    labels = torch.randint(classes, (count,), generator=generator)
    half = (0.5,) * channels
    split = Split(images.to(config.device), labels.to(config.device), half, half, 4, True)
    return DataSplits(split, None, split, classes, f"random images of {config.data}'s shape")


def add_plan_options(parser: argparse.ArgumentParser) -> None:
    """What `plan` takes beside the options of a run and of FreezeOut."""
    add = parser.add_argument
    text = "count FLOP instead (backward = 1x and 2x forward); needs no data"
    add("--no-measure", dest="measure", action="store_false", default=True, help=text)
    add("--rounds", type=int, default=3, help="of measuring; each steps twice from every layer on (3)")
    add("--max-seconds", type=float, default=120.0, help="no further round begins after it (120)")
    add("--want", type=saving, default=None, metavar="SAVING", help="suggest t_0 for this saving: 20%% or 0.2")
    add("--json", type=Path, default=None, metavar="FILE", help="write the plan there")
    add("--png", type=Path, default=None, metavar="FILE", help="draw the savings and the layers there")


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
