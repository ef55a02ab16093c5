"""Keeping: what kept features would save of a run and what they take, before anything is trained."""

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ..batch import call, part, size
from ..features import FeatureCache
from ..features.auto import Measured, best_views
from ..features.moves import trial
from ..features.room import room_for
from ..features.spot import due_among
from ..features.worth import CALLS, TIMED, WATCHED, Left, Stretch, Times, kept_stretches, reason_against
from ..freezeout import FreezeOut
from ..layers import find_layers
from ..planner import Plan, StepCosts
from ..planner.costs import Tail, phases
from ..schedule import Schedule
from ..tasks import Task
from ..text import table
from .config import CACHE_DTYPES, TrainConfig
from .costing import plan_of, unfrozen
from .course import Length
from .trainer import Trainer

SAMPLES = 2  # as few as show what is kept
READS = 3  # what shares memory shows in the second one
MOST = 2**62


@dataclass(frozen=True)
class Rows:
    """What keeping a view's outputs behind some layers takes.

    Attributes:
        bytes: of a row.
        fill: seconds to write a row, in a batch.
        gather: seconds to read a row, in a batch.
    """

    bytes: float
    fill: float = 0.0
    gather: float = 0.0


@dataclass(frozen=True)
class KeptRun:
    """Predicts what a run keeps, and its seconds, by the cache's own judgement.

    Attributes:
        costs: of its steps.
        batch_size: samples of a step.
        rows: number of layers -> what keeping behind them takes; None where nothing can be kept there.
        decides: whether the cache keeps rows only where that pays.
    """

    costs: StepCosts
    batch_size: int
    rows: Callable[[int], Rows | None]
    decides: bool = True

    def stretches(
        self, schedule: Schedule, tail: Tail | None, views: int, *, first: int | None = None
    ) -> list[Stretch]:
        """-> what is kept when.

        Args:
            views: steps over which all views are seen once.
            first: the same of the views that are kept at first, where their number is decided later.
        """
        costs, batch = self.costs, self.batch_size

        def pays(frontier: int, num_frozen: int, left: Left) -> bool:
            count, left = batch * (views if frontier or first is None else first), left.times(batch)
            if self.decides and reason_against(Times(layers=math.inf), left, count, count) is not None:
                return False  # whatever the times, which take a while to measure
            rows, now = self.rows(num_frozen), self.rows(frontier) if frontier else None
            if rows is None or not self.decides:
                return rows is not None
            times = Times.measured(
                batch,
                layers=sum(costs.frozen_forward[frontier:num_frozen]) / batch,
                wait=0.0 if costs.loader_ahead else costs.loader / batch,
                forward=self._forward(num_frozen),
                gathered=None if now is None else now.gather,
                fill=rows.fill,
                gather=rows.gather,
            )
            return reason_against(times, left, count, count) is None

        return list(kept_stretches(phases(schedule, tail), views, pays, timed=TIMED if self.decides else 0))

    def seconds(self, stretches: Iterable[Stretch]) -> float:
        """-> of the whole run: filling, moving, reading, watches and spot checks counted."""
        costs, batch, total, read = self.costs, self.batch_size, 0.0, 0
        reading = replace(costs, loader=0.0)
        for s in stretches:
            rows = self.rows(s.frontier) if s.frontier else None
            if rows is None:
                total += s.steps * costs.step(s.num_frozen)
                continue
            reads, fill = s.steps - s.fills, batch * rows.fill + CALLS
            total += s.fills * (costs.step(s.num_frozen) + fill)
            beyond = sum(costs.frozen_forward[s.frontier : s.num_frozen])
            step = reading.step(s.num_frozen, free_prefix=True) + beyond + batch * rows.gather + CALLS
            total += reads * step
            if s.before is not None:
                passed = sum(costs.frozen_forward[s.before : s.frontier])
                total += WATCHED * self._forward(s.num_frozen) + s.moves * (passed + fill)
            anew = sum(costs.frozen_forward[: s.frontier]) + (0.0 if costs.loader_ahead else costs.loader)
            total += due_among(read, reads) * anew
            read += reads
        return total

    def steps_within(self, seconds: float, schedule: Callable[[int], Schedule], views: int) -> int:
        """n, at least 1, so that a run of n steps by schedule(n) that keeps `views` steps' rows costs `seconds`."""

        def fits(steps: int) -> bool:
            return self.seconds(self.stretches(schedule(steps), None, views)) <= seconds

        low, high = 1, 2
        while fits(high):
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        return low

    def _forward(self, num_frozen: int) -> float:
        """-> seconds of a whole forward."""
        return sum(self.costs.frozen_forward[:num_frozen]) + sum(self.costs.forward[num_frozen:])


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
        self._found: dict[int, Rows | None] = {}

    def predicted(self) -> list[Kept]:
        """-> what keeping would do for each prediction of the plan."""
        return [self.of(p.t_0, p.how_scale) for p in self._plan.predictions]

    @staticmethod
    def table(found: Iterable[Kept]) -> str:
        rows: list[tuple[str, ...]] = [("strategy", "t_0", "views", "saving, kept", "MiB kept")]
        for kept in found:
            size = f"{kept.bytes / 2**20:.1f}" if kept.views else "-"
            rows.append((str(kept.how_scale), f"{kept.t_0:g}", str(kept.views), f"{100 * kept.saving:.1f} %", size))
        note = "kept: the frozen layers' outputs are read back; filling is counted; 0 views: keeping would not pay"
        return f"{table(rows, left=[0], rule=False)}\n{note}"

    def of(self, t_0: float, how_scale: str | float) -> Kept:
        """-> the prediction of one schedule."""
        schedule = Schedule(len(self._costs.layers), t_0=t_0, how_scale=how_scale, **self._plan.schedule)
        run = KeptRun(self._costs, self._config.batch_size, self._rows, not self._config.deterministic)
        spans, each = list(phases(schedule, self._plan.tail)), self._length.steps_per_epoch
        views = self._views(spans) if any(k for k, _ in spans) else 0
        first = each if isinstance(self._config.views, str) else None
        stretches = list(kept_stretches(spans, 0, lambda *_: False))
        if views:
            stretches = run.stretches(schedule, self._plan.tail, each * views, first=first)
        saving = 1 - run.seconds(stretches) / (schedule.total_steps * self._costs.step(0))
        kept = [rows.bytes for s in stretches if s.frontier and (rows := self._rows(s.frontier))]
        if not kept:
            return Kept(how_scale, t_0, 0, saving, 0)
        return Kept(how_scale, t_0, views, saving, round(views * self._samples * max(kept)))

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
        rows = self._rows(k)
        if rows is None:
            return 0
        one = round(self._samples * rows.bytes)
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
                gather=rows.gather,
                before=before / each,
                epochs=epochs,
                left=epochs,
                frozen=k / len(self._costs.layers),
                fit=max(1, room_for(MOST, device, folder, None, 0) // max(1, one)),
            )
        )

    def _rows(self, k: int) -> Rows | None:
        """-> what keeping behind k frozen layers takes; None where nothing can be kept there."""
        if k not in self._found:
            with torch.random.fork_rng([] if self._trainer.device.type == "cpu" else None), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self._found[k] = self._watched(k)
        return self._found[k]

    def _watched(self, k: int) -> Rows | None:
        trainer, task, batch = self._trainer, self._trainer.task, self._config.batch_size
        model = Trainer(trainer.config, task).model.train()
        inputs, _ = next(iter(trainer.train_batches()))
        some = part(inputs, 0, max(1, batch // SAMPLES))
        keys = range(size(some))
        dtype = CACHE_DTYPES[self._config.cache_dtype]
        cache = FeatureCache(keys, views=1, measure=False, dtype=dtype)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        freezeout = FreezeOut(
            model, optimizer, total_steps=2, t_0=1.0, start_frozen=k, layers=find_layers(model, task.layers),
            anneal=False, prefix="off", cache=cache,
        )  # fmt: skip
        amp = trainer.amp_dtype
        with torch.autocast(trainer.device.type, dtype=amp, enabled=amp is not None):
            rows: tuple[torch.Tensor, ...] | None = None
            for _ in range(READS):
                with cache.samples(keys):
                    rows = cache.rows() if rows is None else rows  # None where a spot check is due
                    call(model, some)
            report = cache.report()
        freezeout.close()
        cache.close()
        if not report.rows:
            return None
        row, where = report.bytes / report.rows, trainer.device
        outputs = [torch.cat([x] * -(-batch // len(x)))[:batch] for x in rows or ()]
        if not outputs:  # of rows that differ in length
            outputs, dtype = [torch.zeros((batch, round(row)), dtype=torch.uint8, device=where)], None
        _, fill, gather = trial(outputs, dtype, where if self._config.cache == "device" else torch.device("cpu"))
        return Rows(row, fill, gather)


def kept_saving(config: TrainConfig, task: Task, costs: StepCosts, views: int, measured: float) -> dict:
    """What a run of `config` that kept so many views was to save of full training's time, beside what it saved.

    engagement: measured over predicted; None where the prediction is no saving.
    """
    trainer = Trainer(unfrozen(config), task)
    plan = plan_of(config, trainer.length, trainer.layers, costs, [config.t_0], [config.how_scale])
    found = Keeping(trainer, replace(config, views=views), plan, trainer.length).of(config.t_0, config.how_scale)
    return {
        "predicted_saving": found.saving,
        "measured_saving": measured,
        "engagement": measured / found.saving if found.saving > 0 else None,
        "predicted_bytes": found.bytes,
    }
