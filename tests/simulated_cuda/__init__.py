"""A CUDA device of host memory for torch's CPU build: the GPU's tests run on it, all but the kernels' machine code.

`install()` before anything else asks for CUDA. Operators run as the CPU's on "cuda:0" (device.cpp), the optimizers'
kernels as host_kernel.cpp's blocks, Triton's as their references, CUDA graphs as records of all of these (graphs.py).
It refuses what a device refuses. It measures nothing: streams run at once, memory is made up.
"""

import itertools
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import host_module
import torch
from torch import Tensor
from torch.utils.cpp_extension import load

from . import graphs

NAME = "simulated CUDA device"


def install() -> None:
    """Puts the device in torch's place of CUDA, for the rest of the process.

    Raises:
        RuntimeError: torch is a CUDA build.
    """
    if torch.version.cuda is not None:
        raise RuntimeError(f"the simulated CUDA device needs a CPU build of torch, got {torch.__version__}")
    graphs.CUDAGraph.device = device = _compiled()
    # Before torch.cuda: it imports much that looks for CUDA's real functions where there is CUDA.
    _replace_kernels()
    _replace_torch_cuda(device)


def _replace_kernels() -> None:
    from freezeout_ext import kernels
    from freezeout_ext.kernels import choice

    def by_reference(reference: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *tensors, tf32=False, config=None, **given: reference(*tensors, **given)

    for name in ("affine_relu", "conv2d"):
        setattr(kernels, name, by_reference(getattr(kernels, f"{name}_reference")))
    choice.LAUNCHES = choice.ROUNDS = 1  # nothing is timed here
    host_module.kernel().freezeout_record(_record_update)


fails_next = False  # a test's wish


@host_module.Recorder
def _record_update(number: int, device: int, stream: int) -> int:
    """What becomes of an optimizer's launch."""
    if device != 0:
        return host_module.NO_DEVICE
    # An exception would not leave this function.
    if fails_next or stream != torch.cuda.current_stream().cuda_stream:
        return host_module.FAILS
    recorded = graphs.record_launch(host_module.kernel().freezeout_run, number)
    return host_module.RECORDED if recorded else host_module.RUN_NOW


def _compiled() -> Any:
    source = Path(__file__).with_name("device.cpp")
    folder = Path(__file__).parents[2] / "build" / f"simulated-cuda-{torch.__version__}"
    folder.mkdir(parents=True, exist_ok=True)
    # ninja may lie beside this Python alone.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return load(
        "simulated_cuda_device", [str(source)], build_directory=str(folder), extra_cflags=["-O1", "-fvisibility=hidden"]
    )


class Stream(torch.Stream):
    """torch.cuda.Stream: a name; its work is done at once."""

    # The default one, then 32 in turn, as torch has them.
    _ids = itertools.chain([0], itertools.cycle(range(1, 33)))

    def __new__(cls, device: Any = None, priority: int = 0, **_: Any) -> "Stream":
        # 1: CUDA
        return super().__new__(cls, stream_id=next(cls._ids), device_index=0, device_type=1)

    def __init__(self, *_: Any, **__: Any) -> None: ...

    @property
    def cuda_stream(self) -> int:
        return self.stream_id

    def wait_stream(self, other: "Stream") -> None: ...


class Event:
    """torch.cuda.Event; its time is the host's."""

    def __init__(self, enable_timing: bool = False, **_: Any) -> None: ...

    def record(self, stream: Stream | None = None) -> None:
        self._at = time.perf_counter()

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def elapsed_time(self, end: "Event") -> float:
        return 1e3 * (end._at - self._at)


def _replace_torch_cuda(device: Any) -> None:
    def set_sync_debug_mode(mode: int | str) -> None:
        device.set_sync_debug_mode({"default": 0, "warn": 1, "error": 2}.get(mode, mode))

    properties = SimpleNamespace(name=NAME, major=9, minor=0, total_memory=1 << 34, multi_processor_count=132)
    default = current = Stream()

    def set_stream(stream: Stream) -> None:
        nonlocal current
        current = stream
        device.set_current_stream(stream.cuda_stream)

    @contextmanager
    def in_stream(stream: Stream | None) -> Iterator[None]:
        before = current
        set_stream(stream or before)
        try:
            yield
        finally:
            set_stream(before)

    set_stream(default)
    replaced = {
        "is_available": lambda: True,
        "_lazy_init": lambda: None,
        "is_initialized": lambda: True,
        "_is_in_bad_fork": lambda: False,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "_exchange_device": lambda _: 0,
        "_maybe_exchange_device": lambda _: 0,
        "get_device_name": lambda _=None: NAME,
        "get_device_capability": lambda _=None: (9, 0),
        "get_device_properties": lambda _=None: properties,
        "is_bf16_supported": lambda including_emulation=True: True,
        "synchronize": lambda _=None: device.synchronizes("synchronize"),
        "Stream": Stream,
        "Event": Event,
        "stream": in_stream,
        "current_stream": lambda _=None: current,
        "default_stream": lambda _=None: default,
        "CUDAGraph": graphs.CUDAGraph,
        "graph_pool_handle": lambda: graphs.POOL,
        "is_current_stream_capturing": device.is_capturing,
        "memory_reserved": lambda _=None: 0,
        "max_memory_allocated": lambda _=None: 1,
        "reset_peak_memory_stats": lambda _=None: None,
        "empty_cache": lambda: None,
        "mem_get_info": lambda _=None: (properties.total_memory, properties.total_memory),
        "get_rng_state": lambda _=None: torch.get_rng_state(),
        "set_rng_state": lambda state, _=None: torch.set_rng_state(state),
        "manual_seed_all": lambda seed: None,  # torch.manual_seed has seeded the host's, which are the device's
        "set_sync_debug_mode": set_sync_debug_mode,
        "get_sync_debug_mode": device.get_sync_debug_mode,
        "_sleep": lambda cycles: None,
    }
    for name, value in replaced.items():
        setattr(torch.cuda, name, value)
        for module in (torch.cuda.graphs, torch.cuda.memory, torch.cuda.random, torch.cuda.streams):
            if hasattr(module, name):
                setattr(module, name, value)
    if hasattr(torch.Tensor, "__dlpack_c_exchange_api__"):
        torch.Tensor.__dlpack_c_exchange_api__ = device.exchange_with_streams(torch.Tensor.__dlpack_c_exchange_api__)
    clone, to = torch.UntypedStorage.clone, torch.storage._to

    def on_device(storage: torch.UntypedStorage) -> torch.UntypedStorage:
        return torch.empty(storage.nbytes(), dtype=torch.uint8, device="cuda").untyped_storage().copy_(storage)

    # torch's CPU build makes no storage of CUDA by itself.
    torch.UntypedStorage.clone = lambda self: on_device(self) if self.device.type == "cuda" else clone(self)
    torch.storage._to = lambda self, device, non_blocking: (
        on_device(self) if torch.device(device).type == "cuda" else to(self, device, non_blocking)
    )
    torch._C._host_emptyCache = lambda: None
    torch.version.cuda = "13.0"
    torch.backends.cudnn.version = lambda: 91900
    torch.backends.cudnn.is_available = lambda: True
