"""Stopwatch: medians of measured seconds. On a GPU they are read from events, without waiting for the device."""

import statistics
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import torch

MOST = 32


class Stopwatch:
    """Times work: start(), pause() and stop(count), with stop behind work on `count` samples.

    The time between pause and start is left out.
    median() and least() are seconds a sample. Both are None before `calls` calls of stop.

    Args:
        device: where the work runs. On a CPU the seconds are this thread's CPU time, which other programs do not
            lengthen.
        calls: how many calls of stop a result needs.
        waits: whether the work waits for a disk. Then the seconds on a CPU are those of the wall clock.
    """

    def __init__(self, device: torch.device, calls: int = 4, *, waits: bool = False) -> None:
        self._cuda, self._calls = device.type == "cuda", calls
        self._clock = time.perf_counter if waits else time.thread_time
        self._seconds: deque[float] = deque(maxlen=MOST)
        self._open: deque = deque(maxlen=MOST)
        self._spans: list[tuple[Any, Any]] = []
        self._start = None

    def start(self) -> None:
        self._start = self._mark()

    def pause(self) -> None:
        if self._start is not None:
            self._spans.append((self._start, self._mark()))
            self._start = None

    def stop(self, count: int) -> None:
        self.pause()
        spans, self._spans = self._spans, []
        if not spans or not count:
            return
        if self._cuda:
            self._open.append((spans, count))
        else:
            self._seconds.append(sum(end - start for start, end in spans) / count)

    def add(self, seconds: float, count: int) -> None:
        """Notes work on `count` samples that other code has timed."""
        if count:
            self._seconds.append(seconds / count)

    def median(self) -> float | None:
        self._read()
        return statistics.median(self._seconds) if len(self._seconds) >= self._calls else None

    def least(self) -> float | None:
        self._read()
        return min(self._seconds) if len(self._seconds) >= self._calls else None

    def _read(self) -> None:
        while self._open and self._open[0][0][-1][1].query():
            spans, count = self._open.popleft()
            self._seconds.append(sum(start.elapsed_time(end) for start, end in spans) / 1e3 / count)

    def _mark(self) -> Any:
        if not self._cuda:
            return self._clock()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def seconds_of(work: Callable[[], object], device: torch.device, *, waits: bool = False) -> float:
    """-> seconds that work() takes, those of the device included. On a CPU see `Stopwatch`."""
    clock = time.perf_counter if waits or device.type == "cuda" else time.thread_time
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = clock()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return clock() - start
