"""What FusedSGD and fused_sgd_ share: which tensors the compiled update takes, and running it on them."""

import warnings
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from freezeout_ext import native

# The compiled module's numbers for the dtypes, and DLPack's (code, bits).
DTYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}
DLPACK_DTYPES = {torch.float32: (2, 32), torch.float64: (2, 64), torch.float16: (2, 16), torch.bfloat16: (4, 16)}
# Exactly these: a DTensor or FakeTensor has no address of its own.
PLAIN = (Tensor, nn.Parameter)
DEVICE_TYPES = {"cpu": 1, "cuda": 2}
OPTIONS = {"weight_decay": 1, "maximize": 2, "momentum": 4, "nesterov": 8}


@cache
def tensor_reader() -> Any:
    """The compiled module's reader of tensors, made once."""
    return native.C.TensorReader(torch.Tensor, nn.Parameter, DLPACK_DTYPES, exchange=True)


@cache
def missing_half(device: torch.device) -> str | None:
    """Why no compiled update runs on `device`, or None; the first time that it is asked for, a warning too."""
    reason = native.import_error if device.type == "cpu" else native.cuda_unavailable_reason(device)
    if reason is not None:
        warnings.warn(f"FusedSGD runs on torch's for-loop on {device}: {reason}", RuntimeWarning, stacklevel=4)
    return reason


def reason_against(tensor: Tensor) -> str | None:
    """Why the compiled update does not take `tensor`, or None: it takes plain dense tensors of four dtypes."""
    if type(tensor) not in PLAIN:
        return f"is a {type(tensor).__name__}"
    if tensor.layout != torch.strided:
        return f"is {str(tensor.layout).removeprefix('torch.')}"
    if tensor.dtype not in DTYPES:
        return f"is {str(tensor.dtype).removeprefix('torch.')}"
    if tensor.device.type not in DEVICE_TYPES:
        return f"is on {tensor.device}"
    if tensor.is_neg():
        return "is a negative view"
    if not is_dense(tensor):
        return "is not dense in memory"
    return missing_half(tensor.device)


def same_layout(a: Tensor, b: Tensor) -> bool:
    """Whether a's and b's elements, in memory order, belong together; both are dense."""
    return (a.dtype, a.device, a.shape) == (b.dtype, b.device, b.shape) and all(
        s == t for n, s, t in zip(a.shape, a.stride(), b.stride(), strict=True) if n != 1
    )


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill tensor.numel() places in memory, each once, in any order of dimensions."""
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def upload_table(update: Any, device: torch.device) -> Tensor | None:
    """The update's table on a CUDA device; the CPU needs none."""
    if device.type == "cpu":
        return None
    return torch.frombuffer(bytearray(update.table()), dtype=torch.uint8).to(device)


def run(
    update: Any,
    device: torch.device,
    *,
    table: Tensor | None = None,
    step: Tensor | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> bool:
    """Runs `update` on torch's current stream of `device`; returns whether that is being captured into a graph.

    On the CPU found_inf is the caller's to look at.
    """
    if device.type == "cpu":
        update.run_cpu(
            torch.get_num_threads(),
            step=-1.0 if step is None else float(step),
            inverse_scale=1.0 if grad_scale is None else float(inverse_of(grad_scale)),
        )
        return False
    dtypes = ((step, torch.int64), (grad_scale, torch.float32), (found_inf, torch.float32))
    scalars = [None if t is None else t.to(device, dtype, non_blocking=True) for t, dtype in dtypes]
    addresses = [0 if t is None else t.data_ptr() for t in scalars]
    stream = torch.cuda.current_stream(device)
    if table.is_cuda:
        table.record_stream(stream)
    return update.run_cuda(
        table.data_ptr(),
        step=addresses[0],
        grad_scale=addresses[1],
        found_inf=addresses[2],
        stream=stream.cuda_stream,
    )


def inverse_of(scale: Tensor) -> Tensor:
    """1 / scale, rounded as torch.amp.GradScaler rounds it."""
    return scale.double().reciprocal().float()
