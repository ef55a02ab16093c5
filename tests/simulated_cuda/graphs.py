"""CUDA graphs of the simulated device: what a capture records, and its replay."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_map_only

_recorders: list[Recorder] = []  # of the capture under way
_WRITES_UNSAID = "aten::native_batch_norm"  # changes arguments, which its schema does not say
_BY_CUBLAS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::addmv", "aten::mv", "aten::dot")
_live: weakref.WeakSet[CUDAGraph] = weakref.WeakSet()
# Metadata only: done when captured, nothing to replay.
_AT_ONCE = {"aten::resize_", "aten::set_", "aten::detach_", "aten::record_stream"}


POOL = (0, 1)  # of every graph: each has its memory to itself


def record_launch(run: Callable[[int], Any], number: int) -> bool:
    """Whether a capture is under way, which then has recorded run(number)."""
    if _recorders:
        _recorders[-1].add(run, (number,))
    return bool(_recorders)


class Recorder(TorchDispatchMode):
    """The operators and launches of a capture, in order. Operators that write their arguments do not run yet."""

    def __init__(self, device: Any) -> None:
        super().__init__()
        self.device = device
        self.calls: list[Callable[[], None]] = []
        self.uses_cublas = False
        self._own: set[int] = set()  # memory that the graph's own operators made
        self._watched: dict[int, StorageWeakRef] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        schema, name = func._schema, func._schema.name
        given = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
        if name in _AT_ONCE or (given and not any(x.is_cuda for x in given)):
            return func(*args, **kwargs)
        if name == "aten::copy_" and len({x.device for x in given[:2]}) > 1:
            self.device.synchronizes("copy_ between host and device")
        self.uses_cublas |= name.startswith(_BY_CUBLAS)
        names = [argument.name for argument in schema.arguments]
        writes = [argument.alias_info is not None and argument.alias_info.is_write for argument in schema.arguments]
        if any(writes) and all(r.alias_info is not None for r in schema.returns):
            bound = dict(zip(names, args, strict=False)) | kwargs
            self.add(func, args, kwargs)
            written = [bound[n] for n, w in zip(names, writes, strict=True) if w and n in bound]
            return None if not schema.returns else written[0] if len(schema.returns) == 1 else tuple(written)
        if any(writes) or name == _WRITES_UNSAID:
            outputs = func(*tree_map_only(Tensor, Tensor.clone, args), **tree_map_only(Tensor, Tensor.clone, kwargs))
        else:
            outputs = func(*args, **kwargs)
        made = [x for x in tree_flatten(outputs)[0] if isinstance(x, Tensor)]
        is_view = any(r.alias_info is not None for r in schema.returns)
        if is_view or not any(x.is_cuda for x in made):
            return outputs
        self._own |= {x.untyped_storage().data_ptr() for x in made}
        if not name.startswith(("aten::empty", "aten::new_empty")):
            self.add(func, args, kwargs, outputs=made)
        return outputs

    def add(self, run: Callable[..., Any], args: tuple, kwargs: dict | None = None, outputs: list[Tensor] = ()) -> None:
        held_args, held_kwargs = tree_map_only(Tensor, self._held, (args, kwargs or {}))

        def call() -> None:
            results = [x for x in tree_flatten(run(*held_args, **held_kwargs))[0] if isinstance(x, Tensor)]
            if outputs:
                for mine, new in zip(outputs, results, strict=True):
                    if mine.data_ptr() != new.data_ptr():
                        mine.copy_(new)

        self.calls.append(call)

    def check(self) -> None:
        """A graph reads addresses: what lies there must still."""
        if any(reference.expired() for reference in self._watched.values()):
            raise RuntimeError("the CUDA graph reads memory that was freed after its capture")

    def _held(self, x: Tensor) -> Tensor:
        if not x.is_cuda:
            return x
        storage = x.untyped_storage()
        if storage.data_ptr() in self._own:
            return x
        if storage.nbytes():
            self._watched.setdefault(storage._cdata, StorageWeakRef(storage))
        with _disable_current_modes():
            return self.device.unowned(x)


class CUDAGraph:
    """torch.cuda.CUDAGraph. A capture runs no operator that writes, a replay runs all on the memory of the capture."""

    device: Any = None  # the compiled simulated device

    def __init__(self, keep_graph: bool = False) -> None:
        self._recorder: Recorder | None = None
        self._stream: Any = None
        self._lost_workspace = False

    def __del__(self) -> None:
        # torch 2.12 and later free cuBLAS's workspace of the stream, other graphs' too:
        # https://github.com/pytorch/pytorch/issues/193402
        for other in _live:
            other._lost_workspace |= other is not self and other._stream == self._stream

    def capture_begin(self, *_: Any, **__: Any) -> None:
        if self.device.is_capturing():
            raise RuntimeError("CUDA error: a capture is under way already")
        if torch.cuda.current_stream() == torch.cuda.default_stream():
            raise RuntimeError("CUDA graphs must be captured on a non-default stream")
        self._recorder = Recorder(self.device)
        self._stream = torch.cuda.current_stream()
        _live.add(self)
        self._random_state = torch.get_rng_state()
        self.device.take_capture_failure()
        self.device.set_capturing(True)
        _recorders.append(self._recorder)
        self._recorder.__enter__()

    def capture_end(self) -> None:
        self._recorder.__exit__(None, None, None)
        _recorders.clear()
        self.device.set_capturing(False)
        torch.set_rng_state(self._random_state)
        if self.device.take_capture_failure():
            self._recorder = None
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")

    def replay(self) -> None:
        if self._lost_workspace and self._recorder.uses_cublas:
            raise RuntimeError("CUDA error: an illegal memory access, to a cuBLAS workspace that was freed")
        self._recorder.check()
        with _below_autograd():
            for call in self._recorder.calls:
                call()

    def pool(self) -> tuple[int, int]:
        return POOL


@contextlib.contextmanager
def _below_autograd() -> Iterator[None]:
    """As kernels run: no autograd, no autocast, no version counted."""
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.ADInplaceOrView)
    with (
        _disable_current_modes(),
        torch._C._AutoDispatchBelowAutograd(),
        torch._C._ExcludeDispatchKeyGuard(keys),
        torch._C._DisableAutocast(),
    ):
        yield
