"""What the runs of a comparison's arms say together: means, paired differences, when a value was reached, who won."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean, median, stdev

from .arms import Arm
from .run_folder import RunFolder
from .values import judge_of, metric_text, points_text

# A difference that chance makes less often than this has a winner.
CLEAR = 0.05


def undisturbed_seconds(result: dict) -> float:
    """train_seconds; where one CPU thread did all the work, what they would be with no other program on the machine.

    The compiler of a compiled run works elsewhere, so such a run has its train_seconds.
    """
    # Steps that fill a cache are not like those that read from it: their median is not their sum.
    name = "cpu_seconds_per_step_mean" if result.get("features") else "cpu_seconds_per_step"
    cpu = [phase.get(name) for phase in result["phases"]]
    if None in cpu or result["graphs_compiled"]:
        return result["train_seconds"]
    return sum(phase["steps"] * seconds for phase, seconds in zip(result["phases"], cpu, strict=True))


def arm_summary(arm: Arm, results: dict[Arm, dict[int, dict]], judge: str, sign: int) -> dict:
    runs, full = results[arm], results.get(Arm("full"))
    first = next(iter(runs.values()))
    shown = list(dict.fromkeys((judge, "test_loss", "train_loss", "train_seconds")))
    summary = {
        "name": arm.name,
        "kind": arm.kind,
        "t_0": arm.t_0,
        "how_scale": arm.how_scale,
        "total_steps": first["total_steps"],
        "num_layers": len(first["layers"]),
        "graphs_compiled": first["graphs_compiled"],
        judge: spread([run[judge] for run in runs.values()]),
        "train_seconds": spread([run["train_seconds"] for run in runs.values()]),
        "peak_memory_bytes": max(run["peak_memory_bytes"] for run in runs.values()),
        "phases": _over_runs([run["phases"] for run in runs.values()]),
        "transitions": first["transitions"],
        "features": first.get("features"),
        "runs": [{"seed": seed, **{name: run[name] for name in shown}} for seed, run in runs.items()],
    }
    if full is not None and arm != Arm("full"):
        gains = [run[judge] - full[seed][judge] for seed, run in runs.items()]
        summary["accuracy_over_full"] = spread(gains)
        summary["accuracy_over_full_test"] = paired_test(gains)
        ratios = [run["train_seconds"] / full[seed]["train_seconds"] for seed, run in runs.items()]
        summary["seconds_over_full"] = spread(ratios)
    if arm.rival is not None and (rival := results.get(arm.rival)) is not None:
        gains = [sign * (run[judge] - rival[seed][judge]) for seed, run in runs.items()]
        seconds = fmean(run["train_seconds"] for run in rival.values())
        summary["ahead_of_rival"] = lead_over(arm.rival.name, gains, seconds)
    return summary


def lead_over(rival: str, gains: Sequence[float], seconds: float) -> dict:
    """How far something is ahead of its rival: the gains are over the rival's run of the same seed."""
    return {"rival": rival, **spread(gains), "test": paired_test(gains), "seconds": seconds}


def paired_test(differences: Sequence[float]) -> dict | None:
    """Student's t-test of the mean of differences between runs of equal seeds: p two-sided, a 95 % interval.

    None for fewer than two differences. Where all are equal their scatter is unknown, and the interval, t and p are
    None. Accuracies are counted in whole samples: this happens by chance.
    """
    n = len(differences)
    if n < 2:
        return None
    mean = fmean(differences)
    found = {"mean": mean, "low": None, "high": None, "t": None, "p": None, "n": n}
    if stdev(differences) > 0:
        try:
            from scipy.stats import ttest_1samp
        except ImportError:
            raise ValueError("compare needs scipy: pip install 'freezeout_ext[train]'") from None
        test = ttest_1samp(differences, 0.0)
        low, high = test.confidence_interval(0.95)
        found |= {"low": float(low), "high": float(high), "t": float(test.statistic), "p": float(test.pvalue)}
    return found


def run_folder(out: Path, arm_name: str, seed: int) -> RunFolder:
    return RunFolder(out / "runs" / arm_name.replace(" ", "-") / f"seed-{seed}")


def curves(out: Path, summary: dict) -> dict[str, list[list[dict]]]:
    """For each arm of compare.json the log of each run."""
    return {
        arm["name"]: [run_folder(out, arm["name"], seed).read_log() for seed in summary["seeds"]]
        for arm in summary["arms"]
    }


def spread(values: Sequence[float]) -> dict:
    """mean, sd (n - 1; None for n = 1) and n."""
    return {"mean": fmean(values), "sd": stdev(values) if len(values) > 1 else None, "n": len(values)}


def time_to_metric(logs: Iterable[list[dict]], judge: str, sign: int, value: float) -> dict:
    """The training seconds until `judge` was as good as `value` at an epoch's end, over the runs that got there.

    Args:
        sign: -1 where lower is better.
    """
    first = []
    for rows in logs:
        reached = [row["train_seconds"] for row in rows if sign * row[judge] >= sign * value]
        first += reached[:1]
    return {"accuracy": value, "reached": len(first), "seconds": spread(first) if first else None}


def _over_runs(rows_of_runs: list[list[dict]]) -> list[dict]:
    """Rows that are the same in all runs but for what was measured: there the median over the runs."""
    merged = []
    for rows in zip(*rows_of_runs, strict=True):
        row = dict(rows[0])
        for name in row:
            if "seconds" in name:
                values = [r[name] for r in rows if r[name] is not None]
                row[name] = median(values) if values else None
        merged.append(row)
    return merged


def verdict(summary: dict) -> str:
    """Who won, in one sentence: the freezing arm that is most ahead of full training at equal seconds, or not ahead.

    With several such arms the chance that one of them is ahead by accident is as many times larger. So p is multiplied
    by their number (Bonferroni).
    """
    judge = judge_of(summary)
    metric = judge.removeprefix("test_")
    rated = [arm for arm in summary["arms"] if "ahead_of_rival" in arm]
    if not rated:
        higher = summary["metric"]["higher_is_better"] if "metric" in summary else True
        best = max(summary["arms"], key=lambda arm: arm[judge]["mean"] if higher else -arm[judge]["mean"])
        return (
            f"Nobody won: no arm stood against a cosine shortened to its own seconds. Best test {metric}:"
            f" {metric_text(metric, best[judge]['mean'])}, {best['name']}."
        )
    arm = max(rated, key=lambda each: each["ahead_of_rival"]["mean"])
    return sentence(arm["name"], arm["train_seconds"]["mean"], arm["ahead_of_rival"], metric, len(rated))


def sentence(name: str, seconds: float, lead: dict, metric: str, arms: int = 1) -> str:
    """Who won, in one sentence.

    Args:
        name: of what is ahead, or behind.
        seconds: that it took.
        lead: over its rival, see `summary.lead_over`.
        metric: its name.
        arms: how many stood each against a rival of its own.
    """
    times, n = f"{seconds:.1f} s against {lead['seconds']:.1f} s", lead["n"]
    by = points_text(metric, abs(lead["mean"]))
    if lead["sd"] is None:
        return (
            f"Nobody won: one seed shows no winner. {name} ended {by} {_side(lead)} {lead['rival']} ({times});"
            " take --seeds 5."
        )
    if lead["test"]["p"] is None:
        return f"Nobody won: all {n} seeds show {name} {by} {_side(lead)} {lead['rival']}, without a scatter."
    p = min(1.0, lead["test"]["p"] * arms)
    several = f", p times {arms} for as many arms" if arms > 1 else ""
    error = points_text(metric, lead["sd"] / n**0.5)
    how_sure = f"(standard error {error}, p = {p:.2g}, n = {n}{several}; {times})"
    if p >= CLEAR:
        return f"Nobody won: {name} ended {by} {_side(lead)} {lead['rival']}, within the noise {how_sure}."
    if lead["mean"] > 0:
        return f"{name} won: at equal seconds it is {by} ahead of {lead['rival']} {how_sure}."
    return f"Full training won: shortened to equal seconds, {lead['rival']} is {by} ahead of {name} {how_sure}."


def _side(lead: dict) -> str:
    return "ahead of" if lead["mean"] >= 0 else "behind"
