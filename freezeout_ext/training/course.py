"""The course of a run in steps and layers, counted here alone: its length, when its layers freeze, its tail."""

import math
from dataclasses import dataclass
from typing import Any

from ..layers import Layers
from ..planner.costs import Tail
from ..schedule import Schedule
from .config import TrainConfig, parsed_thaw


@dataclass(frozen=True)
class Length:
    """How many optimizer steps a run has."""

    steps_per_epoch: int
    total_steps: int
    warmup_steps: int

    @classmethod
    def of(cls, config: TrainConfig, samples: int) -> "Length":
        """The length of a run of `config` over `samples` training samples."""
        # Whole batches alone: equal steps can be compared, and a batch norm never sees three images.
        steps_per_epoch = max(1, samples // config.batch_size)
        total_steps = config.steps or config.epochs * steps_per_epoch
        return cls(steps_per_epoch, total_steps, config.warmup_steps or round(config.warmup_epochs * steps_per_epoch))

    @property
    def epochs(self) -> int:
        """The last one may be shorter."""
        return math.ceil(self.total_steps / self.steps_per_epoch)

    def end_of(self, epoch: int) -> int:
        """Steps done at the end of epoch 1, 2, ..."""
        return min(epoch * self.steps_per_epoch, self.total_steps)


def tail_of(config: TrainConfig, length: Length, layers: Layers) -> Tail | None:
    """Where the run of a net with these layers thaws; None: nowhere.

    Raises:
        ValueError: no layer of that name; no step before the thaw or none behind it.
    """
    if config.thaw_to is None:
        return None
    layer, fraction = parsed_thaw(config.thaw_to)
    step = round(fraction * length.total_steps)
    if not 0 < step < length.total_steps:
        raise ValueError(
            f"thaw_to must leave a step before it and one behind it, got step {step} of {length.total_steps}"
        )
    return Tail(step, layers.count_through(layer, "thaw_to"))


def has_whole_steps(config: TrainConfig) -> bool:
    """Whether a run has steps with nothing frozen, against which its others are held."""
    return config.start_frozen == 0 or (config.thaw_to is not None and parsed_thaw(config.thaw_to)[0] == 0)


def schedule_options(config: TrainConfig, length: Length, layers: Layers) -> dict[str, Any]:
    """What `Schedule` takes of a run of `config`, apart from the number of layers, t_0, how_scale and scale_lr."""
    start = layers.count_through(config.start_frozen, "start_frozen")
    return {
        "total_steps": length.total_steps,
        "warmup_steps": length.warmup_steps,
        "max_transitions": config.max_transitions,
        **({"start_frozen": start} if start else {}),
    }


def freezing_options(config: TrainConfig, length: Length, layers: Layers) -> dict[str, Any]:
    """What FreezeOut takes of a run of `config` about when its layers freeze, up to its tail.

    Raises:
        ValueError: the tail would thaw nothing.
    """
    options = schedule_options(config, length, layers)
    rule: dict[str, Any] = {"t_0": config.t_0, "how_scale": config.how_scale}
    tail = tail_of(config, length, layers)
    if tail is None:
        return {**options, **rule}
    schedule = Schedule(len(layers), **options, **rule)
    if schedule.num_frozen(tail.step - 1) <= tail.num_frozen:
        raise ValueError(
            f"thaw_to must leave fewer layers frozen than are at step {tail.step},"
            f" {schedule.num_frozen(tail.step - 1)}, got {tail.num_frozen}"
        )
    start = options.get("start_frozen", 0)
    # A layer that would freeze in the tail trains to the end.
    ends = [schedule.t(i) if schedule.milestone(i) <= tail.step - 1 else 1.0 for i in range(start, len(layers))]
    return {**options, "max_transitions": None, "milestones": ends}
