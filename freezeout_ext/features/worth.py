"""Worth: whether keeping behind another frontier pays before the run ends: pure maths of counts and seconds."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

# What is to be saved must be more than what it costs by this factor: times of a few forwards are no exact ones, and the
# calls around writing and reading are not in them.
MARGIN = 2.0
# Forwards that run as before and are timed, before anything is decided.
TIMED = 3
# Forwards that a watch takes besides its own, until one was timed.
WATCHED = 3.0
# Seconds of a forward that the calls around reading take, and those around writing besides.
CALLS = 1e-3


@dataclass(frozen=True)
class Left:
    """What is still to come, until more layers freeze and until the run ends: of steps, or of samples."""

    until_next: int
    until_end: int

    @classmethod
    def of(cls, schedule: Any, step: int, num_frozen: int) -> "Left":
        """The steps behind `step`, of a run in which num_frozen layers are frozen now."""
        end, milestone = schedule.total_steps, schedule.next_milestone(step)
        # One that was passed by hand freezes nothing.
        while milestone is not None and schedule.num_frozen(milestone) <= num_frozen:
            milestone = schedule.next_milestone(milestone)
        following = end if milestone is None else min(milestone, end)
        return cls(max(following - step, 0), max(end - step, 0))

    def times(self, samples: int) -> "Left":
        return Left(self.until_next * samples, self.until_end * samples)


class Pace:
    """samples: of a step, the most that its forwards have brought, several where gradients add up; 0: not known yet."""

    def __init__(self) -> None:
        self.samples = self._here = 0
        self._step: int | None = None

    def count(self, step: int, samples: int) -> None:
        """Notes a forward. A step is known once the next one has begun."""
        if step != self._step:
            self.samples = max(self.samples, self._here)
            self._step, self._here = step, 0
        self._here += samples


@dataclass(frozen=True)
class Times:
    """Seconds, of a sample but for `watch`."""

    layers: float  # of what would not run where rows are read: frozen layers, and loading where nothing is read yet
    fill: float = 0.0  # to write a row
    gather: float = 0.0  # to read a row
    gathered: float = 0.0  # to read a row of what is read now, 0 where nothing is
    again: float = 0.0  # of frozen layers whose rows must make room, and which run again while new rows are written
    watch: float = 0.0  # of the forward that shows what must be kept

    @classmethod
    def measured(
        cls, samples: int, *, layers: float, wait: float, forward: float, gathered: float | None,
        fill: float = 0.0, gather: float = 0.0, again: float = 0.0, watch: float | None = None,
    ) -> "Times":  # fmt: skip
        """Of forwards over so many samples, the calls around writing and reading added.

        Args:
            layers: of the frozen layers alone.
            wait: for the loader.
            forward: seconds of a whole forward.
            gathered: None where nothing is read now.
            watch: None before one was timed.
        """
        calls = CALLS / samples
        return cls(
            layers + (wait if gathered is None else 0.0), fill + calls, gather + calls,
            0.0 if gathered is None else gathered + calls, again, WATCHED * forward if watch is None else watch,
        )  # fmt: skip


def reason_against(times: Times, left: Left, rows: int, fitting: int) -> str | None:
    """-> why keeping from now on does not pay; None where it does.

    Each view passes once through the layers that are frozen now, whatever freezes later: kept rows behind any later
    frontier are computed from these. So what is saved is that of the views that are seen again, until the end, and no
    other frontier saves it too. It must be more than writing rows, reading them and the watch. Until the next freeze
    it must be more as well: else the next frontier saves the rest, and this one is left out.

    Args:
        rows: how many views there are.
        fitting: how many of them there is room for.
    """
    share = fitting / rows
    if left.until_end <= rows:
        return f"{left.until_end:,} samples are still to come, so none of {rows:,} views is seen again"
    reading = share * (times.gather - times.gathered)
    saved = share * times.layers * (left.until_end - rows)
    cost = times.watch + fitting * (times.fill + times.again) + reading * left.until_end
    if saved <= MARGIN * cost:
        return f"until the end it {_balance(saved, cost)}"
    saved = share * times.layers * left.until_next
    written = share * min(left.until_next, rows)
    cost = times.watch + written * (times.fill + times.again) + reading * left.until_next
    if left.until_next < left.until_end and saved <= MARGIN * cost:
        return f"the next layer freezes in {left.until_next:,} samples, until then it {_balance(saved, cost)}"
    return None


@dataclass(frozen=True)
class Stretch:
    """Steps of a run between two changes of what is frozen or kept."""

    num_frozen: int  # layers
    steps: int
    frontier: int  # layers behind which rows are kept, 0 where nothing is
    fills: int  # steps that compute and write new rows; the others read, where there is a frontier
    before: int | None = None  # the frontier that this one has moved on from; None: it is that of the steps before
    moves: int = 0  # steps whose rows pass from there through the layers between


def kept_stretches(
    phases: Iterable[tuple[int, int]], views: int, pays: Callable[[int, int, Left], bool], *, timed: int = TIMED
) -> Iterator[Stretch]:
    """What a run keeps, step by step.

    Args:
        phases: (num_frozen, steps) of each stretch between two transitions.
        views: steps over which all views are seen once.
        pays: (frontier now, num_frozen, steps left) -> whether keeping behind these layers pays.
        timed: steps that a transition runs as before, until that is decided.
    """
    spans = list(phases)
    ahead, frontier, filled, frozen = sum(steps for _, steps in spans), 0, 0, 0
    for num_frozen, steps in spans:
        if num_frozen < frozen:  # thawed: what was kept is gone
            frontier = filled = 0
        left = Left(steps - timed, ahead - timed)
        moves = num_frozen not in (0, frozen) and left.until_next > 0 and pays(frontier, num_frozen, left)
        frozen, before, passing = num_frozen, None, 0
        for part, opens in ((timed, False), (steps - timed, True)) if moves else ((steps, False),):
            if opens:
                before, frontier, passing = frontier, num_frozen, min(filled, ahead)
            fills = min(part, views - filled) if frontier else 0
            yield Stretch(num_frozen, part, frontier, fills, before, passing)
            filled, ahead = filled + fills, ahead - part


def _balance(saved: float, cost: float) -> str:
    return f"saves {_text(saved)}, not {MARGIN:g} times the {_text(cost)} that it takes"


def _text(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds >= 10 else f"{1e3 * seconds:.0f} ms"
