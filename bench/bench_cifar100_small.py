"""Full training against FreezeOut on a small CIFAR-100: accuracy, seconds a step by frozen layers, and as predicted.

    python bench/bench_cifar100_small.py --data-dir DIR --json bench/results/cifar100_small.json

DIR holds the official cifar-100-python folder, of any size. One small net of each family; the arms are full training,
FreezeOut linear 0.5 and cubic 0.8, and, with --all-arms, for each of the two a full training as short as it and
freezing without annealing. Goes on where it was stopped.
"""

import argparse
from dataclasses import replace
from pathlib import Path

from freezeout_ext.training.checkpoint import write_json
from freezeout_ext.training.compare import Arm, Comparison, comparison_tables
from freezeout_ext.training.config import TrainConfig
from freezeout_ext.training.report import Reporter

NETS = ("wrn-16-1", "densenet-22-12", "vgg-11-x0.25")
FREEZEOUTS = (("linear", 0.5), ("cubic", 0.8))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data-dir", type=Path, required=True)
    add("--nets", nargs="+", default=NETS)
    add("--epochs", type=int, default=30)
    add("--steps", type=int, help="instead of --epochs")
    add("--batch-size", type=int, default=50)
    add("--seeds", type=int, default=3)
    add("--threads", type=int, default=1)
    add("--all-arms", action="store_true")
    add("--out", type=Path, default=Path("runs/cifar100-small"))
    add("--json", type=Path, default=Path("cifar100_small.json"))
    args = parser.parse_args()
    kinds = ("freezeout", "short", "no-anneal") if args.all_arms else ("freezeout",)
    arms = [Arm("full"), *(Arm(kind, t_0, how_scale) for kind in kinds for how_scale, t_0 in FREEZEOUTS)]
    base = TrainConfig(
        data="cifar100", epochs=args.epochs, steps=args.steps, batch_size=args.batch_size, threads=args.threads
    )
    found = []
    for name in args.nets:
        comparison = Comparison(
            replace(base, model=name),
            args.out / name,
            arms=arms,
            seeds=range(args.seeds),
            resume=True,
            data_dir=args.data_dir,
        )
        found.append(comparison.run(lambda title: Reporter()))
        print(f"\n{comparison_tables(found[-1])}\n", flush=True)
        write_json(args.json, {"comparisons": found})


if __name__ == "__main__":
    main()
