"""The arms of a comparison: the ways in which one task is trained."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from ..arguments import check_kind
from ..schedule import Schedule
from .config import TrainConfig

# no-anneal: one cosine; layers freeze all the same.
# cached: no-anneal with kept features, whose filling counts.
# short: full training on a cosine as long as the seconds of freezeout, or of cached.
# const-time: freezeout as long as full training's seconds.
KINDS = ("full", "freezeout", "no-anneal", "cached", "short", "const-time")
DEFAULT_KINDS = KINDS[:-1]
MATCHED = ("short", "const-time")
# Those for which a `short` runs.
RATED = ("freezeout", "cached")


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Attributes:
        kind: one of KINDS.
        t_0: of the FreezeOut that the arm is, or whose seconds the arm is matched to.
        how_scale: of the same FreezeOut.
        part: of the steps that the run takes; below 1 with full training on a shorter cosine.
        of: kind of the arm whose seconds a `short` takes.
    """

    kind: str
    t_0: float | None = None
    how_scale: str | float | None = None
    part: float = 1.0
    of: str = "freezeout"

    @property
    def name(self) -> str:
        if self.kind == "full":
            return "full" if self.part == 1 else f"full x{self.part:g}"
        of = "" if self.of == "freezeout" else f" {self.of}"
        return f"{self.kind}{of} {self.how_scale} {self.t_0:g}"

    @property
    def rival(self) -> "Arm | None":
        """The arm that takes as many seconds without freezing."""
        return Arm("short", self.t_0, self.how_scale, of=self.kind) if self.kind in RATED else None

    @property
    def freezes(self) -> bool:
        return self.kind not in ("full", "short")

    def config(self, base: TrainConfig, seed: int, steps: int | None = None) -> TrainConfig:
        """The config of this arm's run; `steps` is the length of a matched arm."""
        method = {"short": "full", "const-time": "freezeout", "cached": "no-anneal"}.get(self.kind, self.kind)
        config = replace(base, method=method, seed=seed, steps=steps or base.steps, cache=None)
        if self.kind == "cached":
            kept = base.cache or "device"
            # What lies in a folder is of one seed and one way of freezing.
            in_memory = kept in ("device", "host")
            config = replace(config, cache=kept if in_memory else str(Path(kept) / self.name / f"seed-{seed}"))
            if base.cache is None and base.views == TrainConfig.views and not base.deterministic:
                config = replace(config, views="auto")  # nobody has chosen: never more than fits
        if method == "full":
            config = replace(config, start_frozen=0, thaw_to=None)
        else:
            assert self.t_0 is not None and self.how_scale is not None  # an arm that freezes has both
            config = replace(config, t_0=self.t_0, how_scale=self.how_scale)
        return config.resolved()


def make_arms(
    kinds: Iterable[str], t_0s: Iterable[float], how_scales: Iterable[str | float], parts: Iterable[float] = ()
) -> list[Arm]:
    """The arms of `kinds`, one for each (how_scale, t_0). What a matched arm is matched to is added.

    Args:
        parts: of full training's steps, in (0, 1). Each adds full training on a cosine of that length.
    """
    parts = list(parts)
    for part in parts:
        check_kind("shorter", part, int | float, "parts in (0, 1)")
        if not 0 < part < 1:
            raise ValueError(f"shorter must be parts in (0, 1), got {part}")
    parts = sorted(set(parts), reverse=True)
    kinds = list(dict.fromkeys([*kinds, *["full"] * bool(parts)]))
    if odd := [kind for kind in kinds if kind not in KINDS] or (not kinds and ["none"]):
        raise ValueError(f"arms must be of {', '.join(KINDS)}, got {odd[0]!r}")
    if any(kind in MATCHED for kind in kinds):
        kinds += ["full"] + [kind for kind in ("freezeout",) if "const-time" in kinds or "cached" not in kinds]
    variants = list(dict.fromkeys((t_0, how_scale) for how_scale in how_scales for t_0 in t_0s))
    for t_0, how_scale in variants:
        Schedule(2, 1, t_0=t_0, how_scale=how_scale)  # checks both
    arms = []
    for kind in KINDS:
        if kind in kinds:
            if kind == "short":
                arms += [Arm(kind, *variant, of=of) for of in RATED if of in kinds for variant in variants]
            else:
                arms += [Arm(kind)] if kind == "full" else [Arm(kind, *variant) for variant in variants]
            arms += [Arm("full", part=part) for part in parts] if kind == "full" else []
    return arms
