"""freezeout plan: what each schedule would save, before anything is trained."""

import argparse
from dataclasses import asdict, replace

import torch

from ..arguments import check_count, check_number
from ..layers import Layers, find_layers
from ..planner import T_0S, Plan, StepCosts, flop_costs, suggestions_text
from ..schedule import POWERS
from ..tasks import Task
from ..tasks.images import SETS, image_task, random_images
from ..tasks.nets import find_net
from . import plot
from .chosen import base_config, given, own_task, task_of
from .config import TrainConfig, faults_of_input
from .costing import plan_of, training_costs, unfrozen
from .course import Length
from .keeping import Keeping, Kept
from .measure import conditions
from .run_folder import check_file, make_folder, write_json
from .trainer import Trainer

BACKWARDS = (1.0, 2.0)


@faults_of_input()
def plan(args: argparse.Namespace) -> None:
    """Prints the plans of a task, and writes what was asked for."""
    check_file("--json", args.json)
    check_file("--png", args.png)
    check_count("rounds", args.rounds, 1)
    check_number("max_seconds", args.max_seconds)
    own = own_task(args)
    config = replace(base_config(own, args), **given(args)).resolved()
    if config.cache and not args.measure:
        raise ValueError("--cache needs measured times: leave --no-measure out")
    kept: list[Kept] = []
    plans = [_measured(args, config, own, kept)] if args.measure else _counted(args, config, own)
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


def _measured(args: argparse.Namespace, config: TrainConfig, own: Task | None, kept: list[Kept]) -> Plan:
    """The plan. Where features are to be kept, what keeping them would do is added to `kept`."""
    length = None
    if own is not None or args.data_dir is not None or config.data not in SETS or config.data == "digits":
        task = _shown(own or task_of(args, config))
    else:
        print(f"no --data-dir: measured on random images of {config.data}'s shape", flush=True)
        data = random_images(config.data, 2 * config.batch_size, config.seed, config.device)
        task = image_task(data, config.model, image_size=config.image_size, weights=config.weights)
        length = Length.of(config, SETS[config.data].train_images)
    trainer = Trainer(unfrozen(config), task)
    costs = training_costs(trainer, rounds=args.rounds, max_seconds=args.max_seconds)
    found = _plan(args, config, costs, length or trainer.length, trainer.layers)
    if config.cache is not None:
        kept += Keeping(trainer, config, found, length or trainer.length).predicted()
    return found


def _counted(args: argparse.Namespace, config: TrainConfig, own: Task | None) -> list[Plan]:
    """One plan for each of BACKWARDS. A built-in set need not be there."""
    if own is not None or config.data not in SETS:
        trainer = Trainer(unfrozen(config), _shown(own or task_of(args, config)))
        model, length, layers = trainer.model, trainer.length, trainer.layers
        inputs, _ = next(iter(trainer.train_batches()))
    else:
        known = SETS[config.data]
        side = config.image_size or known.shape[1]
        net = find_net(config.model, known.num_classes, in_channels=known.shape[0], image_size=side)
        with torch.device("meta"):
            model, inputs = net.make(), torch.empty(config.batch_size, net.channels, side, side)
        length, layers = Length.of(config, known.train_images), find_layers(model)
    return [
        _plan(args, config, flop_costs(model, inputs, backward=backward, layers=layers), length, layers)
        for backward in BACKWARDS
    ]


def _shown(task: Task) -> Task:
    print(*task.notes, sep="\n", flush=True)
    return task


def _plan(args: argparse.Namespace, config: TrainConfig, costs: StepCosts, length: Length, layers: Layers) -> Plan:
    return plan_of(config, length, layers, costs, args.t0s or T_0S, args.how_scales or tuple(POWERS))
