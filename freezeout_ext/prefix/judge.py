"""Whether an engine is right and faster: the error against eager, the time in turn with eager."""

import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
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


class Trial:
    """(y,) = engine(*inputs) or originals(*inputs), never a graph. The originals stay unless the engine is faster.

    The two take turns on calls of one shape. The engine wins if its median is smaller.

    Args:
        shapes: of the inputs of calls that are timed.
        watched: seconds of the originals in the watched forward, the first of their times.
        open: whether calls are timed.

    Attributes:
        calls: how often the engine ran.
        eager: seconds of each timed call of the originals.
        timed: seconds of each timed call of the engine.
        open: whether more calls are to be timed.
    """

    def __init__(
        self, engine: Any, originals: Callable[..., tuple], shapes: list, *, watched: float, open: bool
    ) -> None:
        self.engine, self.originals, self.shapes, self.open = engine, originals, shapes, open
        self.calls = 0
        self.eager = [watched]
        self.timed: list[float] = []
        self._warm = False  # whether what depends on the shape is prepared
        self._busy = threading.Lock()

    def __call__(self, *inputs: Tensor) -> tuple[Tensor]:
        """-> (y,)."""
        if not self._busy.acquire(blocking=False):
            with constant():
                return self.originals(*inputs)  # another thread is in the engine, whose buffers are one call's
        try:
            with constant():
                return self._run(inputs)
        finally:
            self._busy.release()

    def _run(self, inputs: tuple) -> tuple[Tensor]:
        turn = self.turn(shapes_of(inputs))
        self.calls += turn != "eager"
        if turn == "untimed":
            return self.engine(*inputs)
        start = now(inputs)
        outputs = self.originals(*inputs) if turn == "eager" else self.engine(*inputs)
        self.note(turn, now(inputs) - start)
        return outputs

    def turn(self, shapes: list) -> str:
        """ "engine" or "eager" for a call that is timed, "untimed" for the engine outside the trial."""
        if not self.open or shapes != self.shapes:
            return "untimed"
        if not self._warm:
            self._warm = True
            return "untimed"
        return "eager" if len(self.eager) <= len(self.timed) else "engine"

    def note(self, turn: str, seconds: float) -> None:
        (self.eager if turn == "eager" else self.timed).append(seconds)
        rounds = len(self.timed)
        is_clear = rounds in CLEAR and max(self.timed) < CLEAR[rounds] * min(self.eager)
        self.open = rounds < ROUNDS and not is_clear

    def eager_wins(self) -> bool:
        # Where nothing is measured, no call of the engine is timed.
        return not self.open and bool(self.timed) and median(self.timed) >= median(self.eager)


def median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def shapes_of(inputs: Sequence[Tensor]) -> list[torch.Size]:
    return [x.shape for x in inputs]


def now(inputs: Sequence[Tensor]) -> float:
    if on_gpu := [x.device for x in inputs if x.is_cuda]:
        torch.cuda.synchronize(on_gpu[0])
    return time.perf_counter()
