"""freezeout plan: what each schedule would save, before anything is trained."""

import argparse
from dataclasses import asdict

import torch

from ..arguments import check_count, check_number
from ..planner import T_0S, Plan, flop_costs, suggestions_text
from ..schedule import POWERS
from ..tasks.images import SETS, image_task, random_images
from . import plot
from .chosen import config_of, own_task, task_of
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
