"""CUDA graphs: a stream for each owner, a function captured as a graph, steps captured into one pool."""

import contextlib
import functools
import gc
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

import torch

T = TypeVar("T")

STREAMS = 32  # of torch, on each device: it deals them out in turn, to everyone

_idle: dict[int, list[torch.cuda.Stream]] = {}
_ours: dict[int, set[int]] = {}  # handles of all that was taken here, idle ones too


def own_stream(owner: object, device: int) -> torch.cuda.Stream:
    """A stream for the captures of `owner` alone, as long as it lives.

    From torch 2.12 on, a graph that is destroyed takes cuBLAS's workspace of its stream along, which other graphs that
    were captured there still use: https://github.com/pytorch/pytorch/issues/193402.

    Raises:
        RuntimeError: other owners have all of torch's streams.
    """
    stream = _take_stream(device)
    weakref.finalize(owner, _idle[device].append, stream)
    return stream


def _take_stream(device: int) -> torch.cuda.Stream:
    idle, ours = _idle.setdefault(device, []), _ours.setdefault(device, set())
    if not idle:
        for _ in range(STREAMS):
            stream = torch.cuda.Stream(device)
            if stream.cuda_stream not in ours:
                ours.add(stream.cuda_stream)
                return stream
        gc.collect()  # owners that wait for the collector
    if not idle:
        raise RuntimeError(
            f"no CUDA stream is left for a capture: {STREAMS} graphed steps and prefixes have one each; delete some"
        )
    return idle.pop()


@functools.cache
def _passing_stream(device: int) -> torch.cuda.Stream:
    return _take_stream(device)


def capture(
    run: Callable[[], T], *, stream: torch.cuda.Stream | None = None, pool: tuple[int, int] | None = None
) -> tuple[torch.cuda.CUDAGraph, T]:
    """graph, run()'s result: replaying the graph writes what run() would return into that result.

    `run` has run before on this stream, or needs no first time. Unlike torch.cuda.graph this neither collects garbage
    nor empties the allocator's cache, which would cost 100 ms and more at each of many captures.

    Args:
        stream: that of the capture; None for a graph that is not used beside others for long.
    """
    current = torch.cuda.current_stream()
    stream = stream or _passing_stream(torch.cuda.current_device())
    stream.wait_stream(current)
    graph = torch.cuda.CUDAGraph()
    shared: dict[str, Any] = {} if pool is None else {"pool": pool}
    with torch.cuda.stream(stream):
        # A loader's pinning thread may allocate meanwhile: only this thread's calls count as the capture's.
        graph.capture_begin(**shared, capture_error_mode="thread_local")
        try:
            result = run()
        except BaseException:
            with contextlib.suppress(RuntimeError):
                graph.capture_end()
            raise
        graph.capture_end()
    current.wait_stream(stream)
    return graph, result


class StepGraphs:
    """Steps as CUDA graphs in one memory pool.

    Eager steps run on the stream of the captures: a gradient's accumulation stays on the stream where it first ran.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = own_stream(self, torch.cuda.current_device() if device.index is None else device.index)
        self._pool: Any = None  # torch's handle

    def run(self, step: Callable[[], T]) -> T:
        """step(), now, where a later capture will run it."""
        current = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            result = step()
        current.wait_stream(self._stream)
        return result

    def capture(self, step: Callable[[], T], *, first: bool) -> Callable[[], T]:
        """Records the step without running it. Returns what runs it, each time into the same result tensors.

        Args:
            first: nothing that was captured before is in use any more.
        """
        if first:
            # A pool is gone with its graphs; torch.cuda.graph gives its memory back before it captures.
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        # torch.cuda.graph leaves its stream the current one where the capture fails.
        current = torch.cuda.stream(torch.cuda.current_stream(self._stream.device))
        # Other threads, such as a loader's that pins memory, may go on.
        mode = "thread_local"
        with current, torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode=mode):
            result = step()

        def replay() -> T:
            graph.replay()
            return result

        return replay
