"""Tables of bench_finetune.py's rows: each arm against full training and against the shortened cosine of its cost."""

import json
import math
import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean, stdev

import numpy as np
from finetune_arms import ARMS, PAIRS, Arm
from scipy import stats

COLUMNS = ("experiment", "arm", "seed", "accuracy", "loss", "steps", "full_steps", "cpu_seconds", "full_step_seconds")
MIB = 2**20


def write(path: Path, rows: Sequence[dict]) -> None:
    """What was measured and under what conditions, one line a run."""
    conditions = list({json.dumps(row["conditions"], sort_keys=True): row["conditions"] for row in rows}.values())
    kept = [
        {name: _rounded(row[name]) for name in (*COLUMNS, "memory_bytes")}
        | {"cache": row.get("cache"), "conditions": conditions.index(row["conditions"])}
        for row in _in_order(rows)
    ]
    lines = ",\n".join(json.dumps(row) for row in kept)
    data = json.dumps({row["experiment"]: row["data"] for row in rows}, indent=1)
    scratch = path.with_suffix(".tmp")
    scratch.write_text(
        f'{{"data": {data},\n"conditions": {json.dumps(conditions, indent=1)},\n"rows": [\n{lines}\n]}}\n'
    )
    os.replace(scratch, path)


def tables(rows: Sequence[dict]) -> str:
    found: dict[str, dict[str, dict[int, dict]]] = defaultdict(lambda: defaultdict(dict))
    for row in _in_order(rows):
        found[row["experiment"]][row["arm"]][row["seed"]] = row
    return "\n\n".join(f"### {name}\n\n{_table(name, arms)}\n\n{_pairs(name, arms)}" for name, arms in found.items())


def _table(experiment: str, runs: dict[str, dict[int, dict]]) -> str:
    arms = ARMS[experiment]
    rivals = [runs[name] for name in runs if arms[name].is_rival]
    full = next((each for name, each in runs.items() if arms[name] == Arm()), {})
    # What full training of length 1 took, batches and scheduler included.
    unit = fmean(row["full_steps"] for row in full.values())
    quiet = min(row["full_step_seconds"] for each in runs.values() for row in each.values())
    head = f"Cost 1: {unit * quiet:.1f} CPU seconds, at {1e3 * quiet:.1f} ms for a full training step.\n\n"
    lines = [
        "| | n | accuracy, % | test loss | cost | CPU s | over full | ahead at equal cost | in loss | MiB | kept MiB |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, each in runs.items():
        values = list(each.values())
        cost = fmean(row["full_steps"] for row in values)
        cells = [
            name,
            len(values),
            _spread([row["accuracy"] for row in values], 2),
            _spread([row["loss"] for row in values], 3),
            f"{cost / unit:.2f}",
            f"{cost * quiet:.1f}",
            ""
            if each is full
            else _difference([r["accuracy"] - full[s]["accuracy"] for s, r in each.items() if s in full]),
            "" if arms[name].is_rival else _ahead(each, rivals, "accuracy"),
            "" if arms[name].is_rival else _ahead(each, rivals, "loss"),
            f"{max(row['memory_bytes'] for row in values) / MIB:.1f}",
            f"{max(row['cache']['bytes'] for row in values) / MIB:.1f}" if "cache" in values[0] else "",
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return head + "\n".join(lines)


def _pairs(experiment: str, runs: dict[str, dict[int, dict]]) -> str:
    lines = ["| | n | accuracy | test loss | cost, ratio |", "|---|---|---|---|---|"]
    for a, b in PAIRS[experiment]:
        ours, theirs = runs.get(a, {}), runs.get(b, {})
        both = ours.keys() & theirs.keys()
        if not both:
            continue
        ratio = fmean(ours[seed]["full_steps"] / theirs[seed]["full_steps"] for seed in both)
        accuracy = _difference(_pairwise(ours, theirs, "accuracy"))
        loss = _difference(_pairwise(ours, theirs, "loss"), 3)
        lines.append(f"| {a}, over {b} | {len(both)} | {accuracy} | {loss} | {ratio:.2f} |")
    return "\n".join(lines) if len(lines) > 2 else ""


def _pairwise(each: dict[int, dict], other: dict[int, dict], what: str) -> list[float]:
    return [row[what] - other[seed][what] for seed, row in each.items() if seed in other]


def rival_at(cost: float, seed: int, rivals: Iterable[dict[int, dict]], what: str) -> tuple[float, str] | None:
    """What full training reaches at `cost`: interpolated between its runs of that seed, linear in log(cost).

    Below the cheapest run's cost, and above the dearest one's, the value is that run's own, and is marked.
    """
    points = sorted((each[seed]["full_steps"], each[seed][what]) for each in rivals if seed in each)
    if len(points) < 2:
        return None
    costs, values = zip(*points, strict=True)
    mark = "cheapest" if cost <= costs[0] else "dearest" if cost > costs[-1] else ""
    return float(np.interp(math.log(cost), np.log(costs), values)), mark


def _ahead(each: dict[int, dict], rivals: list[dict[int, dict]], what: str) -> str:
    found = {seed: rival_at(row["full_steps"], seed, rivals, what) for seed, row in each.items()}
    differences = [each[seed][what] - there[0] for seed, there in found.items() if there is not None]
    marks = {there[1] for there in found.values() if there is not None} - {""}
    note = f" (over the {' or '.join(sorted(marks))})" if marks else ""
    return _difference(differences, 2 if what == "accuracy" else 3) + note if differences else ""


def _difference(values: Sequence[float], digits: int = 2) -> str:
    if len(values) < 2:
        return f"{values[0]:+.{digits}f}" if values else ""
    error = stdev(values) / math.sqrt(len(values))
    if error == 0:
        return f"{fmean(values):+.{digits}f}"
    p = stats.ttest_1samp(values, 0).pvalue
    return f"{fmean(values):+.{digits}f} ± {error:.{digits}f} (p {'< 0.001' if p < 0.001 else f'{p:.2g}'})"


def _spread(values: Sequence[float], digits: int) -> str:
    return f"{fmean(values):.{digits}f}" + (f" ± {stdev(values):.{digits}f}" if len(values) > 1 else "")


def _in_order(rows: Sequence[dict]) -> list[dict]:
    experiments = list(ARMS)
    known = [row for row in rows if row["arm"] in ARMS[row["experiment"]]]
    return sorted(
        known,
        key=lambda row: (
            experiments.index(row["experiment"]),
            list(ARMS[row["experiment"]]).index(row["arm"]),
            row["seed"],
        ),
    )


def _rounded(value: object) -> object:
    """Floats rounded to six digits. No value is known better than that."""
    return float(f"{value:.6g}") if isinstance(value, float) else value
