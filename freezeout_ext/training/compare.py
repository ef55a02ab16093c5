"""freezeout compare: the same net and seeds, trained in several ways; accuracy, seconds and bytes side by side."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean, median

import torch

from ..arguments import check_kind
from ..planner import StepCosts
from ..tasks import Task, faults_of
from .arms import MATCHED, Arm
from .config import TrainConfig, faults_of_input
from .costing import kept_costs
from .course import Length, has_whole_steps
from .engagement import with_engagement
from .keeping import kept_saving
from .measure import conditions
from .reporters import Progress, Reporter, say
from .run import trained
from .run_folder import RunFolder, check_empty, make_folder, write_json
from .summary import arm_summary, run_folder, time_to_metric, undisturbed_seconds
from .trainer import Trainer
from .values import in_percent, metric_text

WARMUP_STEPS = 5
MOST_SEEDS = 10_000


class Comparison:
    """The runs of all arms and seeds in one folder, OUT/runs/ARM/seed-SEED, and what they say together.

    Runs are sequential, seed by seed, in alternating order, so that what slows the machine slows all arms.
    The matched arms come after the others, whose seconds (see `undisturbed_seconds`) decide their length.

    Args:
        resume: keep finished runs, and go on with an unfinished one.
        accuracies: values of the evaluation's metric whose first time is reported. With none, where the metric is an
            accuracy: a point below full training's last, or below the worst arm's where there is no full training.

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
            check_kind("accuracies", accuracy, int | float, "numbers")
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
                if trainer.feed.cache is not None:
                    trainer.feed.cache.close()
        self._layers, self._steps = trainer.layer_names, Length.of(self.base, len(task.train)).total_steps
        self._lock = RunFolder(self.out)
        make_folder(self.out)
        self._lock.lock()

    def run(self, make_reporter: Callable[[str], Reporter], say: Callable[[str], None] = say) -> dict:
        """Trains what is not trained yet and writes compare.json; make_reporter(title) makes one run's reporter."""
        try:
            with faults_of(self.task.file):
                return self._run(make_reporter, say)
        finally:
            self._lock.unlock()

    def _run(self, make_reporter: Callable[[str], Reporter], say: Callable[[str], None]) -> dict:
        measured = [arm for arm in self.arms if arm.kind not in MATCHED]
        matched = [arm for arm in self.arms if arm.kind in MATCHED]
        results: dict[Arm, dict[int, dict]] = {arm: {} for arm in self.arms}
        if not all(self._folder(arm, seed).result_path.exists() for arm in self.arms for seed in self.seeds):
            self._warm_up()
        engages = has_whole_steps(self.base) and any(arm.freezes for arm in self.arms)
        runs = len(self.arms) * len(self.seeds)
        costs = None
        if engages:
            costs = kept_costs(self.out / "costs.json", self.base, self.task, self._layers, runs=runs)
        for stage in (measured, matched):
            steps = {arm: self._matched_steps(arm, results) for arm in stage}
            for k, seed in enumerate(self.seeds):
                for arm in stage if k % 2 == 0 else reversed(stage):
                    title = f"{arm.name}, seed {seed}"
                    results[arm][seed] = trained(
                        arm.config(self.base, seed, steps[arm]),
                        self._folder(arm, seed),
                        self.task,
                        partial(make_reporter, title),
                        costs if arm.freezes else None,
                    )
                    value = metric_text(self.task.metric_name, results[arm][seed][self._judge])
                    say(f"{title}: {value} in {results[arm][seed]['train_seconds']:.1f} s")
        summary = self._summary(results, costs)
        write_json(self.out / "compare.json", summary)
        return summary

    def _folder(self, arm: Arm, seed: int) -> RunFolder:
        return run_folder(self.out, arm.name, seed)

    def _warm_up(self) -> None:
        """Some steps that do not count: the first run must not pay for what the process does once."""
        progress = Progress("warming up, steps")
        trainer = Trainer(replace(Arm("full").config(self.base, 0), steps=WARMUP_STEPS), self.task)
        trainer.train_epoch(lambda step: progress(step, WARMUP_STEPS))

    def _matched_steps(self, arm: Arm, results: dict[Arm, dict[int, dict]]) -> int | None:
        """How many steps an arm takes, None for the base's. What an earlier call decided for a matched arm stays."""
        if arm.part < 1:
            return max(1, round(arm.part * self._steps))
        if arm.kind not in MATCHED:
            return None
        for seed in self.seeds:
            folder = self._folder(arm, seed)
            if folder.holds_run():
                return folder.load_config().steps
        full, freezeout = results[Arm("full")], results[Arm(arm.of, arm.t_0, arm.how_scale)]
        ratio = median(undisturbed_seconds(freezeout[s]) / undisturbed_seconds(full[s]) for s in self.seeds)
        total = full[self.seeds[0]]["total_steps"]
        return max(1, round(total * ratio if arm.kind == "short" else total / ratio))

    def _kept_saving(self, arm: Arm, results: dict[Arm, dict[int, dict]], costs: StepCosts) -> dict:
        runs, full = results[arm], results[Arm("full")]
        saved = [1 - undisturbed_seconds(runs[s]) / undisturbed_seconds(full[s]) for s in self.seeds]
        config, views = arm.config(self.base, self.seeds[0]), runs[self.seeds[0]]["features"]["views"]
        return kept_saving(config, self.task, costs, views, fmean(saved))

    @property
    def _judge(self) -> str:
        return f"test_{self.task.metric_name}"

    def _summary(self, results: dict[Arm, dict[int, dict]], costs: StepCosts | None) -> dict:
        judge, sign = self._judge, 1 if self.task.higher_is_better else -1
        arms = []
        for arm in self.arms:
            summary = arm_summary(arm, results, judge, sign)
            if costs is not None and arm.freezes:
                summary = with_engagement(summary, costs, self.base.to_dict(), list(results[arm].values()))
                if summary["features"] and costs.unit == "s" and Arm("full") in results:
                    summary["kept_saving"] = self._kept_saving(arm, results, costs)
            arms.append(summary)
        accuracies = self.accuracies
        if not accuracies and in_percent(self.task.metric_name):
            reference = [summary for summary in arms if summary["name"] == "full"] or arms
            accuracies = [min(summary[judge]["mean"] for summary in reference) - 0.01]
        for arm, summary in zip(self.arms, arms, strict=True):
            logs = [self._folder(arm, seed).read_log() for seed in self.seeds]
            summary["time_to_accuracy"] = [time_to_metric(logs, judge, sign, value) for value in accuracies]
        return {
            "config": self.base.to_dict(),
            "metric": {"name": self.task.metric_name, "higher_is_better": self.task.higher_is_better},
            "seeds": self.seeds,
            "conditions": conditions(torch.device(self.base.device)),
            "memory_measured": results[self.arms[0]][self.seeds[0]]["memory_measured"],
            "arms": arms,
        }
