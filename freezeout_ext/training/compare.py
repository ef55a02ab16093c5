"""freezeout compare: the same net and seeds, trained in several ways; accuracy, seconds and bytes side by side."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, median, stdev

import torch

from ..planner import StepCosts
from ..tasks import Task, faults_of
from .config import TrainConfig, faults_of_input
from .costing import kept_costs
from .engagement import with_engagement
from .measure import conditions
from .reporters import Reporter
from .run import Run
from .run_folder import RunFolder, check_empty, make_folder, write_json
from .tables import in_percent, metric_text
from .trainer import Trainer

# short: full training on a cosine as long as FreezeOut's seconds; const-time: FreezeOut as long as full training's.
# no-anneal: one cosine, layers freeze all the same; cached: the same with kept features, whose filling counts.
KINDS = ("full", "freezeout", "no-anneal", "cached", "short", "const-time")
MATCHED = ("short", "const-time")
# Those for which a `short` runs.
RATED = ("freezeout", "cached")
WARMUP_STEPS = 20


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Attributes:
        t_0, how_scale: of the FreezeOut that it is, or whose seconds it is matched to.
        part: of the steps that the run takes; below 1 with full training on a shorter cosine.
        of: kind of the arm whose seconds a `short` takes.
    """

    kind: str
    t_0: float | None = None
    how_scale: str | float | None = None
    part: float = 1.0
    of: str = "freezeout"

    @property
    def name(self) -> str:
        if self.kind == "full":
            return "full" if self.part == 1 else f"full x{self.part:g}"
        of = "" if self.of == "freezeout" else f" {self.of}"
        return f"{self.kind}{of} {self.how_scale} {self.t_0:g}"

    @property
    def rival(self) -> "Arm | None":
        """The arm that takes as many seconds without freezing."""
        return Arm("short", self.t_0, self.how_scale, of=self.kind) if self.kind in RATED else None

    @property
    def freezes(self) -> bool:
        return self.kind not in ("full", "short")

    @property
    def is_matched(self) -> bool:
        return self.kind in MATCHED

    def config(self, base: TrainConfig, seed: int, steps: int | None = None) -> TrainConfig:
        """The config of this arm's run; `steps` is the length of a matched arm."""
        method = {"short": "full", "const-time": "freezeout", "cached": "no-anneal"}.get(self.kind, self.kind)
        config = replace(base, method=method, seed=seed, steps=steps or base.steps, cache=None)
        if self.kind == "cached":
            kept = base.cache or "device"
            # What lies in a folder is of one seed and one way of freezing.
            in_memory = kept in ("device", "host")
            config = replace(config, cache=kept if in_memory else str(Path(kept) / self.name / f"seed-{seed}"))
        if method == "full":
            config = replace(config, start_frozen=0)
        else:
            assert self.t_0 is not None and self.how_scale is not None  # an arm that freezes has both
            config = replace(config, t_0=self.t_0, how_scale=self.how_scale)
        return config.resolved()


def default_kinds(base: TrainConfig) -> list[str]:
    """All but const-time; `cached` only where features are to be kept, or layers are frozen from the start."""
    cached = base.cache is not None or base.start_frozen
    return [kind for kind in KINDS if kind != "const-time" and (kind != "cached" or cached)]


def make_arms(
    kinds: Iterable[str], t_0s: Iterable[float], how_scales: Iterable[str | float], parts: Iterable[float] = ()
) -> list[Arm]:
    """The arms of `kinds`, one for each (how_scale, t_0); what a matched arm is matched to is added.

    Args:
        parts: of full training's steps, in (0, 1); each adds full training on a cosine of that length.
    """
    parts = sorted(set(parts), reverse=True)
    for part in parts:
        if not 0 < part < 1:
            raise ValueError(f"shorter must be parts in (0, 1), got {part}")
    kinds = list(dict.fromkeys([*kinds, *["full"] * bool(parts)]))
    for kind in kinds:
        if kind not in KINDS:
            raise ValueError(f"arms must be of {', '.join(KINDS)}, got {kind!r}")
    if any(kind in MATCHED for kind in kinds):
        kinds += ["full"] + [kind for kind in ("freezeout",) if "const-time" in kinds or "cached" not in kinds]
    variants = list(dict.fromkeys((t_0, how_scale) for how_scale in how_scales for t_0 in t_0s))
    arms = []
    for kind in KINDS:
        if kind in kinds:
            if kind == "short":
                arms += [Arm(kind, *variant, of=of) for of in RATED if of in kinds for variant in variants]
            else:
                arms += [Arm(kind)] if kind == "full" else [Arm(kind, *variant) for variant in variants]
            arms += [Arm("full", part=part) for part in parts] if kind == "full" else []
    return arms


class Comparison:
    """The runs of all arms and seeds in one folder, OUT/runs/ARM/seed-SEED, and what they say together.

    Runs are sequential, seed by seed, in alternating order, so that what slows the machine slows all arms. The matched
    arms come after the others, whose seconds (see `undisturbed_seconds`) decide their length. With `resume` finished
    runs are kept and an unfinished one goes on.

    Args:
        accuracies: values of the evaluation's metric whose first time is reported. None: for an accuracy a point below
            full training's last, or below the worst arm's where there is no full training.

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
        task: Task,
        resume: bool = False,
        accuracies: Sequence[float] = (),
    ) -> None:
        for accuracy in accuracies:
            if not (0 < accuracy <= 1 if in_percent(task.metric_name) else math.isfinite(accuracy)):
                raise ValueError(f"accuracies must be in (0, 1], got {accuracy}")
        self.accuracies = list(accuracies)
        self.base, self.out, self.arms, self.seeds = base.resolved(), Path(out), list(arms), list(seeds)
        self.task = task
        if not resume or RunFolder(self.out).holds_run():
            check_empty(self.out)
        with faults_of(task.file):
            for arm in self.arms:
                config = arm.config(self.base, self.seeds[0])
                trainer = Trainer(replace(config, cache=config.cache and "device"), task)
                if trainer.cache is not None:
                    trainer.cache.close()
        self._layers, self._steps = trainer.layer_names, trainer.steps_per_epoch * self.base.epochs
        self._lock = RunFolder(self.out)
        make_folder(self.out)
        self._lock.lock()

    def run(self, make_reporter: Callable[[str], Reporter], say: Callable[[str], None] = print) -> dict:
        """Trains what is not trained yet and writes compare.json; make_reporter(title) makes one run's reporter."""
        try:
            with faults_of(self.task.file):
                return self._run(make_reporter, say)
        finally:
            self._lock.unlock()

    def _run(self, make_reporter: Callable[[str], Reporter], say: Callable[[str], None]) -> dict:
        measured = [arm for arm in self.arms if not arm.is_matched]
        matched = [arm for arm in self.arms if arm.is_matched]
        results: dict[Arm, dict[int, dict]] = {arm: {} for arm in self.arms}
        if not all(self._folder(arm, seed).result_path.exists() for arm in self.arms for seed in self.seeds):
            self._warm_up()
        freezes = any(arm.freezes for arm in self.arms)
        runs = len(self.arms) * len(self.seeds)
        costs = None
        if freezes:
            costs = kept_costs(self.out / "costs.json", self.base, self.task, self._layers, runs=runs)
        for stage in (measured, matched):
            steps = {arm: self._matched_steps(arm, results) for arm in stage}
            for k, seed in enumerate(self.seeds):
                for arm in stage if k % 2 == 0 else reversed(stage):
                    title = f"{arm.name}, seed {seed}"
                    results[arm][seed] = self._run_one(arm, seed, steps[arm], costs, make_reporter(title))
                    value = metric_text(self.task.metric_name, results[arm][seed][self._judge])
                    say(f"{title}: {value} in {results[arm][seed]['train_seconds']:.1f} s")
        summary = self._summary(results, costs)
        write_json(self.out / "compare.json", summary)
        return summary

    def _folder(self, arm: Arm, seed: int) -> RunFolder:
        return run_folder(self.out, arm.name, seed)

    def _run_one(self, arm: Arm, seed: int, steps: int | None, costs: StepCosts | None, reporter: Reporter) -> dict:
        config, folder = arm.config(self.base, seed, steps), self._folder(arm, seed)
        result = folder.load_result()
        if result is not None and TrainConfig.from_dict(result["config"]) == config:
            return result
        run = Run.prepare(config, folder.path, resume=True, task=self.task)
        try:
            return run.train(reporter, costs if arm.freezes else None)
        finally:
            reporter.close()

    def _warm_up(self) -> None:
        """Some steps that do not count: the first run must not pay for what the process does once."""
        Trainer(replace(Arm("full").config(self.base, 0), steps=WARMUP_STEPS), self.task).train_epoch()

    def _matched_steps(self, arm: Arm, results: dict[Arm, dict[int, dict]]) -> int | None:
        """How many steps an arm takes, None for the base's; what an earlier call decided for a matched arm stays."""
        if arm.part < 1:
            return max(1, round(arm.part * (self.base.steps or self._steps)))
        if not arm.is_matched:
            return None
        for seed in self.seeds:
            folder = self._folder(arm, seed)
            if folder.holds_run():
                return folder.load_config().steps
        full, freezeout = results[Arm("full")], results[Arm(arm.of, arm.t_0, arm.how_scale)]
        ratio = median(undisturbed_seconds(freezeout[s]) / undisturbed_seconds(full[s]) for s in self.seeds)
        total = full[self.seeds[0]]["total_steps"]
        return max(1, round(total * ratio if arm.kind == "short" else total / ratio))

    @property
    def _judge(self) -> str:
        return f"test_{self.task.metric_name}"

    def _summary(self, results: dict[Arm, dict[int, dict]], costs: StepCosts | None) -> dict:
        judge, sign = self._judge, 1 if self.task.higher_is_better else -1
        arms = [_arm_summary(arm, results, judge, sign) for arm in self.arms]
        arms = [
            with_engagement(summary, costs, self.base.to_dict(), list(results[arm].values()))
            if costs is not None and arm.freezes
            else summary
            for arm, summary in zip(self.arms, arms, strict=True)
        ]
        accuracies = self.accuracies
        if not accuracies and in_percent(self.task.metric_name):
            reference = [summary for summary in arms if summary["name"] == "full"] or arms
            accuracies = [min(summary[judge]["mean"] for summary in reference) - 0.01]
        for summary in arms:
            logs = [run_folder(self.out, summary["name"], seed).read_log() for seed in self.seeds]
            found = [time_to_metric(logs, judge, sign, value) for value in accuracies]
            summary["time_to_accuracy"] = found
        return {
            "config": self.base.to_dict(),
            "metric": {"name": self.task.metric_name, "higher_is_better": self.task.higher_is_better},
            "seeds": self.seeds,
            "conditions": conditions(torch.device(self.base.device)),
            "memory_measured": results[self.arms[0]][self.seeds[0]]["memory_measured"],
            "arms": arms,
        }


def undisturbed_seconds(result: dict) -> float:
    """train_seconds; where one CPU thread did all the work, what they would be with no other program on the machine.

    Not of a compiled run, whose compiler works elsewhere.
    """
    # Steps that fill a cache are not like those that read from it: their median is not their sum.
    name = "cpu_seconds_per_step_mean" if result.get("features") else "cpu_seconds_per_step"
    cpu = [phase.get(name) for phase in result["phases"]]
    if None in cpu or result["graphs_compiled"]:
        return result["train_seconds"]
    return sum(phase["steps"] * seconds for phase, seconds in zip(result["phases"], cpu, strict=True))


def _arm_summary(arm: Arm, results: dict[Arm, dict[int, dict]], judge: str, sign: int) -> dict:
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
        summary["ahead_of_rival"] = {
            "rival": arm.rival.name,
            **spread(gains),
            "test": paired_test(gains),
            "seconds": fmean(run["train_seconds"] for run in rival.values()),
        }
    return summary


def paired_test(differences: Sequence[float]) -> dict | None:
    """Student's t-test of the mean of differences between runs of equal seeds: p two-sided, a 95 % interval.

    None for fewer than two differences. Where all are equal their scatter is unknown (accuracies are counted in whole
    samples: it happens by chance): the interval, t and p are None.
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
    """The training seconds after which `judge` first was as good as `value`, at an epoch's end, over the runs that got
    there; None where none did. sign: -1 where lower is better."""
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
