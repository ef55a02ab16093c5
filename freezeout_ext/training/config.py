"""TrainConfig: all that decides the weights of a run."""

import argparse
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from typing import Any

import torch

from ..arguments import check_count, check_flag, check_kind, check_number
from ..prefix import MODES
from ..schedule import Schedule
from ..tasks import DATA, Task
from ..tasks.nets import net_names

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
MOST_STEPS, MOST_SEED = 10**12, 2**63 - 1
# Of a net that comes with weights, and of any net of timm: a smaller rate and fewer epochs than the paper's nets want.
TUNED: dict[str, Any] = {"optimizer": "fused-adamw", "weight_decay": 0.01, "epochs": 10, "batch_size": 50}


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


def _field(default: Any, check: Callable[[str, Any], None], text: str, **option: Any) -> Any:
    """A field whose value `check` checks by itself, and the option of the command line that gives it."""
    return field(default=default, metadata={"check": check, "option": {"help": text, **option}})


def _count(default: int | None, text: str, least: int = 1, most: int | None = None, **option: Any) -> Any:
    return _field(default, partial(check_count, least=least, most=most), text, **{"type": int, **option})


def _number(default: float | None, text: str) -> Any:
    return _field(default, check_number, text, type=float)


def _flag(default: bool | None, text: str, action: Any = argparse.BooleanOptionalAction) -> Any:
    return _field(default, check_flag, text, action=action)


def _choice(default: str | None, choices: tuple[str, ...], text: str) -> Any:
    return _field(default, partial(_check_choice, choices=choices), text, choices=choices)


def _text(default: str | None, text: str, **option: Any) -> Any:
    return _field(default, _check_text, text, **option)


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def _check_text(name: str, value: object) -> None:
    check_kind(name, value, str, "a string")
    if name == "cache" and not value:
        raise ValueError("cache must be device, host or a folder, got ''")


def _check_count_or_word(name: str, value: object, least: int, words: tuple[str, ...] = ()) -> None:
    """A whole number, or one of `words`; any string where there are none."""
    if not isinstance(value, str):
        check_count(name, value, least)
    elif words:
        _check_choice(name, value, words)


def _left_to_schedule(name: str, value: object) -> None:
    """What the schedule checks."""


def _power_or_name(text: str) -> str | float:
    try:
        return float(text)
    except ValueError:
        return text


def _count_or_name(text: str) -> int | str:
    return int(text) if text.isdecimal() else text


_OWN = " with weights or a net of timm; a task's own"


@dataclass(frozen=True)
class TrainConfig:
    """weights = f(TrainConfig): on one machine, runs of equal configs end in the same weights, bit for bit.

    This holds on a CPU with prefix "exact" or "off". A run that was stopped and resumed ends in the same weights too.
    On CUDA, and with a prefix of its own arithmetic ("folded", "bf16", "fp16"), it holds with `deterministic`: else
    such a prefix is kept or left by its time.
    Where data lies and what is shown is no part of the config.
    A field that is None means "choose", see `resolved`. What a field is stands beside it; `freezeout train --help`
    prints it.

    thaw_to: from that part of the steps on no further layer freezes. None thaws nothing.
    views: what "auto" takes goes by the clock, but a run that resumes takes what it took.
    graph: on a CPU the step is eager.
    """

    data: str = _text("digits", "built-in data (digits)", choices=DATA)
    val_fraction: float = _number(0.0, "share of the training images held out (0)")
    model: str = _text("wrn-16-1", "; ".join(net_names()) + " (wrn-16-1)", metavar="NAME")
    image_size: int | None = _count(None, "side of the inputs (imagefolder 224, else that of the images)", metavar="N")
    weights: str | None = _text(
        None, "state dict to start from; pretrained: the weights that the net's package brings", metavar="FILE"
    )
    fingerprint: str | None = _text(None, "of the code of the user's file that holds the task")
    method: str = _choice(
        "freezeout", METHODS, "full: plain training, one cosine; no-anneal: one cosine, layers freeze all the same"
    )
    epochs: int = _count(30, f"length of the run (30; {TUNED['epochs']}{_OWN})", most=MOST_STEPS)
    steps: int | None = _count(None, "length of the run in optimizer steps, instead of --epochs", most=MOST_STEPS)
    batch_size: int = _count(64, f"samples a step (64; {TUNED['batch_size']}{_OWN})")
    optimizer: str = _choice("fused-sgd", OPTIMIZERS, f"(fused-sgd; {TUNED['optimizer']}{_OWN})")
    lr: float | None = _number(None, "peak learning rate (0.1; AdamW 0.001; that of the task's optimizer)")
    momentum: float = _number(0.9, "Nesterov's, for SGD (0.9)")
    weight_decay: float = _number(1e-4, f"(0.0001; {TUNED['weight_decay']}{_OWN})")
    warmup_steps: int = _count(0, "steps in which the rates rise to their peak (0)", least=0)
    warmup_epochs: float = _number(0.0, "the same in epochs")
    t_0: float = _field(0.8, _left_to_schedule, "where layer 0 freezes, in (0, 1] (0.8)", type=float, metavar="T0")
    how_scale: str | float = _field(
        "cubic", _left_to_schedule, "linear, squared, cubic or a power (cubic)", type=_power_or_name, metavar="SCALE"
    )
    scale_lr: bool | None = _flag(None, "rates times 1/t_i (yes; AdamW: no)")
    max_transitions: int | None = _count(None, "freeze at no more than K moments", metavar="K")
    start_frozen: int | str = _field(
        0,
        partial(_check_count_or_word, least=0),
        "this layer and all before it, or so many, are frozen from the first step on",
        type=_count_or_name,
        metavar="LAYER",
    )
    thaw_to: str | None = _text(
        None,
        "from this part of the steps on only this layer and all before it, or so many, stay frozen: 0@0.8",
        metavar="LAYER@PART",
    )
    cache: str | None = _text(
        None, "keep what the frozen layers give (off)", nargs="?", const="device", metavar="device|host|DIR"
    )
    views: int | str = _field(
        4,
        partial(_check_count_or_word, least=1, words=("auto",)),
        "of each sample, that are kept (4)",
        type=_count_or_name,
        metavar="K|auto",
    )
    cache_dtype: str | None = _choice(
        None, tuple(name for name in CACHE_DTYPES if name), "of what is kept (as computed)"
    )
    prefix: str | None = _choice(None, MODES, "how the frozen layers run")
    graph: bool = _flag(False, "the step as a CUDA graph (no)")
    compile: bool = _flag(False, "torch.compile layer by layer (no)")
    augment: bool = _flag(True, "crop and flip (yes)")
    amp: str | None = _choice(None, tuple(AMP_DTYPES), "mixed precision (bf16 on CUDA, off on CPU)")
    channels_last: bool | None = _flag(None, "memory format of nets of images (yes)")
    device: str = _choice("auto", ("auto", "cpu", "cuda"), "(auto: CUDA where there is one)")
    deterministic: bool = _flag(
        False, "bit-identical runs on CUDA and with any --prefix, at some cost", action="store_true"
    )
    threads: int | None = _count(
        None, "CPU threads of torch (torch's choice: all cores; 1 where other programs run)", most=1024
    )
    seed: int = _count(0, "of weights, data order and augmentation (0)", least=0, most=MOST_SEED)

    def resolved(self) -> "TrainConfig":
        """The config with every choice made for this machine, checked; max_transitions is 4 where layers are compiled.

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
            # On a CPU too: the small nets then take 0.65 to 0.8 of the time.
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
        known = {each.name for each in fields(cls)}
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
    for each in fields(config):
        value = getattr(config, each.name)
        if value is not None or each.default is not None:
            each.metadata["check"](each.name, value)
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
