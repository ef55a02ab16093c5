"""Keeping: what kept features would save of a run and what they take, before anything is trained."""

import statistics
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from ..batch import call, part, size
from ..features import FeatureCache
from ..features.auto import Measured, best_views
from ..features.columns import Column
from ..features.room import room_for
from ..features.store import Store
from ..features.timing import seconds_of
from ..freezeout import FreezeOut
from ..layers import find_layers
from ..planner import Plan, StepCosts
from ..planner.costs import phases
from ..schedule import Schedule
from ..tasks import Task
from ..text import table
from .config import CACHE_DTYPES, TrainConfig
from .costing import plan_of, unfrozen
from .course import Length
from .trainer import Trainer

SAMPLES = 2  # as few as show what is kept
READS = 6
MOST = 2**62


@dataclass(frozen=True)
class Kept:
    """What keeping features would do for one schedule.

    Attributes:
        views: of each sample; 0 where "auto" would keep none, or nothing can be kept.
        saving: part of full training's cost, filling and reading counted.
        bytes: what the rows take at the most.
    """

    how_scale: str | float
    t_0: float
    views: int
    saving: float
    bytes: int


class Keeping:
    """Predicts runs of `config` that keep features.

    Args:
        trainer: of full training: its net, task and batches.
        plan: of their schedules.
    """

    def __init__(self, trainer: Trainer, config: TrainConfig, plan: Plan, length: Length) -> None:
        self._trainer, self._config, self._plan, self._length = trainer, config, plan, length
        self._costs: StepCosts = plan.costs
        self._rows: dict[int, float | None] = {}
        self._reads: dict[int, float] = {}

    def predicted(self) -> list[Kept]:
        """-> what keeping would do for each prediction of the plan."""
        return [self.of(p.t_0, p.how_scale) for p in self._plan.predictions]

    @staticmethod
    def table(found: Iterable[Kept]) -> str:
        rows: list[tuple[str, ...]] = [("strategy", "t_0", "views", "saving, kept", "MiB kept")]
        for kept in found:
            size = f"{kept.bytes / 2**20:.1f}" if kept.views else "-"
            rows.append((str(kept.how_scale), f"{kept.t_0:g}", str(kept.views), f"{100 * kept.saving:.1f} %", size))
        note = "kept: the frozen layers' outputs are read back; filling is counted, 0 views: nothing is kept"
        return f"{table(rows, left=[0], rule=False)}\n{note}"

    def of(self, t_0: float, how_scale: str | float) -> Kept:
        """-> the prediction of one schedule."""
        schedule = Schedule(len(self._costs.layers), t_0=t_0, how_scale=how_scale, **self._plan.schedule)
        spans = list(phases(schedule, self._plan.tail))
        frozen = [k for k, _ in spans if k]
        views = self._views(spans) if frozen and all(self._row(k) for k in frozen) else 0
        full = schedule.total_steps * self._costs.step(0)
        saving = 1 - self._seconds(spans, views) / full
        if not views:
            return Kept(how_scale, t_0, 0, saving, 0)
        most = max(self._bytes(k) for k in frozen)
        return Kept(how_scale, t_0, views, saving, round(views * self._samples * most))

    @property
    def _samples(self) -> int:
        return self._length.steps_per_epoch * self._config.batch_size

    def _views(self, spans: Sequence[tuple[int, int]]) -> int:
        if not isinstance(self._config.views, str):
            return self._config.views
        before = sum(steps for k, steps in spans if not k)
        k = next(k for k, _ in spans if k)
        each, batch = self._length.steps_per_epoch, self._config.batch_size
        epochs = (sum(steps for _, steps in spans) - before) / each
        one = round(self._samples * self._bytes(k))
        where = self._config.cache
        folder = None if where in (None, "device", "host") else Path(str(where)).absolute()
        while folder is not None and not folder.exists():
            folder = folder.parent
        device = self._trainer.device if where == "device" else torch.device("cpu")
        wait = 0.0 if self._costs.loader_ahead else self._costs.loader
        return best_views(
            Measured(
                prefix=sum(self._costs.frozen_forward[:k]) / batch,
                wait=wait / batch,
                rest=replace(self._costs, loader=0.0).step(k, free_prefix=True) / batch,
                gather=self._gather(k),
                before=before / each,
                epochs=epochs,
                left=epochs,
                frozen=k / len(self._costs.layers),
                fit=max(1, room_for(MOST, device, folder, None, 0) // max(1, one)),
            )
        )

    def _seconds(self, spans: Sequence[tuple[int, int]], views: int) -> float:
        """Of a run whose first `views` epochs behind the first freeze fill; rows that are seen again move on."""
        reading, total, frozen_before = replace(self._costs, loader=0.0), 0.0, 0
        filling, left = views * self._length.steps_per_epoch, sum(steps for _, steps in spans)
        filled = 0
        for k, steps in spans:
            keeps = bool(k and views and k >= frozen_before)  # a tail that thaws runs as ever
            fills = min(steps, filling - filled) if keeps else steps
            total += fills * self._costs.step(k)
            if keeps:
                read = reading.step(k, free_prefix=True) + self._gather(k) * self._config.batch_size
                total += (steps - fills) * read
                total += min(filled, left) * sum(self._costs.frozen_forward[frozen_before:k])
                filled, frozen_before = filled + fills, k
            left -= steps
        return total

    def _bytes(self, k: int) -> float:
        row = self._row(k)
        assert row is not None  # see `of`
        return row

    def _gather(self, k: int) -> float:
        """-> seconds to read a row of as many bytes as one behind k layers, in a batch."""
        if k not in self._reads:
            row, batch, device = max(1, round(self._bytes(k))), self._config.batch_size, self._trainer.device
            where = device if self._config.cache == "device" else torch.device("cpu")
            store = Store([Column((row,), torch.uint8, (0,))], READS * batch, READS * batch, where)
            keys = torch.randperm(READS * batch, generator=torch.Generator().manual_seed(0))
            store.put(keys, [torch.zeros((len(keys), row), dtype=torch.uint8, device=where)])
            taken = [
                seconds_of(partial(store.gather, some, device), device) / batch for some in keys.flip(0).split(batch)
            ]
            self._reads[k] = statistics.median(taken)
        return self._reads[k]

    def _row(self, k: int) -> float | None:
        """-> bytes of a view behind k frozen layers; None where nothing can be kept there."""
        if k not in self._rows:
            with torch.random.fork_rng([] if self._trainer.device.type == "cpu" else None), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self._rows[k] = self._watched(k)
        return self._rows[k]

    def _watched(self, k: int) -> float | None:
        trainer, task = self._trainer, self._trainer.task
        model = Trainer(trainer.config, task).model.train()
        inputs, _ = next(iter(trainer.train_batches()))
        some = part(inputs, 0, max(1, self._config.batch_size // SAMPLES))
        keys = range(size(some))
        cache = FeatureCache(keys, views=1, measure=False, dtype=CACHE_DTYPES[self._config.cache_dtype])
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        freezeout = FreezeOut(
            model, optimizer, total_steps=2, t_0=1.0, start_frozen=k, layers=find_layers(model, task.layers),
            anneal=False, prefix="off", cache=cache,
        )  # fmt: skip
        amp = trainer.amp_dtype
        for _ in range(2):  # what shares memory shows in the second one
            with cache.samples(keys), torch.autocast(trainer.device.type, dtype=amp, enabled=amp is not None):
                call(model, some)
        report = cache.report()
        freezeout.close()
        cache.close()
        return report.bytes / report.rows if report.rows else None


def kept_saving(config: TrainConfig, task: Task, costs: StepCosts, views: int, measured: float) -> dict:
    """What a run of `config` that kept so many views was to save of full training's time, beside what it saved.

    engagement: measured over predicted; None where the prediction is no saving.
    """
    trainer = Trainer(unfrozen(config), task)
    plan = plan_of(config, trainer.length, costs, [config.t_0], [config.how_scale])
    found = Keeping(trainer, replace(config, views=views), plan, trainer.length).of(config.t_0, config.how_scale)
    return {
        "predicted_saving": found.saving,
        "measured_saving": measured,
        "engagement": measured / found.saving if found.saving > 0 else None,
        "predicted_bytes": found.bytes,
    }
