"""The paper's figures: test error over time saved, for four strategies and several t_0, one command a figure.

    python bench/paper_figures.py wrn-cifar100 --data-dir DATA --out runs/paper
    python bench/paper_figures.py densenet-cifar100 ...      also: densenet-cifar10, vgg-cifar100
    python bench/paper_figures.py wrn-cifar100 --setting modern ...
    python bench/paper_figures.py wrn-cifar100 --rehearse --out rehearsal     digits, tiny nets, seconds on a CPU

Each call trains for --minutes (9) and ends with status 75 while something is left to train; the same command goes on,
in the middle of a run too. It draws what is there each time:

    until python bench/paper_figures.py wrn-cifar100 --data-dir DATA --out runs/paper; do [ $? = 75 ] || break; done

Runs are in OUT/FIGURE-SETTING/runs, seed by seed, so that one seed of every point comes before the second of any.
Source: Brock et al. 2017, arXiv 1706.04983: SGD with Nesterov momentum 0.9, lr 0.1, weight decay 1e-4, batches of 50,
100 epochs.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, stdev

from freezeout_ext.tasks import Task, built_in
from freezeout_ext.text import table
from freezeout_ext.training import plot
from freezeout_ext.training.config import TrainConfig
from freezeout_ext.training.reporters import LineReporter
from freezeout_ext.training.run import Run
from freezeout_ext.training.run_folder import RunFolder, make_folder, write_json

MORE_TO_DO = 75  # EX_TEMPFAIL of sysexits.h
FIGURES = {
    "wrn-cifar100": ("wrn-40-4", "cifar100"),
    "densenet-cifar100": ("densenet-76-12", "cifar100"),
    "densenet-cifar10": ("densenet-76-12", "cifar10"),
    "vgg-cifar100": ("vgg-16", "cifar100"),
}
REHEARSED = {"wrn": "wrn-10-1", "densenet": "densenet-10-4", "vgg": "vgg-11-x0.0625"}
STRATEGIES = (("linear", True), ("linear", False), ("cubic", True), ("cubic", False))
T_0S = (0.5, 0.6, 0.7, 0.8, 0.9)
SETTINGS = {
    "paper": {"batch_size": 50, "lr": 0.1},
    "modern": {"batch_size": 512, "lr": 0.4, "warmup_epochs": 5.0},
}


@dataclass(frozen=True)
class Point:
    """One point of a figure; the base line is that of full training."""

    how_scale: str | None = None
    scale_lr: bool = True
    t_0: float = 1.0

    @property
    def strategy(self) -> str:
        return f"{self.how_scale}, {self._rates} rates" if self.how_scale else "full"

    @property
    def folder(self) -> str:
        return f"{self.how_scale}-{self._rates}-{self.t_0:g}" if self.how_scale else "full"

    @property
    def _rates(self) -> str:
        return "scaled" if self.scale_lr else "unscaled"

    def config(self, base: TrainConfig, seed: int) -> TrainConfig:
        if self.how_scale is None:
            return replace(base, method="full", seed=seed)
        return replace(base, how_scale=self.how_scale, scale_lr=self.scale_lr, t_0=self.t_0, seed=seed)


class OutOfTime(Exception):
    """The stage is over; the run's last epoch is on disk."""


class StageReporter(LineReporter):
    """Ends the stage at the first epoch after `deadline` (time.monotonic)."""

    def __init__(self, deadline: float) -> None:
        super().__init__()
        self._deadline = deadline

    def epoch(self, row: dict) -> None:
        super().epoch(row)
        if time.monotonic() >= self._deadline:
            raise OutOfTime


def points(t_0s: Sequence[float]) -> list[Point]:
    return [Point(), *(Point(how_scale, scaled, t_0) for how_scale, scaled in STRATEGIES for t_0 in t_0s)]


def train_stage(
    base: TrainConfig, todo: list[Point], seeds: Sequence[int], folder: Path, task: Task, deadline: float
) -> bool:
    """Trains until the deadline, at least one epoch. Returns whether all is done."""
    for seed in seeds:
        for point in todo:
            out = RunFolder(folder / "runs" / point.folder / f"seed-{seed}")
            if out.load_result() is not None:
                continue
            if time.monotonic() >= deadline:
                return False
            print(f"{point.strategy}, t_0 {point.t_0:g}, seed {seed}", flush=True)
            try:
                Run.prepare(point.config(base, seed), out.path, resume=True, task=task).train(StageReporter(deadline))
            except OutOfTime:
                return False
    return True


def collect(todo: list[Point], seeds: Sequence[int], folder: Path) -> list[dict]:
    """One row a point that has a finished run: mean and sd of the error in percent, time over full training's."""
    results = {
        (point, seed): result
        for point in todo
        for seed in seeds
        if (result := RunFolder(folder / "runs" / point.folder / f"seed-{seed}").load_result())
    }
    rows = []
    for point in todo:
        found = {seed: results[point, seed] for seed in seeds if (point, seed) in results}
        if not found:
            continue
        errors = [100 * (1 - result["test_accuracy"]) for result in found.values()]
        full = {seed: results[Point(), seed]["train_seconds"] for seed in found if (Point(), seed) in results}
        ratios = [found[seed]["train_seconds"] / seconds for seed, seconds in full.items()]
        rows.append(
            {
                "strategy": point.strategy,
                "t_0": point.t_0,
                "error_percent": fmean(errors),
                "error_sd": stdev(errors) if len(errors) > 1 else None,
                "time_saved_percent": 100 * (1 - fmean(ratios)) if ratios else None,
                "seeds": list(found),
                "conditions": next(iter(found.values()))["conditions"],
            }
        )
    return rows


def results_table(rows: list[dict]) -> str:
    cells = [("strategy", "t_0", "test error, %", "seeds", "time saved")]
    for row in rows:
        sd = "" if row["error_sd"] is None else f" ± {row['error_sd']:.2f}"
        saved = "-" if row["time_saved_percent"] is None else f"{row['time_saved_percent']:.1f} %"
        error = f"{row['error_percent']:.2f}{sd}"
        cells.append((row["strategy"], f"{row['t_0']:g}", error, str(len(row["seeds"])), saved))
    return table(cells, left=[0])


def draw(rows: list[dict], title: str):
    """Test error over time saved; a line a strategy, a point a t_0, full training as a band."""
    figure, (ax,) = plot.empty_figure(1, height=4.5)
    for row in rows:
        if row["strategy"] == "full":
            ax.axhline(row["error_percent"], color="black", linestyle="--", label="full training")
            sd = row["error_sd"] or 0.0
            ax.axhspan(row["error_percent"] - sd, row["error_percent"] + sd, color="black", alpha=0.1, linewidth=0)
    for strategy in dict.fromkeys(row["strategy"] for row in rows if row["strategy"] != "full"):
        line = [row for row in rows if row["strategy"] == strategy and row["time_saved_percent"] is not None]
        x, y = [row["time_saved_percent"] for row in line], [row["error_percent"] for row in line]
        ax.errorbar(x, y, [row["error_sd"] or 0.0 for row in line], marker="o", capsize=2, label=strategy)
        for row in line:
            at = row["time_saved_percent"], row["error_percent"]
            ax.annotate(f"{row['t_0']:g}", at, xytext=(4, 4), textcoords="offset points", fontsize=7)
    ax.set_xlabel("training time saved, % (numbers: t_0)")
    ax.set_ylabel("test error, %")
    ax.set_title(title)
    ax.grid(alpha=0.3)
    ax.legend()
    return figure


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    deadline = time.monotonic() + 60 * args.minutes
    model, data_name = FIGURES[args.figure]
    base = TrainConfig(model=model, data=data_name, epochs=args.epochs, **SETTINGS[args.setting])
    if args.rehearse:
        tiny = REHEARSED[model.partition("-")[0]]
        base = replace(base, model=tiny, data="digits", epochs=2, batch_size=450, warmup_epochs=0.0)
    base = replace(base, device=args.device)
    given = {"data_dir": args.data_dir, "download": args.download, "device": base.resolved().device}
    task = built_in(base.data, base.model, **given)
    folder = args.out / f"{args.figure}-{args.setting}"
    make_folder(folder)
    todo, seeds = points(args.t0s), range(args.seeds)
    done = train_stage(base, todo, seeds, folder, task, deadline)
    rows = collect(todo, seeds, folder)
    if rows:
        write_json(folder / "results.json", {"config": base.to_dict(), "points": rows})
        title = f"{base.model}, {base.data}, batch {base.batch_size}"
        plot.save(draw(rows, title), folder / "figure.png")
        print(f"{title}\n{results_table(rows)}\nwritten to {folder}: results.json, figure.png")
    if not done:
        total = len(todo) * len(seeds)
        print(f"{sum(len(row['seeds']) for row in rows)} of {total} runs are done; the same command goes on")
    return 0 if done else MORE_TO_DO


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("figure", choices=FIGURES)
    add("--setting", choices=SETTINGS, default="paper", help="paper: batch 50; modern: batch 512, warm-up (paper)")
    add("--t0s", nargs="+", type=float, default=T_0S)
    add("--seeds", type=int, default=3)
    add("--epochs", type=int, default=100)
    add("--minutes", type=float, default=9.0, help="length of this stage (9)")
    add("--data-dir", type=Path)
    add("--download", action="store_true")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add("--out", type=Path, default=Path("runs/paper"))
    add("--rehearse", action="store_true", help="the same on digits with tiny nets and two epochs")
    return parser


if __name__ == "__main__":
    sys.exit(main())
