"""Worth: whether keeping behind another frontier pays before the run ends: pure maths of counts and seconds."""

from dataclasses import dataclass

# What is to be saved must be more than what it costs by this factor: times of a few forwards are no exact ones, and the
# calls around writing and reading are not in them.
MARGIN = 2.0


@dataclass(frozen=True)
class Left:
    """What is still to come, until more layers freeze and until the run ends: of steps, or of samples."""

    until_next: int
    until_end: int

    def times(self, samples: int) -> "Left":
        return Left(self.until_next * samples, self.until_end * samples)


class Pace:
    """samples: of a step, the most that forwards have brought between two steps: several where gradients add up."""

    def __init__(self) -> None:
        self.samples = self._here = 0
        self._step: int | None = None

    def count(self, step: int, samples: int) -> bool:
        """Notes a forward. Returns whether steps turn out to be larger than was known."""
        self._here = samples if step != self._step else self._here + samples
        self._step, before = step, self.samples
        self.samples = max(before, self._here)
        return self.samples > before


@dataclass(frozen=True)
class Times:
    """Seconds, of a sample but for `watch`.

    layers: of what runs now and would not run where rows are read: frozen layers, and loading where nothing is read
        yet.
    fill, gather: to write a row, and to read one. gathered: to read what is read now, 0 where nothing is.
    again: of frozen layers whose rows must make room, and which run again while new rows are written; else 0.
    watch: the forward that shows what must be kept.
    """

    layers: float
    fill: float = 0.0
    gather: float = 0.0
    gathered: float = 0.0
    again: float = 0.0
    watch: float = 0.0


def reason_against(times: Times, left: Left, rows: int, fitting: int) -> str | None:
    """-> why keeping from now on does not pay; None where it does.

    Each view passes once through the layers that are frozen now, whatever freezes later: kept rows behind any later
    frontier are computed from these. So what is saved is that of the views that are seen again, until the end, and no
    other frontier saves it too. It must be more than writing rows, reading them and the watch. Until the next freeze
    it must be more as well: else the next frontier saves the rest, and this one is left out.

    Args:
        rows: how many views there are. fitting: how many of them there is room for.
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


def _balance(saved: float, cost: float) -> str:
    return f"saves {_text(saved)}, not {MARGIN:g} times the {_text(cost)} that it takes"


def _text(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds >= 10 else f"{1e3 * seconds:.0f} ms"
