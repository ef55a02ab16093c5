"""Whether an engine is right and faster: its error against eager, its time against eager in turn."""

import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

# Largest error against eager, over eager's largest value. Folding rounds each weight anew: about 1e-6 a net.
TOLERANCE = {"exact": 0.0, "folded": 1e-5, "bf16": 5e-2, "fp16": 2e-2}
ROUNDS = 3


class Refused(Exception):
    """This way of running the prefix is not used; the message says why."""


def first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}".rstrip(": ")


@contextmanager
def constant() -> Iterator[None]:
    """No graph, and ordinary tensors: what is made under inference_mode cannot be saved for backward later."""
    with torch.inference_mode(False), torch.no_grad():
        yield


@contextmanager
def quietly(device: torch.device, autocast: tuple[bool, torch.dtype]) -> Iterator[None]:
    """For a probe: no graph, the user's autocast, and no random number of the user's is drawn."""
    states, devices = foreign_random_states(), [device] if device.type == "cuda" else []
    with (
        torch.random.fork_rng(devices=devices),
        constant(),
        torch.autocast(device.type, enabled=autocast[0], dtype=autocast[1]),
    ):
        try:
            yield
        finally:
            random.setstate(states[0])
            if states[1] is not None:
                import numpy

                numpy.random.set_state(states[1])


def foreign_random_states() -> tuple:
    """The states of Python's and numpy's global generators."""
    try:
        import numpy
    except ImportError:
        return random.getstate(), None
    return random.getstate(), numpy.random.get_state()


def drawn_since(states: tuple) -> bool:
    """Whether a number was drawn from Python's or numpy's global generator since `states`."""
    now = foreign_random_states()
    return now[0] != states[0] or (now[1] is not None and _differ(now[1], states[1]))


def _differ(a: tuple, b: tuple) -> bool:
    return a[0] != b[0] or a[2:] != b[2:] or not (a[1] == b[1]).all()


@contextmanager
def signals_held() -> Iterator[None]:
    """Signals that come within the block are handled behind it.

    A handler may raise (Ctrl-C, a timeout): inside a capture that would be taken for the capture's own failure, or
    leave a module half restored.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # handlers run in the main thread
        return
    came: list[int] = []
    with ExitStack() as handlers:  # which puts each back, whatever the one before raises
        for number in signal.valid_signals():
            if callable(handler := signal.getsignal(number)):
                handlers.callback(signal.signal, number, handler)
                signal.signal(number, lambda number, frame: came.append(number))
        yield
    for caught in came:
        signal.raise_signal(caught)


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
    if bool(((x == y) | ((x != x) & (y != y))).all()):  # NaN where eager has NaN
        return 0.0
    if not y.is_floating_point():
        return float("inf")
    difference = (x.double() - y.double()).abs().max()
    error = (difference / y.double().abs().max().clamp_min(1e-30)).item()
    return error if error == error else float("inf")


@dataclass
class Trial:
    """Times eager and the engine in turn on real calls: eager wins unless the engine's median is smaller."""

    rounds: int = ROUNDS
    shape: Any = None
    eager: list[float] = field(default_factory=list)
    engine: list[float] = field(default_factory=list)
    warm: bool = False
    open: bool = True

    def turn(self, shape: Any) -> str:
        """ "engine" or "eager" for a call that is timed, "untimed" for the engine outside the trial."""
        if self.shape is None:
            self.shape = shape
        if not self.open or shape != self.shape:
            return "untimed"
        if not self.warm:
            self.warm = True  # its buffers are allocated now
            return "untimed"
        return "eager" if len(self.eager) <= len(self.engine) else "engine"

    def note(self, turn: str, seconds: float) -> bool:
        """Whether the trial ended with this time."""
        (self.eager if turn == "eager" else self.engine).append(seconds)
        self.open = len(self.engine) < self.rounds
        return not self.open

    def eager_wins(self) -> bool:
        return not self.open and median(self.engine) >= median(self.eager)


def median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2] if values else float("nan")


class Runner:
    """outputs = engine(*inputs) or originals(*inputs), whichever the trial says; never a graph.

    Attributes:
        calls: how often the engine ran.
        is_paused: whether no call is timed now.
        on_loss: called once the trial has ended for eager.
    """

    def __init__(self, engine: Any, originals: Callable[..., tuple], *, measure: bool) -> None:
        self.engine = engine
        self.originals = originals
        self.trial = Trial(open=measure)
        self.calls = 0
        self.is_paused: Callable[[], bool] = lambda: False
        self.on_loss: Callable[[], None] = lambda: None
        self._busy = threading.Lock()

    def __call__(self, *inputs: Any) -> tuple:
        with constant():
            if not self._busy.acquire(blocking=False):
                return self.originals(*inputs)  # another thread is in the engine, whose buffers are one call's
            try:
                return self._run(inputs)
            finally:
                self._busy.release()

    def _run(self, inputs: tuple) -> tuple:
        turn = "untimed"
        if self.trial.open and not self.is_paused():
            turn = self.trial.turn(tuple(tuple(x.shape) for x in inputs))
        self.calls += turn != "eager"
        if turn == "untimed":
            return self.engine(*inputs)
        start = now(inputs)
        outputs = self.originals(*inputs) if turn == "eager" else self.engine(*inputs)
        if self.trial.note(turn, now(inputs) - start) and self.trial.eager_wins():
            self.on_loss()
        return outputs


def now(inputs: tuple[Tensor, ...]) -> float:
    for x in inputs:
        if x.is_cuda:
            torch.cuda.synchronize(x.device)
            break
    return time.perf_counter()
