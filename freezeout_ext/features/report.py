"""CacheReport: what a feature cache holds, what it saved, and what it could not do."""

from dataclasses import dataclass


@dataclass(frozen=True)
class CacheReport:
    """What a feature cache holds and has saved. `str()` of it is for people."""

    num_frozen: int  # layers whose outputs are kept now, 0 if none are
    kept: tuple[str, ...]  # the modules whose outputs are kept
    views: int  # of each sample
    rows: int  # views that are kept
    of_rows: int  # views that there are
    bytes: int  # what kept rows take, those of targets included
    where: str  # "device", "host" or the path of a folder
    hits: int  # samples of which no frozen layer ran
    pushed: int  # samples of which only the layers ran that froze since the sample was kept
    misses: int  # samples whose whole prefix ran although features are kept
    samples_read: int  # from the data set
    samples_skipped: int  # that were not read since their features were kept
    seconds_saved: float | None  # hits times what a hit saves; None until both times below are known
    gather_ms: float | None  # to read a sample's features, the median
    prefix_ms: float | None  # to compute them, the median
    checks: int  # cached batches that were computed anew and agreed
    largest_difference: float  # in these, over the allowed one
    notes: tuple[str, ...]  # what happened, and why

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
