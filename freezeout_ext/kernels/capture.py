"""A function as a CUDA graph."""

import contextlib
import functools
from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")


@functools.cache
def _passing_stream(device: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


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
    with torch.cuda.stream(stream):
        # A loader's pinning thread may allocate meanwhile: only this thread's calls count as the capture's.
        graph.capture_begin(**({} if pool is None else {"pool": pool}), capture_error_mode="thread_local")
        try:
            result = run()
        except BaseException:
            with contextlib.suppress(RuntimeError):
                graph.capture_end()
            raise
        graph.capture_end()
    current.wait_stream(stream)
    return graph, result
