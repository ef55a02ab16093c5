"""Whole runs by CPU time: fine-tuning and training from scratch, full, shortened, frozen, frozen with kept features.

    python bench/bench_finetune.py --data-dir DIR classes --seeds 8
    python bench/bench_finetune.py --data-dir DIR pretrained --arms full "short *"
    python bench/bench_finetune.py --collect

DIR holds the official cifar-100-python folder, or for `pretrained` the official cifar-10-batches-py folder.
`pretrained` trains on the first 2,000 training images of each seed's order, and tests on all test images.
Each run appends one line to --rows. A run that has its line is not repeated.
--collect writes the lines to --json and prints the tables.
finetune_tasks.py says what is trained, finetune_arms.py in which ways. `training.Trainer` trains.

The clock is the CPU time of the process, on one thread. Other work of the machine changes that time too. So full
training steps of the same net are timed every few seconds, between the steps of a run. A run's cost is given in seconds
and in such full steps. The tables compare arms by the cost in full steps.
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path

import finetune_report
import torch
from finetune_arms import ARMS, Arm
from finetune_tasks import EXPERIMENTS, Experiment
from torch import nn

from freezeout_ext.tasks import Task, batches
from freezeout_ext.training.config import TrainConfig
from freezeout_ext.training.measure import conditions
from freezeout_ext.training.trainer import Trainer


class Clock:
    """CPU seconds of a run, and the same in full training steps that are timed between the run's own.

    Attributes:
        seconds: of the process while the clock ran.
        full_steps: the same, over the seconds of a full training step at that time.
    """

    def __init__(self, full_step: Callable[[], None], steps: int, every: float) -> None:
        self._full_step, self._steps, self._every = full_step, steps, every
        self.seconds = self.full_steps = 0.0
        self.yardsticks: list[float] = []

    def start(self) -> None:
        self._last = self._yardstick()
        self._since = time.process_time()

    def lap(self, *, end: bool = False) -> None:
        seconds = time.process_time() - self._since
        if seconds < self._every and not end:
            return
        before, self._last = self._last, self._yardstick()
        self.seconds += seconds
        self.full_steps += seconds / (0.5 * (before + self._last))
        self._since = time.process_time()

    def _yardstick(self) -> float:
        start = time.process_time()
        for _ in range(self._steps):
            self._full_step()
        self.yardsticks.append((time.process_time() - start) / self._steps)
        return self.yardsticks[-1]


def run(experiment: Experiment, arm: Arm, seed: int) -> dict:
    """Trains one arm. Returns what the run reached and what the run took."""
    task, config = experiment.task(seed), replace(experiment.config, seed=seed)
    epoch = len(task.train) // config.batch_size
    config = replace(config, steps=round(arm.length * config.epochs * epoch), **arm.changes)
    clock = Clock(full_step(replace(experiment.config, seed=seed), task), *experiment.timed)
    clock.start()
    trainer = Trainer(config.resolved(), adapted(task, arm.adapt, config))
    while trainer.epoch < trainer.epochs:
        trainer.train_epoch(lambda step: clock.lap())
    clock.lap(end=True)
    found = {"steps": trainer.step, "cpu_seconds": clock.seconds, "full_steps": clock.full_steps}
    found |= {"full_step_seconds": sum(clock.yardsticks) / len(clock.yardsticks)}
    found |= {"memory_bytes": max(phase.memory for phase in trainer.phases)}
    if trainer.feed.cache is not None:
        report = trainer.feed.cache.report()
        names = ("rows", "of_rows", "bytes", "hits", "misses", "samples_read", "samples_skipped", "notes")
        found["cache"] = {name: getattr(report, name) for name in names}
        trainer.feed.cache.close()
    found["transitions"] = [[t["step"], t["num_frozen"]] for t in trainer.transitions]
    judged = trainer.evaluate("test", task.evaluation)
    return found | {"accuracy": 100 * judged["test_accuracy"], "loss": judged["test_loss"]}


def adapted(task: Task, passes: int, config: TrainConfig) -> Task:
    """The task whose net's batch norms have seen the training data so often before anything is trained."""

    def make_model() -> nn.Module:
        model = task.make_model().train()
        for epoch in range(passes):
            found = batches(task.train, config.batch_size, shuffle=True, seed=900 + config.seed, epoch=epoch)
            torch.optim.swa_utils.update_bn((inputs for inputs, _ in found), model)
        return model

    return replace(task, make_model=make_model) if passes else task


def full_step(config: TrainConfig, task: Task) -> Callable[[], None]:
    """A step of full training of another copy of the net on one batch."""
    # Rate 0: the yardstick's weights stay finite and its work the same.
    trainer = Trainer(replace(config, lr=0.0, steps=10**9).resolved(), task)
    batch = next(iter(trainer.train_batches()))

    def step() -> None:
        trainer.train_step(*batch)

    for _ in range(2):
        step()
    return step


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def train(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    experiment = EXPERIMENTS[args.experiment](args.data_dir, args.work)
    known = ARMS[args.experiment]
    # In the order of the patterns.
    arms = {name: known[name] for pattern in args.arms for name in known if fnmatchcase(name, pattern)}
    for seed in range(args.first_seed, args.first_seed + args.seeds):
        for name, arm in arms.items():
            key = {"experiment": args.experiment, "arm": name, "seed": seed}
            if any(key.items() <= row.items() for row in read_rows(args.rows)):
                continue
            start = time.perf_counter()
            row = key | run(experiment, arm, seed)
            row |= {"conditions": conditions(torch.device("cpu")), "data": experiment.data}
            with args.rows.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(
                f"{args.experiment} {name}, seed {seed}: {row['accuracy']:.2f} %, loss {row['loss']:.3f}, "
                f"{row['cpu_seconds']:.1f} CPU seconds ({time.perf_counter() - start:.0f} s in all)",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("experiment", nargs="?", choices=sorted(EXPERIMENTS))
    add("--data-dir", type=Path)
    add("--arms", nargs="+", default=["*"], help="names or patterns (all)")
    add("--seeds", type=int, default=5)
    add("--first-seed", type=int, default=0)
    add("--rows", type=Path, default=Path("runs/finetune/rows.jsonl"))
    add("--work", type=Path, default=Path("runs/finetune"), help="for the nets that are pretrained here")
    add("--collect", action="store_true")
    add("--json", type=Path, default=Path("bench/results/finetune.json"))
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    args.rows.parent.mkdir(parents=True, exist_ok=True)
    if args.experiment:
        if args.data_dir is None:
            parser.error("--data-dir must name the folder that holds the data")
        train(args)
    if args.collect:
        rows = read_rows(args.rows)
        finetune_report.write(args.json, rows)
        print(finetune_report.tables(rows))


if __name__ == "__main__":
    main()
