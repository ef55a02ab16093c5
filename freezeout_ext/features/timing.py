"""Stopwatch: medians of measured seconds; on a GPU read from events, which no one waits for."""

import statistics
import time
from collections import deque

import torch

MOST = 32


class Stopwatch:
    """start(), stop(count) around work on `count` samples; median(): seconds a sample, None before `least` calls."""

    def __init__(self, device: torch.device, least: int = 4) -> None:
        self._cuda, self._least = device.type == "cuda", least
        self._seconds: deque[float] = deque(maxlen=MOST)
        self._open: deque = deque(maxlen=MOST)
        self._start = None

    def start(self) -> None:
        self._start = self._mark()

    def stop(self, count: int) -> None:
        if self._start is None or not count:
            return
        start, self._start = self._start, None
        if self._cuda:
            self._open.append((start, self._mark(), count))
        else:
            self._seconds.append((time.perf_counter() - start) / count)

    def median(self) -> float | None:
        while self._open and self._open[0][1].query():
            start, end, count = self._open.popleft()
            self._seconds.append(start.elapsed_time(end) / 1e3 / count)
        return statistics.median(self._seconds) if len(self._seconds) >= self._least else None

    def _mark(self):
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
