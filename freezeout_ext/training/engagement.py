"""engagement = measured saving / predicted saving: whether freezing shortened the steps as the layers' times say."""

from collections.abc import Iterable, Sequence
from math import hypot
from statistics import fmean, stdev

from ..planner import StepCosts

# A saving or a drop is told from noise where it is so many standard deviations.
CLEAR_OF_NOISE = 3.0
# A transition is warned of below this part of its predicted drop.
LEAST_DROP = 0.25


def engaged(transitions: Iterable[dict], phases: list[dict], costs: StepCosts) -> list[dict]:
    """Each transition with what its phase saves of a step, predicted and measured, and what it alone saved.

    predicted_saving: 1 - step / step with nothing frozen, from the layers' times.
    measured_saving: the same, from the run's steps.
    engagement: measured over predicted, see `judged`.
    predicted_drop: by which part of the whole step this transition should have shortened the step.
    measured_drop: by which part it has.
    predicted_error, measured_error, drop_error: the sd that the scatter of the rounds, or of the steps, leaves.

    A value is None where no step was measured. Steps are of CPU time where that is known, as in `measure_costs`.

    Args:
        transitions: as `transitions_measured` gives them.
        phases: summaries of the run's phases, the first with nothing frozen.
    """
    begins = {phase["first_step"]: k for k, phase in enumerate(phases)}
    rows, before = [], 0
    whole, whole_error = _timed(next((phase for phase in phases if not phase["num_frozen"]), None))
    for transition in transitions:
        k, place = transition["num_frozen"], begins.get(transition["step"])
        first, first_error = _timed(phases[place - 1] if place else None)
        then, then_error = _timed(None if place is None else phases[place])
        row = {
            **transition,
            "predicted_saving": costs.saving(k),
            "predicted_error": costs.saving_error[k] if costs.saving_error else None,
            "predicted_drop": costs.saving(k) - costs.saving(before),
            **dict.fromkeys(("measured_saving", "measured_error", "measured_drop", "drop_error")),
        }
        if whole is not None and then is not None:
            row["measured_saving"] = 1 - then / whole
            if then_error is not None and whole_error is not None:
                row["measured_error"] = hypot(then_error, whole_error * then / whole) / whole
            if first is not None:
                row["measured_drop"] = (first - then) / whole
            if first_error is not None and then_error is not None:
                row["drop_error"] = hypot(first_error, then_error) / whole
        rows.append(judged(row))
        before = k
    return rows


def judged(row: dict) -> dict:
    """`row` with engagement = measured_saving / predicted_saving and its sd, engagement_error.

    Both are None where too few steps were measured to know their scatter, or where the predicted saving lies within the
    noise of either: a ratio of two numbers that may be 0 says nothing.
    A predicted_error of None counts as 0: FLOP were counted, or one round was measured.
    """
    measured, predicted = row["measured_saving"], row["predicted_saving"]
    errors = row["measured_error"], row["predicted_error"] or 0.0
    ratio = error = None
    if None not in (measured, errors[0], predicted) and predicted > max(0.0, CLEAR_OF_NOISE * hypot(*errors)):
        ratio = measured / predicted
        error = hypot(errors[0], ratio * errors[1]) / predicted
    return {**row, "engagement": ratio, "engagement_error": error}


def over_runs(rows_of_runs: Sequence[list[dict]]) -> list[dict]:
    """The rows of an arm: savings and drops are means over its runs, and their errors those of the means.

    An error is from the scatter of the runs, which alone shows the machine's drift between two phases. The scatter of
    two or three runs may be small by chance: where the steps within the runs say more, the error is theirs.
    """
    n = len(rows_of_runs)
    merged = []
    for rows in zip(*rows_of_runs, strict=True):
        row = dict(rows[0])
        for value, error in (("measured_saving", "measured_error"), ("measured_drop", "drop_error")):
            values = [r.get(value) for r in rows]
            if None in values:
                row[value] = row[error] = None
            elif n > 1:
                within = fmean((r[error] or 0.0) ** 2 for r in rows) ** 0.5
                row[value], row[error] = fmean(values), max(stdev(values), within) / n**0.5
        merged.append(judged(row))
    return merged


def whole_run(phases: list[dict], costs: StepCosts) -> dict:
    """What all steps of a run save over as many with nothing frozen, as a row of `judged`."""
    timed = [(phase["num_frozen"], phase["steps"], *_timed(phase)) for phase in phases if phase["seconds_per_step"]]
    row = dict.fromkeys(("predicted_saving", "predicted_error", "measured_saving", "measured_error"))
    if not timed or timed[0][0]:
        return {**row, "engagement": None, "engagement_error": None}
    total = sum(steps for _, steps, _, _ in timed)
    (_, first_steps, whole, whole_error), *later = timed
    seconds = sum(steps * each for _, steps, each, _ in later)
    row["predicted_saving"] = sum(steps * costs.saving(k) for k, steps, _, _ in timed) / total
    row["measured_saving"] = 1 - (first_steps + seconds / whole) / total
    if costs.saving_error:  # rounds that err in one phase err in the next: their errors add up
        row["predicted_error"] = sum(steps * costs.saving_error[k] for k, steps, _, _ in timed) / total
    if whole_error is not None:
        own = hypot(*(steps * (error or 0.0) for _, steps, _, error in later))
        row["measured_error"] = hypot(own, seconds * whole_error / whole) / (total * whole)
    return judged(row)


def warnings_of(rows: Iterable[dict], costs: StepCosts, config: dict) -> list[str]:
    """One sentence for each transition that did not shorten the step though the noise would have let it be seen."""
    found = []
    for row in rows:
        drop, predicted = row["measured_drop"], row["predicted_drop"]
        if (
            None in (drop, row["drop_error"])
            or predicted <= CLEAR_OF_NOISE * row["drop_error"]
            or drop >= LEAST_DROP * predicted
        ):
            continue
        found.append(
            f"step {row['step']}: freezing {', '.join(row['layers'])} should have saved {100 * predicted:.1f} % of a"
            f" step and saved {100 * drop:.1f} %. Likely causes: {'; '.join(_causes(costs, config))}."
        )
    return found


def _causes(costs: StepCosts, config: dict) -> list[str]:
    causes = []
    if costs.loader > 0.2 * costs.step(0):
        causes.append(f"the step waits for the loader ({1e3 * costs.loader:.2f} ms a batch)")
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


def with_engagement(result: dict, costs: StepCosts, config: dict, runs: Sequence[dict] = ()) -> dict:
    """`result` with its transitions engaged, and what holds for the whole of it as "engagement".

    Args:
        runs: results with engagement, where `result` is an arm's over them.
    """
    if runs:
        rows = over_runs([run["transitions"] for run in runs])
        (whole,) = over_runs([[run["engagement"]["whole_run"]] for run in runs])
    else:
        rows, whole = engaged(result["transitions"], result["phases"], costs), whole_run(result["phases"], costs)
    clock = "CPU time" if result["phases"][0].get("cpu_seconds_per_step") else "time"
    found = {"whole_run": whole, "source": costs.source, "unit": costs.unit, "clock": clock}
    return {**result, "transitions": rows, "engagement": found | {"warnings": warnings_of(rows, costs, config)}}


def _timed(phase: dict | None) -> tuple[float | None, float | None]:
    """(seconds a step, their sd) of a phase, CPU time where that is known. The phase may not exist or be untimed."""
    phase = phase or {}
    clock = "cpu_seconds" if phase.get("cpu_seconds_per_step") else "seconds"
    return phase.get(f"{clock}_per_step"), phase.get(f"{clock}_error")
