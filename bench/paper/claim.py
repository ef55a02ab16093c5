"""The paper's claim, run by run: full training, FreezeOut cubic scaled 0.8, and a cosine of FreezeOut's seconds.

    python bench/paper/claim.py --data-dir DATA --out runs/claim                     WRN-40-4, CIFAR-100
    python bench/paper/claim.py --model densenet-76-12 ...
    python bench/paper/claim.py --rehearse --out rehearsal                           digits, a tiny net, seconds

`freezeout compare` in stages: each call trains for --minutes (9) and ends with status 75 while a run is left; the same
command goes on, in the middle of a run too where its checkpoint is still there. Seed by seed, all arms of one before
the next, so that what is done can be compared at any time: compare.json, a table and chart.png are of the seeds whose
arms are all done.

Source: Brock et al. 2017, arXiv 1706.04983: up to 20 % less time for about 3 points of accuracy.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from figures import MORE_TO_DO, OutOfTime, StageReporter, add_stage_options

from freezeout_ext.tasks import built_in
from freezeout_ext.training import plot
from freezeout_ext.training.arms import KINDS, make_arms
from freezeout_ext.training.compare import Comparison
from freezeout_ext.training.config import TrainConfig
from freezeout_ext.training.summary import curves
from freezeout_ext.training.tables import comparison_tables

REHEARSED = {"model": "wrn-10-1", "data": "digits", "epochs": 2, "batch_size": 450}


def train_stage(args: argparse.Namespace, base: TrainConfig, deadline: float) -> tuple[dict | None, bool]:
    """-> the summary of the whole seeds, or None, and whether all is done."""
    summary = None
    given = {"data_dir": args.data_dir, "download": args.download, "device": base.resolved().device}
    task = built_in(base.data, base.model, **given)
    arms = make_arms(args.arms, [base.t_0], [base.how_scale])
    for count in range(1, args.seeds + 1):
        comparison = Comparison(base, args.out, arms=arms, seeds=range(count), resume=True, task=task)
        try:
            summary = comparison.run(lambda title: _Titled(title, deadline))
        except OutOfTime:
            return summary, False
    return summary, True


class _Titled(StageReporter):
    def __init__(self, title: str, deadline: float) -> None:
        super().__init__(deadline)
        self._title = title

    def start(self, trainer) -> None:
        # Finished runs do not get here: a stage without time still compares them.
        if time.monotonic() >= self._deadline:
            raise OutOfTime
        super().start(trainer)
        self.line(f"{self._title}, from epoch {trainer.epoch}")


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    deadline = time.monotonic() + 60 * args.minutes
    base = TrainConfig(
        model=args.model, data=args.data, epochs=args.epochs, batch_size=args.batch_size, lr=args.lr, t_0=0.8,
        how_scale="cubic", scale_lr=True, graph=args.graph, prefix=args.prefix, device=args.device,
    )  # fmt: skip
    if args.rehearse:
        base = replace(base, **REHEARSED)
    summary, done = train_stage(args, base, deadline)
    if summary is not None:
        print(comparison_tables(summary))
        figure = plot.plot_comparison(curves(args.out, summary), summary, f"{base.data}, {base.model}")
        plot.save(figure, args.out / "chart.png")
        print(f"written to {args.out}: compare.json, chart.png")
    if not done:
        seeds = 0 if summary is None else len(summary["seeds"])
        print(f"{seeds} of {args.seeds} seeds are done; the same command goes on")
    return 0 if done else MORE_TO_DO


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="wrn-40-4")
    add("--data", default="cifar100")
    add("--arms", nargs="+", choices=KINDS, default=["full", "freezeout", "short"])
    add("--batch-size", type=int, default=128)
    add("--lr", type=float, default=0.1)
    add("--graph", action="store_true", help="the step as a CUDA graph, in every arm")
    add("--prefix", choices=("exact", "folded", "bf16", "fp16", "off"), help="of the frozen layers (exact)")
    add_stage_options(parser, out=Path("runs/claim"))
    return parser


if __name__ == "__main__":
    sys.exit(main())
