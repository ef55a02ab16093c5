"""tune: which freezing gives the most within given seconds, tried on the task by successive halving."""

import shlex
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..planner import StepCosts, predict
from ..schedule import Schedule
from ..tasks import Task, faults_of
from ..text import table
from .config import BadInput, TrainConfig, faults_of_input
from .costing import kept_costs
from .reporters import Reporter
from .run import Run
from .run_folder import RunFolder, check_empty, make_folder, write_json
from .tables import duration, metric_text
from .trainer import Trainer

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


@dataclass(frozen=True)
class Setting:
    """What a candidate changes of the base config, and its name."""

    name: str
    changes: tuple[tuple[str, Any], ...]

    def config(self, base: TrainConfig, steps: int) -> TrainConfig:
        return replace(base, steps=steps, **dict(self.changes))


def settings(layers: list[str]) -> list[Setting]:
    """Full training, and the CANDIDATES of a net with these layers."""
    found = [Setting("full", (("method", "full"), ("cache", None), ("start_frozen", 0)))]
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


class Tuning:
    """Trains the settings for a part of the seconds, keeps the better half, doubles the seconds, until one is left.

    Every run is a whole one, with its schedule as long as its share of the seconds: predicted from the costs of the
    layers, the filling of the cache included. So what wins is what gives the most in equal seconds. All of it takes
    about log2(settings) times the seconds.

    Args:
        seconds: of the run that is wanted in the end.
        saving: instead: the part of full training's seconds that the run is to save.

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
        resume: bool = False,
    ) -> None:
        self.base, self.out, self.task = base.resolved(), Path(out), task
        if (seconds is None) == (saving is None):
            raise ValueError("seconds or a saving must be given, and not both")
        if seconds is not None and not 0 < seconds < float("inf"):
            raise ValueError(f"seconds must be > 0, got {seconds}")
        if not resume:
            check_empty(self.out)
        with faults_of(task.file):
            trainer = Trainer(replace(self.base, method="full", cache=None, start_frozen=0), task)
        self._layers, self._steps_per_epoch = trainer.layer_names, trainer.steps_per_epoch
        self._total_steps = trainer.total_steps
        make_folder(self.out)
        self._lock = RunFolder(self.out)
        self._lock.lock()
        self.costs: StepCosts = kept_costs(self.out / "costs.json", trainer.config, task, self._layers, runs=4)
        if self.costs.unit != "s":
            raise ValueError("the run must be long enough to measure its layers: more epochs, or steps")
        self.full_seconds = self._total_steps * self.costs.step(0)
        if seconds is None:
            assert saving is not None  # one of the two is
            seconds = (1 - saving) * self.full_seconds
        self.seconds = seconds
        self.rows: list[dict] = []
        self.refused: dict[str, str] = {}

    def run(self, make_reporter: Callable[[str], Reporter], say: Callable[[str], None] = print) -> dict:
        """Tries the settings and returns the best row; KeyboardInterrupt leaves the rows that are done."""
        began = time.perf_counter()
        left = settings(self._layers)
        rungs = max(1, (len(left) - 1).bit_length())
        say(
            f"{len(left)} settings in {rungs} rounds, for a run of {duration(self.seconds)}: about"
            f" {duration(rungs * self.seconds)} of training in all"
        )
        try:
            for rung in range(rungs):
                seconds = self.seconds / 2 ** (rungs - 1 - rung)
                tried = [row for setting in left if (row := self._try(setting, rung, seconds, make_reporter, say))]
                if not tried:
                    raise BadInput(f"no setting could be trained: {next(iter(self.refused.values()))}")
                tried.sort(key=self._score, reverse=True)
                kept = {row["name"] for row in tried[: max(1, len(tried) // 2)]}
                left = [setting for setting in left if setting.name in kept]
        finally:
            self._lock.unlock()
            if self.rows:
                self.spent = time.perf_counter() - began
                values = {"rows": self.rows, "refused": self.refused, "seconds": self.seconds, "spent": self.spent}
                write_json(self.out / "tune.json", values)
        return self.best()

    def best(self) -> dict:
        """The best row of the last round that was begun with more than one run done, or of the longest runs."""
        last = max(row["round"] for row in self.rows)
        return max((row for row in self.rows if row["round"] == last), key=self._score)

    def text(self, command: str) -> str:
        """The table of what was tried, what it cost, and the command of the best."""
        metric = self.task.metric_name
        cells = [("round", "setting", "steps", "seconds", metric)]
        for row in self.rows:
            value = metric_text(metric, row["value"])
            cells.append((str(row["round"]), row["name"], str(row["steps"]), f"{row['seconds']:.1f}", value))
        best = self.best()
        lines = [table(cells, left=[1]), *(f"not tried, {name}: {why}" for name, why in self.refused.items())]
        lines.append(
            f"Best: {best['name']}. Trying took {duration(self.spent)}; the run itself takes {duration(self.seconds)},"
            f" full training {duration(self.full_seconds)}. One seed chose, on the {self._judge.partition('_')[0]}"
            f" data: compare says how sure it is."
        )
        return "\n".join([*lines, "", f"  {command} {self._flags(best)}"])

    @property
    def _judge(self) -> str:
        split = "test" if self.task.validation is None else "val"
        return f"{split}_{self.task.metric_name}"

    def _score(self, row: dict) -> float:
        return row["value"] if self.task.higher_is_better else -row["value"]

    def _try(self, setting: Setting, rung: int, seconds: float, make_reporter, say) -> dict | None:
        try:
            steps = self._steps_within(setting, seconds)
            config = setting.config(self.base, steps).resolved()
            folder = RunFolder(self.out / f"round-{rung + 1}" / str(settings(self._layers).index(setting)))
            result = folder.load_result()
            if result is None or TrainConfig.from_dict(result["config"]) != config:
                run = Run.prepare(config, folder.path, task=self.task, resume=True)
                reporter = make_reporter(f"round {rung + 1}, {setting.name}")
                try:
                    result = run.train(reporter)
                finally:
                    reporter.close()
                    if run.trainer.cache is not None:
                        run.trainer.cache.close()
        except (BadInput, ValueError, TypeError) as error:
            self.refused[setting.name] = " ".join(str(error).split())
            say(f"not tried, {setting.name}: {self.refused[setting.name]}")
            return None
        row = {
            "round": rung + 1,
            "name": setting.name,
            "changes": dict(setting.changes),
            "steps": steps,
            "seconds": result["train_seconds"],
            "value": result[self._judge],
        }
        self.rows.append(row)
        value = metric_text(self.task.metric_name, row["value"])
        say(f"round {rung + 1}, {setting.name}: {value} in {row['seconds']:.1f} s")
        return row

    def _steps_within(self, setting: Setting, seconds: float) -> int:
        """n with: steps that run the frozen layers cost `paid`, those that read their features `free`, in `seconds`."""
        changes = dict(setting.changes)
        if changes["method"] == "full":
            return max(1, int(seconds / self.costs.step(0)))
        start = changes["start_frozen"]
        count = self._layers.index(start) + 1 if start else 0
        schedule = Schedule(
            len(self._layers), self._total_steps, t_0=changes["t_0"], how_scale=changes["how_scale"], start_frozen=count
        )
        found = predict(self.costs, schedule)
        paid = found.cost / self._total_steps
        if not changes["cache"]:
            return max(1, int(seconds / paid))
        free = (1 - found.ceiling) * self.costs.step(0)
        filling = changes["views"] * self._steps_per_epoch
        if seconds <= filling * paid:
            return max(1, int(seconds / paid))
        return filling + int((seconds - filling * paid) / free)

    def _flags(self, row: dict) -> str:
        changes = row["changes"]
        if changes["method"] == "full":
            return f"--no-freezeout --steps {self._steps_within_row(row)}"
        flags = ["--no-anneal", "--t0", f"{changes['t_0']:g}", "--how-scale", str(changes["how_scale"])]
        if changes["start_frozen"]:
            flags += ["--start-frozen", str(changes["start_frozen"])]
        if changes["cache"]:
            flags += ["--cache", "--views", str(changes["views"])]
        return shlex.join([*flags, "--steps", str(self._steps_within_row(row))])

    def _steps_within_row(self, row: dict) -> int:
        return self._steps_within(Setting(row["name"], tuple(row["changes"].items())), self.seconds)
