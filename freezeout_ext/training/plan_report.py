"""A plan as a chart: the saving of every strategy and t_0 as a heat map, and where a step's time goes."""

from typing import TYPE_CHECKING

from ..planner import Plan

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_plan(plan: Plan, title: str) -> "Figure":
    """Top: predicted saving, and its ceiling below, over strategy and t_0. Bottom: forward and backward by layer."""
    from .plot import empty_figure

    scales = list(dict.fromkeys(p.how_scale for p in plan.predictions))
    t_0s = list(dict.fromkeys(p.t_0 for p in plan.predictions))
    found = {(p.how_scale, p.t_0): p for p in plan.predictions}
    figure, (heat, bars) = empty_figure(2, height=3.2)
    savings = [[100 * found[scale, t_0].saving for t_0 in t_0s] for scale in scales]
    image = heat.imshow(savings, aspect="auto", cmap="viridis", vmin=0)
    middle = max(map(max, savings)) / 2
    for row, scale in enumerate(scales):
        for column, t_0 in enumerate(t_0s):
            p = found[scale, t_0]
            color = "white" if 100 * p.saving < middle else "black"
            text = f"{100 * p.saving:.1f} %\n(≤ {100 * p.ceiling:.1f})"
            heat.text(column, row, text, ha="center", va="center", color=color, fontsize=8)
    heat.set_xticks(range(len(t_0s)), [f"{t_0:g}" for t_0 in t_0s])
    heat.set_yticks(range(len(scales)), [str(scale) for scale in scales])
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
