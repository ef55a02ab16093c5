"""tune: which freezing gives the most within given seconds, tried on the task by successive halving."""

import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from ..arguments import check_count
from ..planner import StepCosts, steps_within
from ..schedule import Schedule
from ..tasks import Task, faults_of
from ..text import duration, table
from .compare import MOST_SEEDS
from .config import BadInput, TrainConfig, faults_of_input
from .costing import kept_costs, unfrozen
from .kept_run import KeptRun, Rows
from .reporters import Reporter, say
from .run import trained
from .run_folder import RunFolder, check_empty, make_folder, write_json
from .summary import paired_test, spread
from .trainer import Trainer
from .values import metric_text, points_text
from .verdict import CLEAR

# (part of the layers that never train, t_0, strategy of the others, views; 0 keeps no features).
CANDIDATES = (
    (0.0, 0.8, "cubic", 0),
    (0.25, 1.0, "linear", 2),
    (0.5, 1.0, "linear", 1),
    (0.5, 1.0, "linear", 4),
    (0.5, 0.5, "linear", 2),
    (0.75, 1.0, "linear", 1),
    (0.75, 1.0, "linear", 4),
)
FULL = "full"


@dataclass(frozen=True)
class Setting:
    """What a candidate changes of the base config, and its name."""

    name: str
    changes: tuple[tuple[str, Any], ...]

    def config(self, base: TrainConfig, steps: int, seed: int) -> TrainConfig:
        return replace(base, steps=steps, seed=base.seed + seed, thaw_to=None, **dict(self.changes))


@dataclass(frozen=True)
class Round:
    """One round of halving: each of `settings` settings trains for `seconds`, once for each of `seeds` seeds."""

    settings: int
    seconds: float
    seeds: int

    @property
    def cost(self) -> float:
        return self.settings * self.seconds * self.seeds


def settings(layers: Sequence[str]) -> list[Setting]:
    """Full training, and the CANDIDATES of a net with these layers."""
    found = [Setting(FULL, (("method", "full"), ("cache", None), ("start_frozen", 0)))]
    for part, t_0, how_scale, views in CANDIDATES:
        count = round(part * len(layers))
        if part and not 0 < count < len(layers):
            continue
        start = layers[count - 1] if count else 0
        changes = {"method": "no-anneal", "start_frozen": start, "t_0": t_0, "how_scale": how_scale, "cache": None}
        name = f"start {start}, " if count else ""
        name += "no other freezes" if t_0 == 1 else f"{how_scale} {t_0:g}"
        if views:
            changes |= {"cache": "device", "views": views}
            name += f", kept, {views} view{'s' * (views > 1)}"
        found.append(Setting(name, tuple(changes.items())))
    return found


def rounds_of(candidates: int, seconds: float, seeds: int) -> list[Round]:
    """Rounds of twice the seconds and half the settings, up to one setting; then this one and full training.

    The last round is of `seconds`. The round before it takes half the seeds, the others take one: what these leave out
    was far behind.
    """
    counts = []
    while candidates > 1:
        counts.append(candidates)
        candidates = (candidates + 1) // 2
    halved = [
        Round(count, seconds / 2 ** (len(counts) - k), (seeds + 1) // 2 if k == len(counts) - 1 else 1)
        for k, count in enumerate(counts)
    ]
    return [*halved, Round(2, seconds, seeds)]


class Tuning:
    """Tries the settings against each other in rounds, see `rounds_of`, and the last one against full training.

    Every run is a whole one, with its schedule as long as its share of the seconds. The length is predicted from the
    costs of the layers, the filling of the cache included. So what wins is what gives the most in equal seconds.

    Args:
        seconds: of the run that is wanted in the end.
        saving: instead of seconds, the part of full training's seconds that the run is to save.
        seeds: of the last round. With one nothing is known of chance.

    Raises:
        BadInput: one sentence on what is wrong with the input; nothing was written.
    """

    @faults_of_input()
    def __init__(
        self,
        base: TrainConfig,
        out: str | Path,
        *,
        task: Task,
        seconds: float | None = None,
        saving: float | None = None,
        seeds: int = 3,
        resume: bool = False,
    ) -> None:
        self.base, self.out, self.task, self.seeds = base.resolved(), Path(out), task, seeds
        if (seconds is None) == (saving is None):
            raise ValueError("seconds or a saving must be given, and not both")
        if seconds is not None and not 0 < seconds < float("inf"):
            raise ValueError(f"seconds must be > 0, got {seconds}")
        check_count("seeds", seeds, 1, MOST_SEEDS)
        if not resume:
            check_empty(self.out)
        with faults_of(task.file):
            trainer = Trainer(unfrozen(self.base), task)
        self._layers, self._length = trainer.layer_names, trainer.length
        self._settings = settings(self._layers)
        make_folder(self.out)
        self._lock = RunFolder(self.out)
        self._lock.lock()
        self.costs: StepCosts = kept_costs(self.out / "costs.json", trainer.config, task, self._layers, runs=4)
        if self.costs.unit != "s":
            raise ValueError("the run must be long enough to measure its layers: more epochs, or steps")
        self.full_seconds = self._length.total_steps * self.costs.step(0)
        if seconds is None:
            assert saving is not None  # one of the two is
            seconds = (1 - saving) * self.full_seconds
        self.seconds, self.spent = seconds, 0.0
        self.rows: list[dict] = []
        self.refused: dict[str, str] = {}

    def run(self, make_reporter: Callable[[str], Reporter], say: Callable[[str], None] = say) -> dict:
        """Tries the settings and returns what won, see `best`. KeyboardInterrupt leaves the rows that are done."""
        began = time.perf_counter()
        full, *left = self._settings
        rounds = rounds_of(len(left), self.seconds, self.seeds)
        say(
            f"{len(left)} settings in {len(rounds)} rounds, for a run of {duration(self.seconds)}: about"
            f" {duration(sum(each.cost for each in rounds))} of training in all"
        )
        try:
            for number, each in enumerate(rounds, 1):
                if number == len(rounds):
                    left = [full, *left]
                for seed in range(each.seeds):
                    left = [one for one in left if self._try(one, number, each.seconds, seed, make_reporter, say)]
                if not left:
                    raise BadInput(f"no setting could be trained: {next(iter(self.refused.values()))}")
                if number < len(rounds):
                    best = [row["name"] for row in self.means(number)[: (len(left) + 1) // 2]]
                    left = [one for one in left if one.name in best]
        finally:
            self._lock.unlock()
            if self.rows:
                self.spent = time.perf_counter() - began
                values = {"rows": self.rows, "refused": self.refused, "seconds": self.seconds, "spent": self.spent}
                write_json(self.out / "tune.json", values)
        return self.best()

    def means(self, number: int) -> list[dict]:
        """The settings of a round, best first: the mean over their seeds that are done.

        Settings of which fewer seeds are done stand last.
        """
        found = []
        for name in dict.fromkeys(row["name"] for row in self.rows if row["round"] == number):
            rows = [row for row in self.rows if (row["round"], row["name"]) == (number, name)]
            values = {row["seed"]: row["value"] for row in rows}
            seconds = fmean(row["seconds"] for row in rows)
            found.append({**rows[0], "seconds": seconds, "value": fmean(values.values()), "values": values})
        sign = 1 if self.task.higher_is_better else -1
        return sorted(found, key=lambda row: (len(row["values"]), sign * row["value"]), reverse=True)

    def best(self) -> dict:
        """The best setting of the last round of which a run is done, as in `means`."""
        return self.means(max(row["round"] for row in self.rows))[0]

    def text(self, command: str) -> str:
        """The table of what was tried, how far the best is from full training, what all cost, and its command."""
        metric = self.task.metric_name
        cells = [("round", "setting", "seeds", "steps", "seconds", metric)]
        for number in sorted({row["round"] for row in self.rows}):
            for row in self.means(number):
                shown = [str(number), row["name"], str(len(row["values"])), str(row["steps"]), f"{row['seconds']:.1f}"]
                cells.append((*shown, metric_text(metric, row["value"])))
        best = self.best()
        lines = [table(cells, left=[1]), *(f"not tried, {name}: {why}" for name, why in self.refused.items())]
        lines += [f"Best: {best['name']}. {self._against_full(best)}"]
        lines += [
            f"Trying took {duration(self.spent)}; the run itself takes {duration(self.seconds)}, full training"
            f" {duration(self.full_seconds)}. The {self._judge.partition('_')[0]} data judged, and chose too:"
            " compare says how much of it holds."
        ]
        return "\n".join([*lines, "", f"  {command} {self._flags(best)}"])

    def _against_full(self, best: dict) -> str:
        rivals = [row for row in self.means(best["round"]) if (row["name"] == FULL) != (best["name"] == FULL)]
        if not rivals or FULL not in (best["name"], rivals[0]["name"]):
            return "It has not stood against full training yet."
        rival, metric = rivals[0], self.task.metric_name
        seeds = best["values"].keys() & rival["values"].keys()
        sign = 1 if self.task.higher_is_better else -1
        gains = [sign * (best["values"][seed] - rival["values"][seed]) for seed in sorted(seeds)]
        times = f"{best['seconds']:.1f} s against {rival['seconds']:.1f} s"
        if len(gains) < 2:
            return f"One seed shows no winner over {rival['name']}: {points_text(metric, gains[0])} ({times})."
        mean, test = spread(gains), paired_test(gains)
        p = None if test is None else test["p"]
        sure = "" if p is None else f", p = {p:.2g}"
        noise = "" if p is not None and p < CLEAR else ", within the noise"
        by = f"{points_text(metric, mean['mean'])} ± {points_text(metric, mean['sd'] / len(gains) ** 0.5)}"
        return (
            f"Ahead of {rival['name']} in equal seconds by {by}{noise}"
            f" (mean and standard error, n = {len(gains)}{sure}; {times})."
        )

    @property
    def _judge(self) -> str:
        split = "test" if self.task.validation is None else "val"
        return f"{split}_{self.task.metric_name}"

    def _try(self, setting: Setting, number: int, seconds: float, seed: int, make_reporter, say) -> bool:
        """Trains a setting, or finds it trained, and adds its row. False where the setting cannot be trained."""
        try:
            steps = self._steps_within(setting, seconds)
            config = setting.config(self.base, steps, seed).resolved()
            place = f"{self._settings.index(setting)}-seed-{config.seed}"
            folder = RunFolder(self.out / f"round-{number}" / place)
            result = trained(config, folder, self.task, partial(make_reporter, f"round {number}, {setting.name}"))
        except (BadInput, ValueError, TypeError) as error:
            self.refused[setting.name] = " ".join(str(error).split())
            say(f"not tried, {setting.name}: {self.refused[setting.name]}")
            return False
        row = {
            "round": number,
            "name": setting.name,
            "seed": config.seed,
            "changes": dict(setting.changes),
            "steps": steps,
            "seconds": result["train_seconds"],
            "value": result[self._judge],
        }
        self.rows.append(row)
        value = metric_text(self.task.metric_name, row["value"])
        say(f"round {number}, {setting.name}, seed {config.seed}: {value} in {row['seconds']:.1f} s")
        return True

    def _steps_within(self, setting: Setting, seconds: float) -> int:
        changes = dict(setting.changes)
        rule = {"t_0": changes.get("t_0", 1.0), "how_scale": changes.get("how_scale", "linear")}
        start = changes["start_frozen"]
        count = self._layers.index(start) + 1 if start else 0

        def schedule(steps: int) -> Schedule:
            return Schedule(len(self._layers), steps, start_frozen=count, **rule)

        if not changes["cache"]:
            return steps_within(self.costs, schedule(self._length.total_steps), seconds)
        config = self.base
        # What rows take is not measured: a share of the seconds goes into runs, not into measuring.
        run = KeptRun(self.costs, config.batch_size, lambda num_frozen: Rows(0.0), not config.deterministic)
        return run.steps_within(seconds, schedule, changes["views"] * self._length.steps_per_epoch)

    def _flags(self, row: dict) -> str:
        changes = row["changes"]
        steps = ["--steps", str(self._steps_within(Setting(row["name"], tuple(changes.items())), self.seconds))]
        if changes["method"] == "full":
            return shlex.join(["--no-freezeout", *steps])
        flags = ["--no-anneal", "--t0", f"{changes['t_0']:g}", "--how-scale", str(changes["how_scale"])]
        if changes["start_frozen"]:
            flags += ["--start-frozen", str(changes["start_frozen"])]
        if changes["cache"]:
            flags += ["--cache", "--views", str(changes["views"])]
        return shlex.join([*flags, *steps])
