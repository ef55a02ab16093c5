"""A function as CUDA graphs, one for each shape of the inputs. The engine of mode "exact" runs the modules so."""

import logging
import warnings
from collections.abc import Callable, Hashable

import torch
from torch import Tensor

from ..cuda_graphs import capture, own_stream
from ..torch_state import autocast_state
from .judge import first_line

logger = logging.getLogger("freezeout_ext")

MOST_GRAPHS = 4  # shapes of one engine: training batch, evaluation batch, and two more


def on_gpu(inputs: tuple) -> bool:
    return all(x.is_cuda for x in inputs)


def capturing(inputs: tuple) -> bool:
    return on_gpu(inputs) and torch.cuda.is_current_stream_capturing()


def shape_key(inputs: tuple) -> Hashable:
    """What a graph or a measurement holds for: shapes, strides, dtypes, the autocast state."""
    return tuple((x.shape, x.stride(), x.dtype, x.device) for x in inputs), autocast_state(inputs[0].device)


class Graphs:
    """outputs = function(*inputs) from a CUDA graph of each shape that was seen twice in a row, else None.

    Attributes:
        refused: why there is no graph, by shape.
        bytes: of device memory that the graphs hold.
    """

    def __init__(self) -> None:
        self.refused: dict[Hashable, str] = {}
        self.bytes = 0
        self._held: dict[Hashable, tuple[torch.cuda.CUDAGraph, list[Tensor], tuple]] = {}
        self._last: Hashable = None
        self._pool: tuple[int, int] | None = None
        self._stream: torch.cuda.Stream | None = None

    @property
    def count(self) -> int:
        return len(self._held)

    @property
    def fallbacks(self) -> list[str]:
        return [f"no CUDA graph: {reason}" for reason in dict.fromkeys(self.refused.values())]

    def __call__(
        self, function: Callable[..., tuple], inputs: tuple, prepare: Callable[[], object] | None = None
    ) -> tuple | None:
        """-> the outputs in the graph's own memory, which the next call overwrites. None: run the function yourself.

        Args:
            function: always the same one.
            prepare: called once before a capture. Raises where there must not be one.
        """
        if not on_gpu(inputs):
            return None
        key = shape_key(inputs)
        repeated, self._last = key == self._last, key
        if key not in self._held:
            if not repeated or key in self.refused or len(self._held) == MOST_GRAPHS:
                return None
            try:
                self._held[key] = self._capture(function, inputs, prepare)
            except Exception as error:  # a graph is a saving; a run must not end for it
                self.refused[key] = first_line(error)
                logger.warning("prefix: no CUDA graph for inputs %s: %s", [tuple(x.shape) for x in inputs], error)
                return None
        graph, given, outputs = self._held[key]
        for mine, x in zip(given, inputs, strict=True):
            mine.copy_(x)
        graph.replay()
        return outputs

    def _capture(self, function: Callable[..., tuple], inputs: tuple, prepare: Callable[[], object] | None) -> tuple:
        with torch.cuda.device(inputs[0].device), _no_autocast_cache():
            if prepare is not None:
                prepare()
            given = [torch.empty_like(x, memory_format=torch.preserve_format).copy_(x) for x in inputs]
            if self._stream is None:
                self._stream = own_stream(self, torch.cuda.current_device())
            self._rehearse(function, given, self._stream)
            before = torch.cuda.memory_reserved()
            # Graphs of one engine never run at the same time and their outputs are copied: they share their memory.
            graph, outputs = capture(lambda: function(*given), stream=self._stream, pool=self._pool)
            self._pool = graph.pool()
            self.bytes += torch.cuda.memory_reserved() - before + sum(x.nbytes for x in given)
            return graph, given, outputs

    def _rehearse(self, function: Callable[..., tuple], given: list[Tensor], stream: torch.cuda.Stream) -> None:
        """Runs the function once on the stream of the capture.

        Raises:
            RuntimeError: the function waits for the device, which would end a capture for good.
        """
        current = torch.cuda.current_stream()
        stream.wait_stream(current)
        mode = torch.cuda.get_sync_debug_mode()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                with torch.cuda.stream(stream):
                    function(*given)
            finally:
                torch.cuda.set_sync_debug_mode(mode)
        current.wait_stream(stream)
        # Not the warning that the mode is a prototype, which says "synchronizing" too.
        if any("called a synchronizing" in str(warning.message) for warning in caught):
            raise RuntimeError("the prefix waits for the device (.item(), a copy to the CPU)")


class _no_autocast_cache:
    """A weight that autocast casts inside a graph must not be the one that code outside finds in its cache."""

    def __enter__(self) -> None:
        self.enabled = torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(False)

    def __exit__(self, *_: object) -> None:
        torch.set_autocast_cache_enabled(self.enabled)


class ExactEngine:
    """outputs = originals(*inputs), bit-equal to eager: on a GPU the same kernels without their launches.

    Under autocast the modules cast their frozen weights at every call: 0.04 to 0.2 % of the forward of half a net
    (DenseNet-76-12, WRN-40-4, VGG-16, batch 64, one CPU thread).
    """

    tolerance = 0.0

    def __init__(self, originals: Callable[..., tuple]) -> None:
        self.originals = originals
        self._graphs = Graphs()

    @property
    def bytes_held(self) -> int:
        return self._graphs.bytes

    @property
    def fallbacks(self) -> list[str]:
        return self._graphs.fallbacks

    def fused(self) -> dict[str, int]:
        return {"CUDA graph": self._graphs.count} if self._graphs.count else {}

    def __call__(self, *inputs: Tensor) -> tuple:
        outputs = None if capturing(inputs) else self._graphs(self.originals, inputs)
        return self.originals(*inputs) if outputs is None else tuple(y.clone() for y in outputs)
