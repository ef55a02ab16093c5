"""KeptRun: what a run that keeps features would keep and cost, step by step, by the cache's own judgement."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from ..features.spot import due_among
from ..features.worth import CALLS, TIMED, WATCHED, Left, Stretch, Times, kept_stretches, reason_against
from ..planner import StepCosts
from ..planner.costs import Tail, phases
from ..schedule import Schedule


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
