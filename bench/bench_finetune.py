"""Whole runs by CPU time: fine-tuning and training from scratch, full, shortened, frozen, frozen with kept features.

    python bench/bench_finetune.py --data-dir DIR classes --seeds 8
    python bench/bench_finetune.py --data-dir DIR pretrained --arms full "short *"
    python bench/bench_finetune.py --collect

DIR holds the official cifar-100-python folder, or for `pretrained` the official cifar-10-batches-py folder.
`pretrained` trains on the first 2,000 training images of each seed's order, and tests on all test images.
Each run appends one line to --rows. A run that has its line is not repeated.
--collect writes the lines to --json and prints the tables.
finetune_tasks.py says what is trained, finetune_arms.py in which ways.

The clock is the CPU time of the process, on one thread. Other work of the machine changes that time too. So full
training steps of the same net are timed every few seconds, between the steps of a run. A run's cost is given in seconds
and in such full steps. The tables compare arms by the cost in full steps.
"""

import argparse
import json
import time
from fnmatch import fnmatchcase
from pathlib import Path

import finetune_report
import torch
from finetune_arms import ARMS
from finetune_runs import Run
from finetune_tasks import EXPERIMENTS

from freezeout_ext.training.malloc import keep_freed_memory
from freezeout_ext.training.measure import conditions


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def train(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    keep_freed_memory()
    experiment = EXPERIMENTS[args.experiment](args.data_dir, args.work)
    known = ARMS[args.experiment]
    # In the order of the patterns.
    arms = {name: known[name] for pattern in args.arms for name in known if fnmatchcase(name, pattern)}
    where = conditions(torch.device("cpu"))
    for seed in range(args.first_seed, args.first_seed + args.seeds):
        for name, arm in arms.items():
            key = {"experiment": args.experiment, "arm": name, "seed": seed}
            if any(key.items() <= row.items() for row in read_rows(args.rows)):
                continue
            start = time.perf_counter()
            row = key | Run(experiment, arm, seed).row() | {"conditions": where, "data": experiment.data}
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
