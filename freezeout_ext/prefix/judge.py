"""Whether an engine is right and faster: the error against eager, the time in turn with eager."""

import pickle
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

# Largest error against eager, over eager's largest value. Folding rounds each weight anew: about 1e-6 a net.
TOLERANCE = {"exact": 0.0, "folded": 1e-5, "bf16": 5e-2, "fp16": 2e-2}
ROUNDS = 3
# After so many rounds the engine has won if its slowest time is below so much of eager's fastest.
CLEAR = {1: 0.6, 2: 0.85}


class Refused(Exception):
    """This way of running the prefix is not used. The message says why."""


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
    devices, (pythons, numpys) = [device] if device.type == "cuda" else [], _foreign_states()
    with (
        torch.random.fork_rng(devices=devices),
        constant(),
        torch.autocast(device.type, enabled=autocast[0], dtype=autocast[1]),
    ):
        try:
            yield
        finally:
            random.setstate(pythons)
            if numpys is not None:
                sys.modules["numpy"].random.set_state(numpys)


def random_states() -> tuple:
    """The states of torch's, Python's and numpy's global generators, to be compared."""
    states = [torch.get_rng_state()]
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states.append(torch.cuda.get_rng_state())
    return *(bytes(state.tolist()) for state in states), pickle.dumps(_foreign_states())


def _foreign_states() -> tuple:
    numpy = sys.modules.get("numpy")  # from a numpy that nobody has imported nobody draws
    return random.getstate(), None if numpy is None else numpy.random.get_state()


@contextmanager
def signals_held() -> Iterator[None]:
    """Signals that come within the block are handled behind it.

    A handler may raise (Ctrl-C, a timeout). Inside a capture the error would be taken for the capture's own failure, or
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


def error_of(x: Tensor, y: Tensor) -> float:
    """max |x - y| / max |y|. NaN beside NaN counts 0. Infinity where shapes, dtypes or whole numbers differ."""
    if x.shape != y.shape or x.dtype != y.dtype or x.device != y.device:
        return float("inf")
    if bool(((x == y) | ((x != x) & (y != y))).all()):
        return 0.0
    if not y.is_floating_point():
        return float("inf")
    error = ((x.double() - y.double()).abs().max() / y.double().abs().max().clamp_min(1e-30)).item()
    return error if error == error else float("inf")


@dataclass
class Trial:
    """Times eager and the engine in turn on real calls: eager wins unless the engine's median is smaller.

    Attributes:
        shape: of the inputs of calls that are timed. None: that of the first call.
        eager: seconds of each call.
        engine: seconds of each call.
        warm: whether the engine has run once on this shape.
        open: whether more calls are to be timed.
    """

    shape: Any = None
    eager: list[float] = field(default_factory=list)
    engine: list[float] = field(default_factory=list)
    warm: bool = False
    open: bool = True

    def turn(self, shape: Any) -> str:
        """ "engine" or "eager" for a call that is timed, "untimed" for the engine outside the trial."""
        self.shape = self.shape or shape
        if not self.open or shape != self.shape:
            return "untimed"
        if not self.warm:
            self.warm = True  # what depends on the shape is prepared now
            return "untimed"
        return "eager" if len(self.eager) <= len(self.engine) else "engine"

    def note(self, turn: str, seconds: float) -> None:
        (self.eager if turn == "eager" else self.engine).append(seconds)
        rounds = len(self.engine)
        is_clear = rounds in CLEAR and max(self.engine) < CLEAR[rounds] * min(self.eager)
        self.open = rounds < ROUNDS and not is_clear

    def eager_wins(self) -> bool:
        # Where nothing is measured, no call of the engine is timed.
        return not self.open and bool(self.engine) and median(self.engine) >= median(self.eager)


def median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2] if values else float("nan")


class Runner:
    """(y,) = engine(*inputs) or originals(*inputs), whichever the trial says, never a graph.

    Attributes:
        calls: how often the engine ran.
    """

    def __init__(self, engine: Any, originals: Callable[..., tuple], trial: Trial) -> None:
        self.engine, self.originals, self.trial = engine, originals, trial
        self.calls = 0
        self._busy = threading.Lock()

    def __call__(self, *inputs: Tensor, timed: bool = True) -> tuple[Tensor]:
        """-> (y,).

        Args:
            timed: the call may be a turn of the trial.
        """
        if not self._busy.acquire(blocking=False):
            with constant():
                return self.originals(*inputs)  # another thread is in the engine, whose buffers are one call's
        try:
            with constant():
                return self._run(inputs, self.trial.open and timed)
        finally:
            self._busy.release()

    def _run(self, inputs: tuple, timed: bool) -> tuple[Tensor]:
        turn = self.trial.turn(shapes_of(inputs)) if timed else "untimed"
        self.calls += turn != "eager"
        if turn == "untimed":
            return self.engine(*inputs)
        start = now(inputs)
        outputs = self.originals(*inputs) if turn == "eager" else self.engine(*inputs)
        self.trial.note(turn, now(inputs) - start)
        return outputs


def shapes_of(inputs: Sequence[Tensor]) -> list[torch.Size]:
    return [x.shape for x in inputs]


def now(inputs: Sequence[Tensor]) -> float:
    if on_gpu := [x.device for x in inputs if x.is_cuda]:
        torch.cuda.synchronize(on_gpu[0])
    return time.perf_counter()
