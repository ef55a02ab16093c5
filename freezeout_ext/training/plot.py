"""Charts as PNG: the schedules of the paper's Figure 1, the curves of a run, accuracy over time of a comparison."""

from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING

from ..schedule import Schedule

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DOTS_PER_INCH = 150


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
    figure, (ax,) = empty_figure(1, height=4.5)
    from matplotlib import colormaps

    colors = colormaps["tab10"]
    lowest = []
    for k, (name, runs) in enumerate(curves.items()):
        epochs = list(zip(*runs, strict=True))
        seconds = [fmean(row["train_seconds"] for row in rows) for rows in epochs]
        values = [[100 * row["test_accuracy"] for row in rows] for rows in epochs]
        means = [fmean(v) for v in values]
        spreads = [_sd(v) for v in values]
        ax.plot(seconds, means, color=colors(k), label=f"{name}: {means[-1]:.2f} % in {seconds[-1]:.3g} s")
        low = [m - s for m, s in zip(means, spreads, strict=True)]
        high = [m + s for m, s in zip(means, spreads, strict=True)]
        ax.fill_between(seconds, low, high, color=colors(k), alpha=0.15, linewidth=0)
        ax.plot(seconds[-1], means[-1], "o", color=colors(k), markersize=5)
        freezes = [j for j, rows in enumerate(epochs) if rows[0]["transitions"]]
        ax.plot([seconds[j] for j in freezes], [means[j] for j in freezes], "|", color=colors(k), markersize=11)
        lowest.append(means[len(means) // 3])
    top = max(ax.dataLim.y1, min(lowest) + 1)
    ax.set_ylim(min(lowest) - 0.3 * (top - min(lowest)), top + 0.03 * (top - min(lowest)))
    ax.set_xlim(left=0)
    ax.set_xlabel("seconds of training (| layers freeze)")
    ax.set_ylabel("test accuracy, %")
    ax.set_title(title)
    ax.grid(alpha=0.3)
    ax.legend(loc="lower right")
    return figure


def save(figure: "Figure", path: str | Path) -> None:
    figure.savefig(path, dpi=DOTS_PER_INCH)


def empty_figure(rows: int, *, height: float, sharex: bool = False) -> tuple["Figure", list]:
    """A figure with `rows` axes below each other, and these."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("charts need matplotlib: pip install 'freezeout_ext[train]'") from None
    figure = Figure(figsize=(8, height * rows), layout="constrained")
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
