"""CacheReport: what a feature cache holds, what it saved, and what it could not do."""

from collections.abc import Sequence
from dataclasses import dataclass

from .forwards import Forwards
from .generations import Generations
from .serving import Serving


@dataclass(frozen=True)
class CacheReport:
    """`str()` of it is for people.

    num_frozen: layers whose outputs are kept now, 0 if none are.
    kept: the modules whose outputs are kept.
    views: of each sample. rows: views that are kept. of_rows: how many there are. bytes: what the rows take.
    hits: samples of which no frozen layer ran. pushed: samples of which only the layers ran that froze since they were
    kept. misses: samples whose whole prefix ran although features are kept.
    samples_read, samples_skipped: read from the data set, and not read since their features were kept.
    seconds_saved: prefix minus gathering over all hits, by medians; None before both were measured.
    gather_ms, prefix_ms: of a sample, medians.
    checks: cached batches that were computed anew and agreed. largest_difference: over the allowed one, in these.
    notes: what happened and why.
    """

    num_frozen: int
    kept: tuple[str, ...]
    views: int
    rows: int
    of_rows: int
    bytes: int
    where: str
    hits: int
    pushed: int
    misses: int
    samples_read: int
    samples_skipped: int
    seconds_saved: float | None
    gather_ms: float | None
    prefix_ms: float | None
    checks: int
    largest_difference: float
    notes: tuple[str, ...]

    def __str__(self) -> str:
        what = f"outputs of {', '.join(self.kept)} behind {self.num_frozen} frozen layers" if self.kept else "nothing"
        lines = [
            f"features: {what}; {self.rows:,} of {self.of_rows:,} rows ({self.views} views a sample), "
            f"{self.bytes / 2**20:.1f} MiB on {self.where}",
            f"prefix not run for {self.hits:,} samples, its new layers alone for {self.pushed:,}, run for "
            f"{self.misses:,}; "
            f"{self.samples_skipped:,} samples not decoded, {self.samples_read:,} read; {self.checks} spot checks",
        ]
        if self.gather_ms is not None and self.prefix_ms is not None:
            lines.append(
                f"a sample: {1e3 * self.gather_ms:.1f} us gathered, {1e3 * self.prefix_ms:.1f} us computed; "
                f"{self.seconds_saved:.1f} s saved"
            )
        return "\n".join(lines + [f"- {note}" for note in self.notes])


def report_of(kept: Generations, forwards: Forwards, serving: Serving, notes: Sequence[str]) -> CacheReport:
    """-> the report of a cache with these parts."""
    now, prefix, gather = kept.latest, forwards.seconds("prefix"), forwards.seconds("gather")
    return CacheReport(
        num_frozen=now.frontier.num_frozen if now else 0,
        kept=tuple(now.frontier.names) if now else (),
        views=kept.views.count,
        rows=len(now.store) if now else 0,
        of_rows=kept.owned,
        bytes=kept.bytes,
        where=kept.where,
        hits=forwards.filling.hits,
        pushed=forwards.filling.pushed,
        misses=forwards.filling.misses,
        samples_read=serving.read,
        samples_skipped=serving.skipped,
        seconds_saved=None if prefix is None or gather is None else forwards.filling.hits * (prefix - gather),
        gather_ms=None if gather is None else 1e3 * gather,
        prefix_ms=None if prefix is None else 1e3 * prefix,
        checks=forwards.checks,
        largest_difference=forwards.difference,
        notes=tuple(notes),
    )
