"""tune: which freezing gives the most within given seconds, tried on the task by successive halving."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from ..arguments import check_count
from ..planner import StepCosts
from ..schedule import Schedule
from ..tasks import Task, faults_of
from ..text import duration, table
from .compare import MOST_SEEDS
from .config import BadInput, TrainConfig, faults_of_input
from .costing import kept_costs, unfrozen
from .keeping import KeptRun, Rows
from .options import command
from .reporters import Reporter, say
from .run import trained
from .run_folder import RunFolder, check_empty, make_folder, write_json
from .summary import lead_over, sentence
from .trainer import Trainer
from .values import metric_text

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


class Round(NamedTuple):
    """One round of halving: each of `settings` settings trains for `seconds`, once for each of `seeds` seeds."""

    settings: int
    seconds: float
    seeds: int


def settings(layers: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Full training, and the CANDIDATES of a net with these layers: by name, what each changes of the config."""
    found: dict[str, dict[str, Any]] = {FULL: {"method": "full"}}
    for part, t_0, how_scale, views in CANDIDATES:
        count = round(part * len(layers))
        if part and not 0 < count < len(layers):
            continue
        changes: dict[str, Any] = {"method": "no-anneal", "t_0": t_0, "how_scale": how_scale}
        name = "no other freezes" if t_0 == 1 else f"{how_scale} {t_0:g}"
        if count:
            changes["start_frozen"] = layers[count - 1]
            name = f"start {layers[count - 1]}, {name}"
        if views:
            changes |= {"cache": "device", "views": views}
            name += f", kept, {views} view{'s' * (views > 1)}"
        found[name] = changes
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
        self.out, self.task, self.seeds = Path(out), task, seeds
        self.base = replace(base.resolved(), start_frozen=0, thaw_to=None, cache=None)
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
        _, *left = self._settings
        rounds = rounds_of(len(left), self.seconds, self.seeds)
        say(
            f"{len(left)} settings in {len(rounds)} rounds, for a run of {duration(self.seconds)}: about"
            f" {duration(sum(each.settings * each.seconds * each.seeds for each in rounds))} of training in all"
        )
        try:
            for number, each in enumerate(rounds, 1):
                if number == len(rounds):
                    left = [FULL, *left]
                for seed in range(each.seeds):
                    left = [one for one in left if self._try(one, number, each.seconds, seed, make_reporter, say)]
                if not left:
                    raise BadInput(f"no setting could be trained: {next(iter(self.refused.values()))}")
                if number < len(rounds):
                    best = [row["name"] for row in self.means(number)[: (len(left) + 1) // 2]]
                    left = [one for one in left if one in best]
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

    def text(self, given: dict[str, Any]) -> str:
        """The table of what was tried, how far the best is from full training, what all cost, and its command.

        Args:
            given: the options with which the command trains, besides those of the setting.
        """
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
        changes = best["changes"]
        chosen = {**changes, "steps": self._steps_within(changes, self.seconds)}
        return "\n".join([*lines, "", f"  {command('train', given | chosen)}"])

    def _against_full(self, best: dict) -> str:
        rivals = [row for row in self.means(best["round"]) if (row["name"] == FULL) != (best["name"] == FULL)]
        if not rivals or FULL not in (best["name"], rivals[0]["name"]):
            return "It has not stood against full training yet."
        rival, sign = rivals[0], 1 if self.task.higher_is_better else -1
        seeds = sorted(best["values"].keys() & rival["values"].keys())
        gains = [sign * (best["values"][seed] - rival["values"][seed]) for seed in seeds]
        lead = lead_over(rival["name"], gains, rival["seconds"])
        return sentence(best["name"], best["seconds"], lead, self.task.metric_name)

    @property
    def _judge(self) -> str:
        split = "test" if self.task.validation is None else "val"
        return f"{split}_{self.task.metric_name}"

    def _try(self, name: str, number: int, seconds: float, seed: int, make_reporter, say) -> bool:
        """Trains a setting, or finds it trained, and adds its row. False where the setting cannot be trained."""
        changes = self._settings[name]
        try:
            steps = self._steps_within(changes, seconds)
            config = replace(self.base, steps=steps, seed=self.base.seed + seed, **changes).resolved()
            place = f"{list(self._settings).index(name)}-seed-{config.seed}"
            folder = RunFolder(self.out / f"round-{number}" / place)
            result = trained(config, folder, self.task, partial(make_reporter, f"round {number}, {name}"))
        except (BadInput, ValueError, TypeError) as error:
            self.refused[name] = " ".join(str(error).split())
            say(f"not tried, {name}: {self.refused[name]}")
            return False
        row = {
            "round": number,
            "name": name,
            "seed": config.seed,
            "changes": changes,
            "steps": steps,
            "seconds": result["train_seconds"],
            "value": result[self._judge],
        }
        self.rows.append(row)
        value = metric_text(self.task.metric_name, row["value"])
        say(f"round {number}, {name}, seed {config.seed}: {value} in {row['seconds']:.1f} s")
        return True

    def _steps_within(self, changes: dict[str, Any], seconds: float) -> int:
        start, full = changes.get("start_frozen"), changes["method"] == "full"
        rule = {"t_0": 1.0, "how_scale": "linear"} if full else {name: changes[name] for name in ("t_0", "how_scale")}
        count = self._layers.index(start) + 1 if start else 0

        def schedule(steps: int) -> Schedule:
            return Schedule(len(self._layers), steps, start_frozen=count, **rule)

        # What rows take is not measured: a share of the seconds goes into runs, not into measuring.
        rows = Rows(0.0) if "cache" in changes else None
        run = KeptRun(self.costs, self.base.batch_size, lambda num_frozen: rows, not self.base.deterministic)
        return run.steps_within(seconds, schedule, changes.get("views", 1) * self._length.steps_per_epoch)
