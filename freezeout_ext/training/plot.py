"""Charts: schedules (the paper's Figure 1), a plan, the curves of a run, a comparison over time and by its cost."""

import textwrap
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING

from ..planner import Plan
from ..schedule import Schedule
from .run_folder import write_atomically
from .summary import curves
from .tables import what_was_trained
from .values import in_percent, judge_of, metric_of, scale

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DOTS_PER_INCH = 150
WIDE = 7  # inches
# By the kind of an arm; its color says which FreezeOut it belongs to.
LINES = {"full": "-", "freezeout": "-", "no-anneal": ":", "cached": "-", "short": "--", "const-time": "-."}
FILLED = ("full", "freezeout", "cached")


def plot_schedules(schedules: dict[str, Schedule], *, base_lr: float = 0.1) -> "Figure":
    """lr_i(step) of every layer, one panel a schedule: the paper's Figure 1."""
    figure, axes = empty_figure(len(schedules), height=3.2)
    for ax, (title, schedule) in zip(axes, schedules.items(), strict=True):
        colors = _layer_colors(figure, ax, schedule.num_layers - 1)
        for i in range(schedule.num_layers):
            # Up to the milestone and not beyond: the curves then end where the layers freeze.
            end = schedule.milestone(i)
            steps = [end * k / 300 for k in range(300)] + [end]
            rates = [base_lr * schedule.lr_factor(i, step) for step in steps]
            ax.plot(steps, rates, color=colors[i], linewidth=1.2)
        ax.set_title(title)
        ax.set_xlim(0, schedule.total_steps)
        ax.set_ylim(bottom=0)
        ax.set_ylabel("learning rate")
    axes[-1].set_xlabel("step")
    return figure


def plot_plan(plan: Plan, title: str) -> "Figure":
    """Top: predicted saving, and its ceiling below, over strategy and t_0. Bottom: forward and backward by layer."""
    scales = list(dict.fromkeys(p.how_scale for p in plan.predictions))
    t_0s = list(dict.fromkeys(p.t_0 for p in plan.predictions))
    found = {(p.how_scale, p.t_0): p for p in plan.predictions}
    figure, (heat, bars) = empty_figure(2, height=3.2)
    savings = [[100 * found[how_scale, t_0].saving for t_0 in t_0s] for how_scale in scales]
    image = heat.imshow(savings, aspect="auto", cmap="viridis", vmin=0)
    middle = max(map(max, savings)) / 2
    for row, how_scale in enumerate(scales):
        for column, t_0 in enumerate(t_0s):
            p = found[how_scale, t_0]
            color = "white" if 100 * p.saving < middle else "black"
            text = f"{100 * p.saving:.1f} %\n(≤ {100 * p.ceiling:.1f})"
            heat.text(column, row, text, ha="center", va="center", color=color, fontsize=8)
    heat.set_xticks(range(len(t_0s)), [f"{t_0:g}" for t_0 in t_0s])
    heat.set_yticks(range(len(scales)), list(map(str, scales)))
    heat.set_xlabel("t_0")
    heat.set_title(f"{title}: predicted saving (≤ were the frozen forward free)")
    figure.colorbar(image, ax=heat, label="saving, %")
    _plot_layers(bars, plan)
    return figure


def _plot_layers(ax, plan: Plan) -> None:
    costs = plan.costs
    factor, unit = (1e3, "ms") if costs.unit == "s" else (1e-6, "MFLOP")
    layers = range(len(costs.layers))
    forward = [factor * value for value in costs.forward]
    ax.bar(layers, forward, label="forward")
    ax.bar(layers, [factor * value for value in costs.backward], bottom=forward, label="backward")
    if costs.unit == "s":
        ax.plot(layers, [factor * value for value in costs.frozen_forward], "k_", label="forward once frozen")
    ax.set_xlabel("layer")
    ax.set_ylabel(f"{unit} a step")
    ax.set_title(costs.source, fontsize=9)
    ax.legend()


def plot_run(rows: list[dict], title: str, *, width: float = 8) -> "Figure":
    """Loss, accuracy, learning rate of each layer, layers frozen and milliseconds per step over a run's epochs."""
    figure, axes = empty_figure(5, height=2.1, width=width, sharex=True)
    loss, accuracy, rates, frozen, time = axes
    epochs = [row["epoch"] for row in rows]
    dot = "o" if len(rows) == 1 else "-"  # a line of one point is none
    metric = metric_of(rows[0])
    factor, _, unit = scale(metric)
    for split in ("train", "val", "test"):
        if f"{split}_loss" in rows[0]:
            loss.plot(epochs, [row[f"{split}_loss"] for row in rows], dot, label=split)
            accuracy.plot(epochs, [factor * row[f"{split}_{metric}"] for row in rows], dot, label=split)
    layers = len(rows[0]["learning_rates"])
    colors = _layer_colors(figure, rates, layers - 1)
    for i in range(layers):
        rates.plot(epochs, [row["learning_rates"][i] for row in rows], dot, color=colors[i], linewidth=1)
    frozen.step(epochs, [row["num_frozen"] for row in rows], dot, where="post", color="black")
    time.plot(epochs, [1000 * row["seconds_per_step"] for row in rows], dot, color="black")
    for ax, label in zip(axes, ("loss", metric + unit, "learning rate", "layers frozen", "ms per step"), strict=True):
        ax.set_ylabel(label)
        ax.grid(alpha=0.3)
    if min(row[name] for row in rows for name in row if name.endswith("_loss")) > 0:
        loss.set_yscale("log")
    for ax in (rates, frozen, time):
        ax.set_ylim(bottom=0)
    loss.legend()
    loss.set_title(title)
    axes[-1].set_xlabel("epoch")
    return figure


def plot_comparison(folder: Path, summary: dict, *, width: float = WIDE) -> "Figure":
    """Top: mean metric over mean training seconds of each arm. Bottom: the last metric over the cost.

    The band is one sd. A tick stands where layers freeze.
    The cost is in seconds over full training's. The dashed line goes through full training on shorter and shorter
    cosines: what does not lie above it does not pay. A solid line joins the t_0 of a strategy, as in the paper.

    Args:
        folder: of the comparison.
        summary: as the folder's compare.json holds it.
        width: in inches; a narrow figure has higher panels and its legend in one column.
    """
    figure, (over_time, by_cost) = empty_figure(2, height=4.6 if width >= WIDE else 5.4, width=width)
    draw_over_time(over_time, curves(folder, summary))
    over_time.set_title(textwrap.fill(what_was_trained(summary["config"]), round(9 * width)), fontsize=10)
    over_time.set_xlabel(
        textwrap.fill("seconds of training; | layers freeze, band: one sd over the seeds", round(10 * width))
    )
    _draw_costs(by_cost, summary)
    return figure


def draw_over_time(ax, curves: dict[str, list[list[dict]]]) -> None:
    """curves: for each arm, the rows of the log of each of its runs."""
    from numpy import interp  # matplotlib has it

    colors, lowest = _arm_colors(curves), []
    metric = metric_of(next(iter(curves.values()))[0][0])
    factor, _, unit = scale(metric)
    for name, runs in curves.items():
        kind, color = name.partition(" ")[0], colors[name]
        epochs = list(zip(*runs, strict=True))
        seconds = [fmean(row["train_seconds"] for row in rows) for rows in epochs]
        values = [[factor * row[f"test_{metric}"] for row in rows] for rows in epochs]
        means = [fmean(v) for v in values]
        spreads = [stdev(v) if len(v) > 1 else 0.0 for v in values]
        label = f"{name}: {means[-1]:.2f}{f' ± {spreads[-1]:.2f}' if len(runs) > 1 else ''}{unit.strip(',')}"
        label += f" in {seconds[-1]:.3g} s"
        ax.plot(seconds, means, color=color, linestyle=LINES[kind], linewidth=1.4, label=label)
        low = [m - s for m, s in zip(means, spreads, strict=True)]
        high = [m + s for m, s in zip(means, spreads, strict=True)]
        ax.fill_between(seconds, low, high, color=color, alpha=0.1, linewidth=0)
        ax.plot(seconds[-1], means[-1], "o", color=color, markersize=5, fillstyle="full" if kind in FILLED else "none")
        steps, frozen = [rows[0]["step"] for rows in epochs], [t["step"] for row in runs[0] for t in row["transitions"]]
        ax.plot(interp(frozen, steps, seconds), interp(frozen, steps, means), "|", color=color, markersize=9)
        lowest.append(means[len(means) // 3])
    if in_percent(metric):
        top = max(ax.dataLim.y1, min(lowest) + 1)
        ax.set_ylim(min(lowest) - 0.3 * (top - min(lowest)), top + 0.03 * (top - min(lowest)))
    ax.set_xlim(left=0)
    ax.set_ylabel(f"test {metric}{unit}")
    _finish(ax)


def _draw_costs(ax, summary: dict) -> None:
    judge, arms = judge_of(summary), summary["arms"]
    metric = judge.removeprefix("test_")
    factor, _, unit = scale(metric)
    full = next((arm for arm in arms if arm["name"] == "full"), arms[0])["train_seconds"]["mean"]
    colors = _arm_colors([arm["name"] for arm in arms])
    lines: dict[tuple, list] = {}
    for arm in arms:
        found = arm[judge]
        cost, mean, error = arm["train_seconds"]["mean"] / full, factor * found["mean"], None
        if found["sd"] is not None:
            error = factor * found["sd"] / found["n"] ** 0.5
        strategy = () if arm["kind"] in ("full", "short") else (arm["kind"], arm["how_scale"])
        lines.setdefault(strategy, []).append((cost, mean))
        style = {"color": colors[arm["name"]], "fillstyle": "full" if arm["kind"] in FILLED else "none"}
        ax.errorbar(cost, mean, error, fmt="o", markersize=6, label=arm["name"], **style)
    for strategy, line in lines.items():
        style = {"color": "gray"} if strategy else {"color": "black", "linestyle": "--"}
        ax.plot(*zip(*sorted(line), strict=True), linewidth=1, zorder=0, **style)
    label = "seconds over full training's; --: full training; bars: standard error"
    ax.set_xlabel(textwrap.fill(label, round(10 * ax.figure.get_figwidth())))
    ax.set_ylabel(f"test {metric}{unit}")
    ax.set_xlim(left=0)
    _finish(ax)


def _finish(ax) -> None:
    ax.grid(alpha=0.3)
    wide = ax.figure.get_figwidth() >= WIDE
    below = -0.16 if wide else -0.2
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, below), fontsize=8, frameon=False, ncols=2 if wide else 1)


def _arm_colors(names: Iterable[str]) -> dict[str, str]:
    """A color for each strategy and t_0; full training is black."""
    variants = {name: name.partition(" ")[2] for name in names if not name.startswith("full")}
    numbers = {variant: k for k, variant in enumerate(dict.fromkeys(variants.values()))}
    return {name: f"C{numbers[variants[name]]}" if name in variants else "black" for name in names}


def save(figure: "Figure", path: str | Path) -> None:
    """Writes the figure to `path` as PNG, whatever the name ends in."""
    write_atomically(Path(path), lambda file: figure.savefig(file, dpi=DOTS_PER_INCH, format="png"))


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


def _layer_colors(figure: "Figure", ax, last: int) -> list:
    """A color for each of the layers 0 .. last, whose bar is drawn beside the axes."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from numpy import arange

    colors = ScalarMappable(Normalize(0, max(last, 1) / 0.92), "viridis")  # its end is too light for lines
    figure.colorbar(colors, ax=ax, label="layer", ticks=sorted({0, last // 2, last}), aspect=12)
    return list(colors.to_rgba(arange(last + 1)))
