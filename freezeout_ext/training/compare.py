"""freezeout compare: the same net and seeds, trained in several ways; accuracy, seconds and bytes side by side."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, median, stdev

import torch

from ..planner import StepCosts
from .checkpoint import RunFolder, check_empty, make_folder, write_json
from .config import TrainConfig, faults_of_input
from .costing import kept_costs
from .data import DataSplits, load_data
from .engagement import with_engagement
from .loop import Run
from .measure import conditions
from .paired import paired_test
from .report import Reporter
from .trainer import Trainer

# short: full training on a cosine as long as FreezeOut's seconds; const-time: FreezeOut as long as full training's.
KINDS = ("full", "freezeout", "no-anneal", "short", "const-time")
MATCHED = ("short", "const-time")
WARMUP_STEPS = 20


@dataclass(frozen=True)
class Arm:
    """One way to train. t_0 and how_scale name the FreezeOut that it is, or whose seconds it is matched to."""

    kind: str
    t_0: float | None = None
    how_scale: str | float | None = None

    @property
    def name(self) -> str:
        return self.kind if self.kind == "full" else f"{self.kind} {self.how_scale} {self.t_0:g}"

    @property
    def freezes(self) -> bool:
        return self.kind not in ("full", "short")

    @property
    def is_matched(self) -> bool:
        return self.kind in MATCHED

    def config(self, base: TrainConfig, seed: int, steps: int | None = None) -> TrainConfig:
        """The config of this arm's run; `steps` is the length of a matched arm."""
        method = {"short": "full", "const-time": "freezeout"}.get(self.kind, self.kind)
        config = replace(base, method=method, seed=seed, steps=steps or base.steps)
        if method != "full":
            config = replace(config, t_0=self.t_0, how_scale=self.how_scale)
        return config.resolved()


def make_arms(kinds: Iterable[str], t_0s: Iterable[float], how_scales: Iterable[str | float]) -> list[Arm]:
    """The arms of `kinds`, one for each (how_scale, t_0); what a matched arm is matched to is added."""
    kinds = list(dict.fromkeys(kinds))
    for kind in kinds:
        if kind not in KINDS:
            raise ValueError(f"arms must be of {', '.join(KINDS)}, got {kind!r}")
    if any(kind in MATCHED for kind in kinds):
        kinds += ["full", "freezeout"]
    variants = list(dict.fromkeys((t_0, how_scale) for how_scale in how_scales for t_0 in t_0s))
    arms = []
    for kind in KINDS:
        if kind in kinds:
            arms += [Arm(kind)] if kind == "full" else [Arm(kind, *variant) for variant in variants]
    return arms


class Comparison:
    """The runs of all arms and seeds in one folder, OUT/runs/ARM/seed-SEED, and what they say together.

    Runs are sequential, seed by seed, in alternating order, so that what slows the machine slows all arms. The matched
    arms come after the others, whose seconds (see `undisturbed_seconds`) decide their length. With `resume` finished
    runs are kept and an unfinished one goes on.

    Args:
        accuracies: of the test split, in (0, 1], whose first time is reported; none: a point below full training's
            last, or below the worst arm's where there is no full training.

    Raises:
        BadInput: one sentence on what is wrong with the input; nothing was written.
    """

    @faults_of_input()
    def __init__(
        self,
        base: TrainConfig,
        out: str | Path,
        *,
        arms: Sequence[Arm],
        seeds: Sequence[int],
        resume: bool = False,
        data_dir: str | Path | None = None,
        download: bool = False,
        accuracies: Sequence[float] = (),
    ) -> None:
        for accuracy in accuracies:
            if not 0 < accuracy <= 1:
                raise ValueError(f"accuracies must be in (0, 1], got {accuracy}")
        self.accuracies = list(accuracies)
        self.base, self.out, self.arms, self.seeds = base.resolved(), Path(out), list(arms), list(seeds)
        if not resume or RunFolder(self.out).holds_run():
            check_empty(self.out)
        self.data: DataSplits = load_data(self.base.data, data_dir, download=download, device=self.base.device)
        for arm in self.arms:
            Trainer(arm.config(self.base, self.seeds[0]), self.data)
        make_folder(self.out)

    def run(self, make_reporter: Callable[[str], Reporter], say: Callable[[str], None] = print) -> dict:
        """Trains what is not trained yet and writes compare.json; make_reporter(title) makes one run's reporter."""
        measured = [arm for arm in self.arms if not arm.is_matched]
        matched = [arm for arm in self.arms if arm.is_matched]
        results: dict[Arm, dict[int, dict]] = {arm: {} for arm in self.arms}
        if not all(self._folder(arm, seed).result_path.exists() for arm in self.arms for seed in self.seeds):
            self._warm_up()
        freezes = any(arm.freezes for arm in self.arms)
        runs = len(self.arms) * len(self.seeds)
        costs = kept_costs(self.out / "costs.json", self.base, self.data, runs=runs) if freezes else None
        for stage in (measured, matched):
            steps = {arm: self._matched_steps(arm, results) for arm in stage}
            for k, seed in enumerate(self.seeds):
                for arm in stage if k % 2 == 0 else reversed(stage):
                    title = f"{arm.name}, seed {seed}"
                    results[arm][seed] = self._run_one(arm, seed, steps[arm], costs, make_reporter(title))
                    say(
                        f"{title}: {100 * results[arm][seed]['test_accuracy']:.2f} % in"
                        f" {results[arm][seed]['train_seconds']:.1f} s"
                    )
        summary = self._summary(results, costs)
        write_json(self.out / "compare.json", summary)
        return summary

    def _folder(self, arm: Arm, seed: int) -> RunFolder:
        return run_folder(self.out, arm.name, seed)

    def _run_one(self, arm: Arm, seed: int, steps: int | None, costs: StepCosts | None, reporter: Reporter) -> dict:
        config, folder = arm.config(self.base, seed, steps), self._folder(arm, seed)
        result = folder.load_result()
        if result is not None and result["config"] == config.to_dict():
            return result
        run = Run.prepare(config, folder.path, resume=True, data=self.data)
        try:
            return run.train(reporter, costs if arm.freezes else None)
        finally:
            reporter.close()

    def _warm_up(self) -> None:
        """Some steps that do not count: the first run must not pay for what the process does once."""
        Trainer(replace(self.base, method="full", steps=WARMUP_STEPS), self.data).train_epoch()

    def _matched_steps(self, arm: Arm, results: dict[Arm, dict[int, dict]]) -> int | None:
        """How many steps a matched arm takes; what an earlier call decided stays."""
        if not arm.is_matched:
            return None
        for seed in self.seeds:
            folder = self._folder(arm, seed)
            if folder.holds_run():
                return folder.load_config().steps
        full, freezeout = results[Arm("full")], results[Arm("freezeout", arm.t_0, arm.how_scale)]
        ratio = median(undisturbed_seconds(freezeout[s]) / undisturbed_seconds(full[s]) for s in self.seeds)
        total = full[self.seeds[0]]["total_steps"]
        return max(1, round(total * ratio if arm.kind == "short" else total / ratio))

    def _summary(self, results: dict[Arm, dict[int, dict]], costs: StepCosts | None) -> dict:
        full = results.get(Arm("full"))
        arms = [_arm_summary(arm, results[arm], full) for arm in self.arms]
        arms = [
            with_engagement(summary, costs, self.base.to_dict(), list(results[arm].values()))
            if arm.freezes
            else summary
            for arm, summary in zip(self.arms, arms, strict=True)
        ]
        reference = arms[:1] if full else arms
        accuracies = self.accuracies or [min(arm["test_accuracy"]["mean"] for arm in reference) - 0.01]
        for summary in arms:
            logs = [run_folder(self.out, summary["name"], seed).read_log() for seed in self.seeds]
            summary["time_to_accuracy"] = [time_to_accuracy(logs, accuracy) for accuracy in accuracies]
        return {
            "config": self.base.to_dict(),
            "seeds": self.seeds,
            "conditions": conditions(torch.device(self.base.device)),
            "memory_measured": results[self.arms[0]][self.seeds[0]]["memory_measured"],
            "arms": arms,
        }


def undisturbed_seconds(result: dict) -> float:
    """train_seconds; where one CPU thread did all the work, what they would be with no other program on the machine.

    Not of a compiled run, whose compiler works elsewhere.
    """
    cpu = [phase.get("cpu_seconds_per_step") for phase in result["phases"]]
    if None in cpu or result["graphs_compiled"]:
        return result["train_seconds"]
    return sum(phase["steps"] * seconds for phase, seconds in zip(result["phases"], cpu, strict=True))


def _arm_summary(arm: Arm, runs: dict[int, dict], full: dict[int, dict] | None) -> dict:
    first = next(iter(runs.values()))
    summary = {
        "name": arm.name,
        "kind": arm.kind,
        "t_0": arm.t_0,
        "how_scale": arm.how_scale,
        "total_steps": first["total_steps"],
        "num_layers": len(first["layers"]),
        "graphs_compiled": first["graphs_compiled"],
        "test_accuracy": spread([run["test_accuracy"] for run in runs.values()]),
        "train_seconds": spread([run["train_seconds"] for run in runs.values()]),
        "train_joules": _spread_of_all([run["train_joules"] for run in runs.values()]),
        "peak_memory_bytes": max(run["peak_memory_bytes"] for run in runs.values()),
        "phases": _over_runs([run["phases"] for run in runs.values()]),
        "transitions": first["transitions"],
        "runs": [
            {"seed": seed, **{k: run[k] for k in ("test_accuracy", "test_loss", "train_loss", "train_seconds")}}
            for seed, run in runs.items()
        ],
    }
    if full is not None and arm.kind != "full":
        pairs = [(run, full[seed]) for seed, run in runs.items()]
        gains = [run["test_accuracy"] - f["test_accuracy"] for run, f in pairs]
        summary["accuracy_over_full"] = spread(gains)
        summary["accuracy_over_full_test"] = paired_test(gains)
        summary["seconds_over_full"] = spread([run["train_seconds"] / f["train_seconds"] for run, f in pairs])
    return summary


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


def _spread_of_all(values: Sequence[float | None]) -> dict | None:
    return None if None in values else spread(values)


def time_to_accuracy(logs: Iterable[list[dict]], accuracy: float) -> dict:
    """The training seconds after which test accuracy first was `accuracy`, at an epoch's end, over the runs that got
    there; None where none did."""
    first = []
    for rows in logs:
        reached = [row["train_seconds"] for row in rows if row["test_accuracy"] >= accuracy]
        first += reached[:1]
    return {"accuracy": accuracy, "reached": len(first), "seconds": spread(first) if first else None}


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
