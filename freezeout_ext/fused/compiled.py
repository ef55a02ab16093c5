"""What the optimizers and their ops share: which tensors the compiled update takes, and running it on them."""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from freezeout_ext import native

# The compiled module's numbers for formulas and dtypes, and DLPack's (code, bits).
FORMULAS = {"sgd": 0, "adamw": 1}
DTYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}
DLPACK_DTYPES = {
    torch.float32: (2, 32),
    torch.float64: (2, 64),
    torch.float16: (2, 16),
    torch.bfloat16: (4, 16),
    torch.int64: (0, 64),
}
# Exactly these types: a DTensor or FakeTensor has no address of its own.
PLAIN = (Tensor, nn.Parameter)
DEVICE_TYPES = {"cpu": 1, "cuda": 2}
OPTIONS = {
    "sgd": {"weight_decay": 1, "maximize": 2, "momentum": 4, "nesterov": 8},
    "adamw": {"weight_decay": 1, "maximize": 2, "amsgrad": 4, "coupled": 8},
}
MAX_STATES = 3
# What PreparedStep.run says of a gradient that the update would change under its own hands.
SHARED_GRADIENT = "a gradient shares memory with a parameter or a state"


@cache
def tensor_reader() -> Any:
    """The compiled module's reader of tensors, made once."""
    return native.C.TensorReader(
        Tensor, nn.Parameter, DLPACK_DTYPES, torch.autograd.graph.increment_version, exchange=True
    )


@cache
def missing_half(device: torch.device) -> str | None:
    """Why no compiled update runs on `device`, or None. Warns too, once for each device."""
    reason = native.import_error if device.type == "cpu" else native.cuda_unavailable_reason(device)
    if reason is not None:
        warnings.warn(f"fused optimizers run on torch's for-loop on {device}: {reason}", RuntimeWarning, stacklevel=4)
    return reason


def reason_against(tensor: Tensor) -> str | None:
    """Why the compiled update does not take `tensor`; None for plain dense tensors of the four dtypes."""
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


def reason_against_grad(p: Tensor) -> str | None:
    return None if p.grad is None else reason_against_state(p, "gradient", p.grad)


def reason_against_state(p: Tensor, name: str, state: Tensor) -> str | None:
    reason = reason_against(state)
    if reason is None and not same_layout(p, state):
        reason = "has another dtype, device, shape or layout than its parameter"
    return None if reason is None else f"its {name} {reason}"


def reason_against_containers(groups: Any, state: Any) -> str | None:
    if not isinstance(groups, list):
        return f"param_groups is a {type(groups).__name__}, not a list"
    if not isinstance(state, dict):
        return f"the optimizer's state is a {type(state).__name__}, not a dict"
    return None


def reason_against_container(group: Any) -> str | None:
    if not isinstance(group, dict):
        return f"its group is a {type(group).__name__}, not a dict"
    if not isinstance(group["params"], list):
        return f"its group's params are a {type(group['params']).__name__}, not a list"
    return None


def same_layout(a: Tensor, b: Tensor) -> bool:
    """Whether the k-th element in memory of a belongs to the k-th of b, for every k; a and b are dense."""
    return (a.dtype, a.device, a.shape) == (b.dtype, b.device, b.shape) and all(
        s == t for n, s, t in zip(a.shape, a.stride(), b.stride(), strict=True) if n != 1
    )


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill tensor.numel() places in memory, each place once, in any order of dimensions."""
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def share_memory(written: Iterable[tuple[Tensor, Any]], read: Iterable[tuple[Tensor, Any]] = ()) -> set[int]:
    """ids of the parameters one of whose tensors overlaps another tensor, unless both are only read.

    Args:
        written: (parameter, a tensor that its update writes).
        read: (parameter, a tensor that its update reads).
    """
    spans = sorted(
        (*_device_key(t.device), begin := t.data_ptr(), begin + _extent(t), is_read, id(p))
        for is_read, tensors in ((False, written), (True, read))
        for p, t in tensors
        if type(t) in PLAIN and t.layout == torch.strided and t.numel() > 0
    )
    shared: set[int] = set()
    furthest: dict[bool, tuple] = {}  # of what is written, of what is read
    for span in spans:
        for other in furthest.values():
            if span[:2] == other[:2] and span[2] < other[3] and not (span[4] and other[4]):
                shared |= {span[5], other[5]}
        known = furthest.get(span[4])
        if known is None or span[:2] != known[:2] or span[3] > known[3]:
            furthest[span[4]] = span
    return shared


@cache
def _device_key(device: torch.device) -> tuple[str, int]:
    return device.type, device.index or 0


def _extent(tensor: Tensor) -> int:
    """Bytes from the first element in memory to the end of the last one."""
    if tensor.is_contiguous():
        return tensor.numel() * tensor.element_size()  # .nbytes refuses the sizes of a trace
    dims = zip(tensor.shape, tensor.stride(), strict=True)
    return (1 + sum((size - 1) * stride for size, stride in dims)) * tensor.element_size()


def device_of(batch: Any) -> torch.device:
    """Where a TensorBatch's tensors are."""
    return torch.device("cpu") if batch.device_type == 1 else torch.device("cuda", batch.device_index)


def upload_table(batch: Any) -> Tensor | None:
    """The batch's table on its CUDA device, for the current stream; None on the CPU, which needs no table."""
    if batch.device_type == 1:
        return None
    table = torch.frombuffer(bytearray(batch.table()), dtype=torch.uint8).to(device_of(batch))
    use_current_stream(batch, table)
    return table


def use_current_stream(batch: Any, table: Tensor) -> None:
    """Makes the batch run on torch's current stream of the table's device."""
    stream = torch.cuda.current_stream(table.device)
    table.record_stream(stream)
    batch.set_table(table.data_ptr(), stream.cuda_stream)


def check_lists(
    params: list[Tensor], lists: Mapping[str, Sequence | None], layer_of: list[int], num_rates: int
) -> None:
    """Raises ValueError unless the lists fit one another and one compiled update takes all tensors.

    Args:
        params: the parameters.
        lists: name -> one entry for each parameter, or None. "steps" are counters. Every other tensor has the layout
            of its parameter.
        layer_of: for each parameter, the index of its rate; ascending.
        num_rates: how many rates there are.
    """
    for name, values in lists.items():
        if values is not None and len(values) != len(params):
            raise ValueError(f"{name} must have one entry for each of {len(params)} parameters, got {len(values)}")
    if list(layer_of) != sorted(layer_of) or layer_of[0] < 0 or layer_of[-1] >= num_rates:
        raise ValueError(f"layer_of must ascend within 0..{num_rates - 1}, got {layer_of}")
    if params[0].device.type not in DEVICE_TYPES:
        raise ValueError(f"params must be on the CPU or a CUDA device, got {params[0].device}")
    for i, p in enumerate(params):
        if (p.dtype, p.device) != (params[0].dtype, params[0].device):
            raise ValueError(f"params must share dtype and device, got {p.dtype} on {p.device} (parameter {i})")
        if p.dtype not in DTYPES or not is_dense(p):
            raise ValueError(f"params must be dense and of a floating dtype, got {p.dtype}, strides {p.stride()} ({i})")
        for name, others in lists.items():
            if others is None or name == "layer_of":
                continue
            if name == "steps":
                step = others[i]
                if (step.dtype, step.device, step.numel()) != (torch.float32, p.device, 1):
                    found = f"{step.dtype} {tuple(step.shape)} on {step.device}"
                    raise ValueError(f"steps must be one float32 each on {p.device}, got {found} ({i})")
            elif not same_layout(p, others[i]):
                raise ValueError(f"{name} must be laid out as their parameters, got strides {others[i].stride()} ({i})")


def update_(
    formula: str,
    params: list[Tensor],
    grads: list[Tensor],
    states: list[list[Tensor]],  # a list for each state of the formula
    steps: list[Tensor] | None,
    layer_of: list[int],
    groups: list[tuple],  # (lr, weight_decay, coefficients, options) of each layer
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    rates: Tensor | None = None,  # [layers], in place of the groups' lr
) -> None:
    """The compiled update of checked lists, in place.

    Raises:
        RuntimeError: the compiled half does not run on the device.
    """
    device = params[0].device
    missing = missing_half(device)
    if rates is not None:
        groups = [(lr, *others) for lr, (_, *others) in zip(rates.tolist(), groups, strict=True)]
    if missing is not None:
        raise RuntimeError(f"the fused update has no compiled half for {device}: {missing}")
    work = []
    for i, p in enumerate(params):
        addresses = [tensors[i].data_ptr() for tensors in states]
        addresses += [0] * (MAX_STATES - len(addresses))
        # An empty tensor has no address. 64 stands for one that is never read.
        grad = grads[i].data_ptr() or 64
        step = 0 if steps is None else steps[i].data_ptr()
        work.append((p.data_ptr(), addresses, grad, step, p.numel(), layer_of[i]))
    batch = native.C.TensorBatch(
        formula=FORMULAS[formula],
        dtype=DTYPES[params[0].dtype],
        device_type=DEVICE_TYPES[device.type],
        device_index=device.index or 0,
        work=work,
        groups=[(lr, 0.0, 0.0, decay, coefficients, options) for lr, decay, coefficients, options in groups],
    )
    table = upload_table(batch)  # held until the launch is made
    scalars = [None if t is None else t.to(device, torch.float32) for t in (grad_scale, found_inf)]
    addresses = [0 if t is None else t.data_ptr() for t in scalars]
    batch.run(num_threads=torch.get_num_threads(), schedule_step=0, grad_scale=addresses[0], found_inf=addresses[1])
    del table


def option_bits(formula: str, **on: bool) -> int:
    """The compiled module's bits for a formula's options."""
    return sum(OPTIONS[formula][name] for name, is_on in on.items() if is_on)


def inverse_of(scale: Tensor) -> Tensor:
    """1 / scale, rounded as torch.amp.GradScaler rounds it."""
    return scale.double().reciprocal().float()


def unscale_(grads: list[Tensor], grad_scale: Tensor) -> None:
    inverse = inverse_of(grad_scale)
    for grad in grads:
        (grad._values() if grad.is_sparse else grad).mul_(inverse.to(grad.device))


def overflowed(found_inf: Tensor | None) -> bool:
    """Whether a scaler found a gradient that is not finite.

    found_inf may be a sum over devices, so any number but 0 says yes.
    """
    return found_inf is not None and found_inf.item() != 0
