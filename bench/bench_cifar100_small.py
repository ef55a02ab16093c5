"""The compare table on a small real CIFAR-100 for one small net of each family: accuracy and seconds, and as predicted.

    python bench/bench_cifar100_small.py --data-dir DIR --nets densenet-10-12 &
    python bench/bench_cifar100_small.py --data-dir DIR --nets wrn-10-1 vgg-11-x0.125
    wait

DIR holds the official cifar-100-python folder, of any size. The committed numbers are of 10,000 + 2,000 images.
The arms are full training, FreezeOut cubic 0.8 and FreezeOut linear 0.5. For each of the two FreezeOut arms there are
two more: full training of the same length in time, and freezing without annealing.
No arm augments, since so few epochs do not overfit.
As above, two processes of one thread each share two cores. Each process goes on where it was stopped.
At its end a process writes what all nets in --out have by then to --json, and draws it in --png. --collect does only
that.
"""

import argparse
from pathlib import Path

from freezeout_ext.tasks import built_in
from freezeout_ext.training import plot
from freezeout_ext.training.arms import Arm
from freezeout_ext.training.compare import Comparison
from freezeout_ext.training.config import TrainConfig
from freezeout_ext.training.reporters import Reporter
from freezeout_ext.training.run_folder import read_json, write_json
from freezeout_ext.training.summary import curves
from freezeout_ext.training.tables import comparison_tables

# So many that the first net takes as long as the other two. A full run takes 100, 70 and 35 s, a net 18 times that.
EPOCHS = {"densenet-10-12": 7, "wrn-10-1": 6, "vgg-11-x0.125": 10}
FREEZEOUTS = (("cubic", 0.8), ("linear", 0.5))
KINDS = ("freezeout", "short", "no-anneal")
ARMS = [Arm("full"), *(Arm(kind, t_0, how_scale) for kind in KINDS for how_scale, t_0 in FREEZEOUTS)]
RESULTS = Path("bench/results")


def train(name: str, args: argparse.Namespace) -> None:
    base = TrainConfig(
        data="cifar100",
        model=name,
        epochs=args.epochs or EPOCHS.get(name, 8),
        steps=args.steps,
        batch_size=args.batch_size,
        lr=args.lr,
        threads=args.threads,
        augment=False,
    )
    task = built_in("cifar100", name, data_dir=args.data_dir, augment=False)
    comparison = Comparison(base, args.out / name, arms=ARMS, seeds=range(args.seeds), resume=True, task=task)
    summary = comparison.run(lambda title: Reporter(), say=lambda text: print(f"{name}: {text}", flush=True))
    print(f"\n{comparison_tables(summary)}\n", flush=True)


def collect(out: Path, json: Path, png: Path) -> None:
    """The comparisons in `out` into one file, with the curves that their chart shows, and the chart."""
    folders = sorted((path.parent for path in out.glob("*/compare.json")), key=lambda folder: _order(folder.name))
    comparisons, charts = [], {}
    for folder in folders:
        summary = read_json(folder / "compare.json")
        logs = curves(folder, summary)
        charts[f"{summary['config']['model']}, {summary['config']['data']}"] = logs
        for arm in summary["arms"]:
            rows = logs[arm["name"]]
            arm["curves"] = [[[row["train_seconds"], row["test_accuracy"]] for row in run] for run in rows]
        comparisons.append(summary)
    write_json(json, {"comparisons": _rounded(comparisons)}, indent=None)
    plot.save(plot.plot_comparisons(charts), png)
    print(f"{', '.join(folder.name for folder in folders)} -> {json}, {png}")


def _order(name: str) -> tuple:
    nets = list(EPOCHS)
    return (nets.index(name) if name in nets else len(nets), name)


def _rounded(value):
    """Floats rounded to six digits. No value is known better than that."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {name: _rounded(each) for name, each in value.items()}
    return [_rounded(each) for each in value] if isinstance(value, list) else value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data-dir", type=Path)
    add("--nets", nargs="+", default=list(EPOCHS), help=f"({' '.join(EPOCHS)})")
    add("--epochs", type=int, help="(" + ", ".join(f"{net}: {epochs}" for net, epochs in EPOCHS.items()) + ")")
    add("--steps", type=int, help="instead of --epochs")
    add("--batch-size", type=int, default=32)
    add("--lr", type=float, default=0.1)
    add("--seeds", type=int, default=3)
    add("--threads", type=int, default=1)
    add("--out", type=Path, default=Path("runs/cifar100-small"))
    add("--collect", action="store_true", help="train nothing")
    add("--json", type=Path, default=RESULTS / "cifar100_small.json")
    add("--png", type=Path, default=RESULTS / "cifar100_small.png")
    args = parser.parse_args()
    if not args.collect:
        if args.data_dir is None:
            parser.error("--data-dir must name the folder that holds cifar-100-python")
        for name in args.nets:
            train(name, args)
    collect(args.out, args.json, args.png)


if __name__ == "__main__":
    main()
