"""engagement = measured saving / predicted saving: whether freezing shortened the steps as the layers' times say."""

from collections.abc import Iterable

from ..planner import StepCosts
from .report import milliseconds, table

# Of a step's saving, below which its ratio to a measured one says nothing.
LEAST_PREDICTED = 0.01
# A transition is warned of below this part of its predicted drop, where that stands out of the noise by so many sd.
LEAST_DROP, CLEAR_OF_NOISE = 0.25, 3.0


def engaged(transitions: Iterable[dict], phases: list[dict], costs: StepCosts) -> list[dict]:
    """Each transition with what its phase saves of a step, predicted and measured, and what it alone saved.

    predicted_saving, measured_saving: 1 - step / step with nothing frozen; engagement: measured over predicted.
    predicted_drop, measured_drop: by which part of the whole step this transition shortened it; drop_error: the sd of
    measured_drop that the scatter of the steps leaves. None where no step was measured, and engagement where less than
    a percent is predicted.

    Args:
        transitions: as `transitions_measured` gives them.
        phases: summaries of the run's phases, the first with nothing frozen.
    """
    by_frozen = {phase["num_frozen"]: phase for phase in phases}
    rows, before = [], 0
    whole = by_frozen.get(0, {}).get("seconds_per_step")
    for transition in transitions:
        k = transition["num_frozen"]
        row = {
            **transition,
            "predicted_saving": costs.saving(k),
            "predicted_drop": costs.saving(k) - costs.saving(before),
            **dict.fromkeys(("measured_saving", "measured_drop", "drop_error", "engagement")),
        }
        first, then = by_frozen.get(before, {}), by_frozen.get(k, {})
        seconds = first.get("seconds_per_step"), then.get("seconds_per_step")
        if whole and None not in seconds:
            errors = (first.get("seconds_error") or 0.0, then.get("seconds_error") or 0.0)
            row["measured_saving"] = 1 - seconds[1] / whole
            row["measured_drop"] = (seconds[0] - seconds[1]) / whole
            row["drop_error"] = (errors[0] ** 2 + errors[1] ** 2) ** 0.5 / whole
            if row["predicted_saving"] >= LEAST_PREDICTED:
                row["engagement"] = row["measured_saving"] / row["predicted_saving"]
        rows.append(row)
        before = k
    return rows


def run_savings(phases: list[dict], costs: StepCosts) -> tuple[float, float] | None:
    """(predicted, measured) saving of the run's steps over as many with nothing frozen; None where not measured."""
    timed = [phase for phase in phases if phase["seconds_per_step"]]
    if not timed or timed[0]["num_frozen"]:
        return None
    steps = sum(phase["steps"] for phase in timed)
    predicted = sum(phase["steps"] * costs.saving(phase["num_frozen"]) for phase in timed) / steps
    measured = sum(phase["steps"] * phase["seconds_per_step"] for phase in timed)
    return predicted, 1 - measured / (steps * timed[0]["seconds_per_step"])


def warnings_of(rows: Iterable[dict], costs: StepCosts, config: dict) -> list[str]:
    """One sentence for each transition that did not shorten the step though the noise would have let it be seen."""
    found = []
    for row in rows:
        drop, predicted = row["measured_drop"], row["predicted_drop"]
        if drop is None or predicted <= CLEAR_OF_NOISE * row["drop_error"] or drop >= LEAST_DROP * predicted:
            continue
        found.append(
            f"step {row['step']}: freezing {', '.join(row['layers'])} should have saved {100 * predicted:.1f} % of a"
            f" step and saved {100 * drop:.1f} %. Likely causes: {'; '.join(_causes(costs, config))}."
        )
    return found


def _causes(costs: StepCosts, config: dict) -> list[str]:
    causes = []
    if costs.loader > 0.2 * costs.step(0):
        causes.append(f"the step waits for the loader ({milliseconds(costs.loader)} a batch)")
    if config.get("device") == "cuda" and not config.get("graph"):
        causes.append("the device waits for the host that launches kernels (try --graph, or a larger batch)")
    if config.get("compile"):
        causes.append("compiled blocks recompiled, or fell back to eager mode (see the count of recompilations)")
    if config.get("prefix") not in (None, "exact"):
        causes.append(f"the frozen layers run slower as prefix={config['prefix']}")
    causes += [
        "other work on this machine",
        "something keeps the frozen layers in the graph (inputs that require grad, tied parameters, hooks)",
    ]
    return causes


def engagement_rows(rows: list[dict], num_layers: int) -> list[tuple[str, ...]]:
    """Predicted beside measured, header first, one row a transition."""
    cells = [("step", "layers frozen", "ms/step before -> after", "saved, predicted", "measured", "engagement")]
    for row in rows:
        before, after = row["seconds_per_step_before"], row["seconds_per_step_after"]
        cells.append(
            (
                str(row["step"]),
                f"{row['num_frozen']} of {num_layers}",
                " -> ".join("-" if value is None else f"{1000 * value:.2f}" for value in (before, after)),
                _percent(row["predicted_saving"]),
                _percent(row["measured_saving"]),
                "-" if row["engagement"] is None else f"{row['engagement']:.2f}",
            )
        )
    return cells


def engagement_text(result: dict) -> str:
    """The table, the run's own line and the warnings, from a result (or an arm of a comparison) that holds them."""
    found = result.get("engagement")
    if not found or not result["transitions"]:
        return ""
    lines = [
        "saved of a step with nothing frozen, predicted from the layers' costs and measured in this run",
        table(engagement_rows(result["transitions"], found["num_layers"])),
        f"costs: {found['source']}",
    ]
    if found["measured"] is not None:
        lines.append(
            f"all steps: predicted saving {_percent(found['predicted'])}, measured {_percent(found['measured'])}"
            + (f", engagement {found['measured'] / found['predicted']:.2f}" if found["predicted"] > 0 else "")
        )
    return "\n".join(lines + [f"warning: {text}" for text in found["warnings"]])


def with_engagement(result: dict, costs: StepCosts, config: dict) -> dict:
    """`result` (a run's, or an arm's of a comparison) with its transitions engaged, and a summary as "engagement"."""
    rows = engaged(result["transitions"], result["phases"], costs)
    predicted, measured = run_savings(result["phases"], costs) or (None, None)
    return {
        **result,
        "transitions": rows,
        "engagement": {
            "predicted": predicted,
            "measured": measured,
            "num_layers": len(costs.layers),
            "source": costs.source,
            "unit": costs.unit,
            "warnings": warnings_of(rows, costs, config),
        },
    }


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"
