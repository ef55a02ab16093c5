"""CUDA graphs: a stream for each owner, and a function captured as a graph."""

import contextlib
import functools
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

import torch

T = TypeVar("T")

_idle: dict[int, list[torch.cuda.Stream]] = {}


def own_stream(owner: object, device: int) -> torch.cuda.Stream:
    """A stream for the captures of `owner` alone, as long as it lives.

    From torch 2.12 on, a graph that is destroyed takes cuBLAS's workspace of its stream along, which other graphs that
    were captured there still use: https://github.com/pytorch/pytorch/issues/193402. Streams are used again, since torch
    has 32 and then deals out the same ones.
    """
    idle = _idle.setdefault(device, [])
    stream = idle.pop() if idle else torch.cuda.Stream(device)
    weakref.finalize(owner, idle.append, stream)
    return stream


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
