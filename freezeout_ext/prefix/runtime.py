"""How a captured prefix runs: the engine for a mode and device, checked against eager, timed against eager in turn."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from .cpu import Arena, CpuEngine, unsupported_dtype
from .folding import Program, first_line

MODES = ("exact", "folded", "bf16", "fp16", "off")
HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
# Largest error against eager, over eager's largest value. Folding rounds each weight anew: about 1e-6 a net.
TOLERANCE = {"exact": 0.0, "folded": 1e-5, "bf16": 5e-2, "fp16": 2e-2}
ROUNDS = 3
PROBE_SAMPLES = 4


class Refused(Exception):
    """This way of running the prefix is not used; the message says why."""


@contextmanager
def constant() -> Iterator[None]:
    """No graph, and ordinary tensors: what is made under inference_mode cannot be saved for backward later."""
    with torch.inference_mode(False), torch.no_grad():
        yield


@contextmanager
def same_random_numbers(device: torch.device) -> Iterator[None]:
    """The generators after the block are where they were before it."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        yield


class Originals:
    """outputs = function(*inputs): the original modules; the engine of mode "exact".

    Under autocast they cast their frozen float32 weights at every call. Kept casts would save 0.04 to 0.2 % of the
    forward of half a net (DenseNet-76-12, WRN-40-4, VGG-16, batch 64, one CPU thread), so there are none.
    """

    bytes_held = 0

    def __init__(self, function: Callable[..., tuple]) -> None:
        self.function = function
        self.fallbacks: list[str] = []

    def __call__(self, *inputs: Any) -> tuple:
        return self.function(*inputs)

    def fused(self) -> dict[str, int]:
        return {}


def build_engine(
    mode: str, originals: Callable[..., tuple], lower: Callable[[], Program], expected: tuple, device: torch.device,
    weights: dict, arena: Arena, half: torch.dtype | None,
) -> Any:  # fmt: skip
    """The engine that computes what `originals` does, as far as `mode` allows.

    Args:
        expected: outputs of eager, for their dtypes and memory formats.
        weights, arena: packed weights and buffers on the CPU, kept from frontier to frontier.
        half: dtype of the autocast that the prefix runs under, None without.

    Raises:
        Refused: nothing here runs this mode on this device; the originals stay.
    """
    tensors = [value if isinstance(value, Tensor) else None for value in expected]
    if mode == "exact":
        return _exact(originals, device)
    dtype = HALF.get(mode) or half
    if dtype is None:
        floating = [t.dtype for t in tensors if t is not None and t.is_floating_point()]
        dtype = floating[0] if floating else torch.float32
    arguments = {
        "output_dtypes": [None if t is None else t.dtype for t in tensors],
        "channels_last": [t is not None and _is_channels_last(t) for t in tensors],
        "weights": weights,
    }
    if device.type == "cuda":
        return _cuda_engine(lower(), dtype, arguments)
    if device.type != "cpu":
        raise Refused(f"no fused runtime for {device.type}")
    notes = []
    if mode in HALF and (missing := unsupported_dtype(dtype)):
        notes.append(f"{mode} runs as folded float32: {missing}")
        dtype = torch.float32
    elif dtype in HALF.values() and (missing := unsupported_dtype(dtype)):
        raise Refused(f"the prefix stays under autocast as it is: {missing}")
    engine = CpuEngine(lower(), dtype=dtype, arena=arena, **arguments)
    engine.fallbacks = notes + engine.fallbacks
    return engine


def _exact(originals: Callable[..., tuple], device: torch.device) -> Any:
    if device.type == "cuda":
        try:
            from .cuda import CudaExactEngine
        except ImportError as error:
            engine = Originals(originals)
            engine.fallbacks.append(f"no CUDA graph of the prefix: {first_line(error)}")
            return engine
        return CudaExactEngine(originals)
    return Originals(originals)


def _cuda_engine(program: Program, dtype: torch.dtype, arguments: dict) -> Any:
    try:
        from .cuda import CudaEngine
    except ImportError as error:
        raise Refused(f"no CUDA runtime: {first_line(error)}") from error
    return CudaEngine(program, dtype=dtype, **arguments)


def _is_channels_last(t: Tensor) -> bool:
    return t.dim() == 4 and t.is_contiguous(memory_format=torch.channels_last) and not t.is_contiguous()


def error_of(found: Any, expected: Any) -> float:
    """max |found - expected| / max |expected| over all tensors; infinity where shapes, dtypes or values differ."""
    (a, a_spec), (b, b_spec) = tree_flatten(found), tree_flatten(expected)
    if a_spec != b_spec:
        return float("inf")
    return max((_error(x, y) for x, y in zip(a, b, strict=True)), default=0.0)


def _error(x: Any, y: Any) -> float:
    if not isinstance(x, Tensor) or not isinstance(y, Tensor):
        return 0.0 if type(x) is type(y) and x == y else float("inf")
    if x.shape != y.shape or x.dtype != y.dtype or x.device != y.device:
        return float("inf")
    if same(x, y):
        return 0.0
    if not y.is_floating_point():
        return float("inf")
    difference = (x.double() - y.double()).abs().max()
    error = (difference / y.double().abs().max().clamp_min(1e-30)).item()
    return error if error == error else float("inf")


def same(x: Tensor, y: Tensor) -> bool:
    """Whether all values are equal, NaN equal to NaN."""
    return x.shape == y.shape and bool(((x == y) | ((x != x) & (y != y))).all())


@dataclass
class Trial:
    """Times eager and the engine in turn on real calls: eager wins unless the engine's median is smaller.

    expected: what eager takes, from an earlier trial of a shorter prefix and the time of what was added to it. Then
    only the engine, which runs anyway, is timed; if it is not faster than that, the two take turns as ever.
    """

    rounds: int = ROUNDS
    shape: Any = None
    eager: list[float] = field(default_factory=list)
    engine: list[float] = field(default_factory=list)
    warm: bool = False
    open: bool = True
    expected: float | None = None

    def turn(self, shape: Any) -> str:
        """ "engine" or "eager" for a call that is timed, "untimed" for the engine outside the trial."""
        if self.shape is None:
            self.shape = shape
        if not self.open or shape != self.shape:
            return "untimed"
        if not self.warm:
            self.warm = True  # its buffers are allocated now
            return "untimed"
        return "eager" if self.expected is None and len(self.eager) <= len(self.engine) else "engine"

    def note(self, turn: str, seconds: float) -> bool:
        """Whether the trial ended with this time."""
        (self.eager if turn == "eager" else self.engine).append(seconds)
        self.open = len(self.engine) < self.rounds
        if not self.open and self.expected is not None:
            if median(self.engine) < self.expected:
                self.eager = [self.expected]
            else:
                self.engine, self.open, self.expected = [], True, None
        return not self.open

    def eager_wins(self) -> bool:
        return not self.open and median(self.engine) >= median(self.eager)

    def extended(self, seconds: float) -> "Trial":
        """The trial of the same prefix with more behind it, on which eager spends `seconds`."""
        if self.open or not self.eager:
            return Trial()
        return Trial(shape=self.shape, expected=median(self.eager) + seconds)


def median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2] if values else float("nan")


class Runner:
    """outputs = engine(*inputs) or originals(*inputs), whichever the trial says; never a graph."""

    def __init__(self, engine: Any, originals: Callable[..., tuple], *, trial: Trial | None) -> None:
        self.engine = engine
        self.originals = originals
        self.calls = 0
        # The originals against themselves: nothing to find out.
        self.trial = Trial(open=False) if trial is None or isinstance(engine, Originals) else trial
        self.on_loss: Callable[[], None] = lambda: None

    def __call__(self, *inputs: Any) -> tuple:
        turn = "untimed"
        if self.trial.open:
            turn = self.trial.turn(tuple(tuple(x.shape) for x in tree_flatten(inputs)[0] if isinstance(x, Tensor)))
        self.calls += turn != "eager"
        with constant():
            if turn == "untimed":
                return self.engine(*inputs)
            start = now(inputs)
            outputs = self.originals(*inputs) if turn == "eager" else self.engine(*inputs)
            ended = self.trial.note(turn, now(inputs) - start)
        if ended and self.trial.eager_wins():
            self.on_loss()
        return outputs


def now(inputs: tuple) -> float:
    for x in tree_flatten(inputs)[0]:
        if isinstance(x, Tensor) and x.is_cuda:
            torch.cuda.synchronize(x.device)
            break
    return time.perf_counter()
