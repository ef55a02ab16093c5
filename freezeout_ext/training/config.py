"""TrainConfig: all that decides the weights of a run."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch

from ..arguments import check_count, check_flag, check_kind, check_number
from ..prefix import MODES
from ..schedule import Schedule
from ..tasks import Task

METHODS = ("freezeout", "full", "no-anneal")
# "task": the one that the task makes.
OPTIMIZERS = ("fused-sgd", "sgd", "fused-adamw", "adamw", "task")
AMP_DTYPES = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}
# Each compiles the layers at the frontier anew.
COMPILED_TRANSITIONS = 4
# The model of a user's own task has no name.
OWN_MODEL = "own"
# Fields that finished runs of earlier versions lack.
LATER_FIELDS = ("image_size", "weights", "fingerprint", "start_frozen", "thaw_to", "cache", "views", "cache_dtype")
# Of kept features.
CACHE_DTYPES = {None: None, "bf16": torch.bfloat16, "fp16": torch.float16, "int8": torch.int8}
# What a field may be: whole numbers from least to most, numbers that are not negative, one of several words.
MOST_STEPS, MOST_SEED = 10**12, 2**63 - 1
COUNTS: dict[str, tuple[int, int | None]] = {
    "epochs": (1, MOST_STEPS),
    "steps": (1, MOST_STEPS),
    "warmup_steps": (0, None),
    "batch_size": (1, None),
    "image_size": (1, None),
    "max_transitions": (1, None),
    "start_frozen": (0, None),
    "views": (1, None),
    "threads": (1, 1024),
    "seed": (0, MOST_SEED),
}
NUMBERS = ("lr", "momentum", "weight_decay", "warmup_epochs", "val_fraction")
FLAGS = ("scale_lr", "graph", "compile", "augment", "channels_last", "deterministic")
CHOICES = {
    "method": METHODS,
    "optimizer": OPTIMIZERS,
    "device": ("auto", "cpu", "cuda"),
    "amp": tuple(AMP_DTYPES),
    "prefix": MODES,
    "cache_dtype": tuple(name for name in CACHE_DTYPES if name),
}


class BadInput(Exception):
    """One sentence on what is wrong with what was given."""


@contextmanager
def faults_of_input() -> Iterator[None]:
    """Turns the errors of loading, checking and building into BadInput."""
    try:
        yield
    except BrokenPipeError:  # of what reads stdout, not of the input
        raise
    except (ValueError, TypeError, OverflowError, OSError, ImportError) as error:
        raise BadInput(" ".join(str(error).split())) from error


# Of a net that comes with weights, and of any net of timm: a smaller rate and fewer epochs than the paper's nets want.
TUNED: dict[str, Any] = {"optimizer": "fused-adamw", "weight_decay": 0.01, "epochs": 10, "batch_size": 50}


@dataclass(frozen=True)
class TrainConfig:
    """weights = f(TrainConfig): on one machine, runs of equal configs end in the same weights, bit for bit.

    This holds on a CPU with prefix "exact" or "off". A run that was stopped and resumed ends in the same weights too.
    On CUDA, and with a prefix of its own arithmetic ("folded", "bf16", "fp16"), it holds with `deterministic`: else
    such a prefix is kept or left by its time.
    Where data lies and what is shown is no part of the config.
    A field that is None means "choose", see `resolved`.

    Args:
        data: a built-in set, or the name of the task.
        model: of a built-in task; else "own".
        image_size: side of a built-in task's inputs; None: that of its images.
        weights: of a built-in task, see `tasks.nets.find_net`.
        fingerprint: of the code of the user's file that holds the task.
        method: one of METHODS.
            "full": plain training on one cosine.
            "no-anneal": one cosine; layers freeze at their milestones all the same.
        steps: length of the run in optimizer steps, instead of `epochs`.
        optimizer: one of OPTIMIZERS.
        lr: peak learning rate; None with the task's own optimizer.
        momentum: of SGD, Nesterov's where it is above 0.
        warmup_epochs: instead of warmup_steps.
        t_0: see `Schedule`.
        how_scale: see `Schedule`.
        scale_lr: see `Schedule`.
        max_transitions: see `Schedule`.
        start_frozen: layers that are frozen from the first step on, see `FreezeOut`.
        thaw_to: "LAYER@PART", such as "blocks.2@0.8" or "0@0.8". From that part of the steps on only this layer and all
            before it, or so many, stay frozen, and no further layer freezes. None thaws nothing.
        cache: where the frozen layers' outputs are kept: "device", "host" or a folder. None runs the layers each time.
        views: of each sample, or "auto", see `FeatureCache`. What "auto" takes goes by the clock, but a run that
            resumes takes what it took.
        cache_dtype: of what is kept: "bf16", "fp16", "int8". None keeps it as computed.
        prefix: how the frozen layers run, see `FreezeOut`.
        deterministic: nothing is chosen by the clock, and CUDA's kernels add in a fixed order. This is slower.
        graph: the step as a CUDA graph, see `GraphedStep`. On a CPU the step is eager.
        compile: torch.compile layer by layer, see `CompiledLayers`.
        threads: torch's intra-op threads.
    """

    data: str = "digits"
    val_fraction: float = 0.0
    model: str = "wrn-16-1"
    image_size: int | None = None
    weights: str | None = None
    fingerprint: str | None = None
    method: str = "freezeout"
    epochs: int = 30
    steps: int | None = None
    batch_size: int = 64
    optimizer: str = "fused-sgd"
    lr: float | None = None
    momentum: float = 0.9
    weight_decay: float = 1e-4
    warmup_steps: int = 0
    warmup_epochs: float = 0.0
    t_0: float = 0.8
    how_scale: str | float = "cubic"
    scale_lr: bool | None = None
    max_transitions: int | None = None
    start_frozen: int | str = 0
    thaw_to: str | None = None
    cache: str | None = None
    views: int | str = 4
    cache_dtype: str | None = None
    prefix: str | None = None
    graph: bool = False
    compile: bool = False
    augment: bool = True
    amp: str | None = None
    channels_last: bool | None = None
    device: str = "auto"
    deterministic: bool = False
    threads: int | None = None
    seed: int = 0

    def resolved(self) -> "TrainConfig":
        """The config with every choice made for this machine, checked.

        device: CUDA where there is one.
        lr: 0.1, of AdamW 0.001.
        amp: bf16 on CUDA.
        channels_last: yes. On a CPU too the small nets then take 0.65 to 0.8 of the time.
        scale_lr: not for AdamW.
        max_transitions: 4 where layers are compiled.

        Raises:
            ValueError, TypeError: a value out of its range or of another kind, by name.
        """
        _check(self)
        device = self.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device must be cpu or auto here, got cuda: torch finds no CUDA device")
        cuda, adam, own = device == "cuda", self.optimizer.endswith("adamw"), self.optimizer == "task"
        return replace(
            self,
            device=device,
            lr=self.lr if self.lr is not None or own else (0.001 if adam else 0.1),
            amp=("bf16" if cuda and torch.cuda.is_bf16_supported() else "off") if self.amp is None else self.amp,
            channels_last=self.channels_last is not False,
            scale_lr=not adam if self.scale_lr is None and not own else self.scale_lr,
            max_transitions=self.max_transitions or (COMPILED_TRANSITIONS if self.compile else None),
        )

    def to_dict(self) -> dict:
        return asdict(self)

    @property
    def title(self) -> str:
        """What is trained, in a few words."""
        return self.data if self.model == OWN_MODEL else f"{self.data}, {self.model}"

    @classmethod
    def of_task(cls, task: Task) -> "TrainConfig":
        """The config that trains a user's own task as the task says."""
        own = "adamw" if task.make_optimizer is None else "task"
        return cls(
            data=task.name,
            model=OWN_MODEL,
            epochs=task.epochs,
            batch_size=task.batch_size,
            optimizer=own,
            weight_decay=0.01,
            fingerprint=task.fingerprint,
        )

    @classmethod
    def from_dict(cls, values: Mapping) -> "TrainConfig":
        """Raises ValueError where the fields are not those of this version, or of a kind that they cannot be."""
        known = {field.name for field in fields(cls)}
        if odd := known.symmetric_difference(values) - set(LATER_FIELDS):
            raise ValueError(f"config must have the fields of this version, it differs in {', '.join(sorted(odd))}")
        config = cls(**values)
        try:
            _check(config)
        except TypeError as error:
            raise ValueError(f"config has a field of another kind: {error}") from None
        return config

    def difference(self, other: "TrainConfig") -> str | None:
        """`lr is 0.1 there, 0.2 here` for each field in which self (there) and other (here) differ, else None."""
        there, here = asdict(self), asdict(other)
        if there.pop("fingerprint") != here.pop("fingerprint") and there == here:
            return f"the code of {self.data} has changed since"
        found = [f"{name} is {there[name]!r} there, {here[name]!r} here" for name in there if there[name] != here[name]]
        return "; ".join(found) or None


def parsed_thaw(text: str) -> tuple[int | str, float]:
    """ "blocks.2@0.8" -> ("blocks.2", 0.8); "0@80%" -> (0, 0.8)."""
    layer, _, part = text.rpartition("@")
    try:
        fraction = float(part.removesuffix("%")) / (100 if part.endswith("%") else 1)
    except ValueError:
        fraction = math.nan
    if not layer or not 0 < fraction < 1:
        raise ValueError(f"thaw_to must be LAYER@PART with a part of the run in (0, 1), such as 0@0.8, got {text!r}")
    return int(layer) if layer.isdecimal() else layer, fraction


def _check(config: TrainConfig) -> None:
    for field in fields(config):
        value = getattr(config, field.name)
        if value is not None or field.default is not None:
            _check_field(field.name, value)
    if config.method == "full":
        for name in ("cache", "thaw_to"):
            if getattr(config, name) is not None:
                raise ValueError(f"{name} must be None where no layer freezes, method is full")
    if config.thaw_to is not None:
        parsed_thaw(config.thaw_to)
    if config.views == "auto" and config.deterministic:
        raise ValueError("views must be a number with deterministic, auto goes by measured times")
    if config.lr is not None and config.optimizer == "task":
        raise ValueError("lr is the task's own where the task makes the optimizer: name an optimizer too")
    if config.val_fraction >= 1:
        raise ValueError(f"val_fraction must be in [0, 1), got {config.val_fraction}")
    if config.warmup_steps and config.warmup_epochs:
        raise ValueError("warmup_steps and warmup_epochs must not both be given")
    Schedule(2, 1, t_0=config.t_0, how_scale=config.how_scale)  # checks both


def _check_field(name: str, value: Any) -> None:
    """The value by itself; that of t_0 and how_scale is the schedule's to check."""
    if name == "views" and isinstance(value, str):
        _check_choice(name, value, ("auto",))
    elif name == "start_frozen" and isinstance(value, str):
        return
    elif name in COUNTS:
        check_count(name, value, *COUNTS[name])
    elif name in CHOICES:
        _check_choice(name, value, CHOICES[name])
    elif name in NUMBERS:
        check_number(name, value)
    elif name in FLAGS:
        check_flag(name, value)
    elif name not in ("t_0", "how_scale"):
        check_kind(name, value, str, "a string")
        if name == "cache" and not value:
            raise ValueError("cache must be device, host or a folder, got ''")


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
