"""Charts as PNG: the schedules of the paper's Figure 1, the curves of a run, accuracy over time of a comparison."""

from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING

from ..schedule import Schedule

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DOTS_PER_INCH = 150
# By the kind of an arm; its color says which FreezeOut it belongs to.
LINES = {"full": "-", "freezeout": "-", "no-anneal": ":", "short": "--", "const-time": "-."}
FILLED = ("full", "freezeout")


def plot_schedules(schedules: dict[str, Schedule], *, base_lr: float = 0.1) -> "Figure":
    """lr_i(step) of every layer, one panel a schedule: the paper's Figure 1."""
    figure, axes = empty_figure(len(schedules), height=3.2)
    for ax, (title, schedule) in zip(axes, schedules.items(), strict=True):
        last = schedule.num_layers - 1
        for i in range(schedule.num_layers):
            # Up to the milestone and not beyond: the curves then end where the layers freeze.
            end = schedule.milestone(i)
            steps = [end * k / 300 for k in range(300)] + [end]
            rates = [base_lr * schedule.lr_factor(i, step) for step in steps]
            ax.plot(steps, rates, color=_color(i / max(last, 1)), linewidth=1.2)
        ax.set_title(title)
        ax.set_xlim(0, schedule.total_steps)
        ax.set_ylim(bottom=0)
        ax.set_ylabel("learning rate")
        _layer_colors(figure, ax, last)
    axes[-1].set_xlabel("step")
    return figure


def plot_run(rows: list[dict], title: str) -> "Figure":
    """Loss, accuracy, learning rate of each layer, layers frozen and milliseconds per step over a run's epochs."""
    figure, axes = empty_figure(5, height=2.1, sharex=True)
    loss, accuracy, rates, frozen, time = axes
    epochs = [row["epoch"] for row in rows]
    for split in ("train", "val", "test"):
        if f"{split}_loss" in rows[0]:
            loss.plot(epochs, [row[f"{split}_loss"] for row in rows], label=split)
            accuracy.plot(epochs, [100 * row[f"{split}_accuracy"] for row in rows], label=split)
    last = len(rows[0]["learning_rates"]) - 1
    for i in range(last + 1):
        rates.plot(epochs, [row["learning_rates"][i] for row in rows], color=_color(i / max(last, 1)), linewidth=1)
    _layer_colors(figure, rates, last)
    frozen.step(epochs, [row["num_frozen"] for row in rows], where="post", color="black")
    time.plot(epochs, [1000 * row["seconds_per_step"] for row in rows], color="black")
    for ax, label in zip(axes, ("loss", "accuracy, %", "learning rate", "layers frozen", "ms per step"), strict=True):
        ax.set_ylabel(label)
        ax.grid(alpha=0.3)
    loss.set_yscale("log")
    for ax in (rates, frozen, time):
        ax.set_ylim(bottom=0)
    loss.legend()
    loss.set_title(title)
    axes[-1].set_xlabel("epoch")
    return figure


def plot_comparison(curves: dict[str, list[list[dict]]], title: str) -> "Figure":
    """Mean test accuracy over mean training seconds of each arm: band of one sd, a tick where layers freeze.

    curves: for each arm, the rows of the log of each of its runs.
    """
    return plot_comparisons({title: curves})


def plot_comparisons(charts: dict[str, dict[str, list[list[dict]]]]) -> "Figure":
    """plot_comparison of each title's curves, one panel below the other."""
    figure, axes = empty_figure(len(charts), height=3.8, width=10)
    for ax, (title, curves) in zip(axes, charts.items(), strict=True):
        _draw_comparison(ax, curves)
        ax.set_title(title)
    axes[-1].set_xlabel("seconds of training; | layers freeze, band: one sd over the seeds")
    return figure


def _draw_comparison(ax, curves: dict[str, list[list[dict]]]) -> None:
    variants = list(dict.fromkeys(name.partition(" ")[2] for name in curves if " " in name))
    lowest = []
    for name, runs in curves.items():
        kind, _, variant = name.partition(" ")
        color = f"C{variants.index(variant)}" if variant else "black"
        epochs = list(zip(*runs, strict=True))
        seconds = [fmean(row["train_seconds"] for row in rows) for rows in epochs]
        values = [[100 * row["test_accuracy"] for row in rows] for rows in epochs]
        means = [fmean(v) for v in values]
        spreads = [_sd(v) for v in values]
        label = f"{name}: {means[-1]:.2f}{f' ± {spreads[-1]:.2f}' if len(runs) > 1 else ''} % in {seconds[-1]:.3g} s"
        ax.plot(seconds, means, color=color, linestyle=LINES[kind], linewidth=1.4, label=label)
        low = [m - s for m, s in zip(means, spreads, strict=True)]
        high = [m + s for m, s in zip(means, spreads, strict=True)]
        ax.fill_between(seconds, low, high, color=color, alpha=0.1, linewidth=0)
        ax.plot(seconds[-1], means[-1], "o", color=color, markersize=5, fillstyle="full" if kind in FILLED else "none")
        marks = [_at(step, [rows[0]["step"] for rows in epochs], seconds, means) for step in _freezes(runs[0])]
        ax.plot(*zip(*marks, strict=True) if marks else ([], []), "|", color=color, markersize=9)
        lowest.append(means[len(means) // 3])
    top = max(ax.dataLim.y1, min(lowest) + 1)
    ax.set_ylim(min(lowest) - 0.3 * (top - min(lowest)), top + 0.03 * (top - min(lowest)))
    ax.set_xlim(left=0)
    ax.set_ylabel("test accuracy, %")
    ax.grid(alpha=0.3)
    ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8, frameon=False)


def _freezes(rows: list[dict]) -> list[int]:
    return [transition["step"] for row in rows for transition in row["transitions"]]


def _at(step: int, steps: list[int], *curves: list[float]) -> tuple[float, ...]:
    """The curves at `step`, on the line between the two epochs around it; before the first epoch's end, there."""
    if step <= steps[0]:
        return tuple(curve[0] for curve in curves)
    k = next((k for k, end in enumerate(steps) if end >= step), len(steps) - 1)
    part = (step - steps[k - 1]) / (steps[k] - steps[k - 1])
    return tuple(curve[k - 1] + part * (curve[k] - curve[k - 1]) for curve in curves)


def save(figure: "Figure", path: str | Path) -> None:
    figure.savefig(path, dpi=DOTS_PER_INCH)


def empty_figure(rows: int, *, height: float, width: float = 8, sharex: bool = False) -> tuple["Figure", list]:
    """A figure with `rows` axes below each other, and these."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("charts need matplotlib: pip install 'freezeout_ext[train]'") from None
    figure = Figure(figsize=(width, height * rows), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(rows, 1, sharex=sharex, squeeze=False)[:, 0])


def _color(fraction: float):
    from matplotlib import colormaps

    return colormaps["viridis"](0.92 * fraction)


def _layer_colors(figure: "Figure", ax, last: int) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap

    scale = ListedColormap([_color(k / 255) for k in range(256)])
    mappable = ScalarMappable(cmap=scale)
    mappable.set_clim(0, max(last, 1))
    figure.colorbar(mappable, ax=ax, label="layer", ticks=sorted({0, last // 2, last}), aspect=12)


def _sd(values: list[float]) -> float:
    return stdev(values) if len(values) > 1 else 0.0
