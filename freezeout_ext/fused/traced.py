"""What torch.compile traces of a step: the registered op, and which parameters it takes."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from freezeout_ext.fused import compiled


@torch.compiler.assume_constant_result
def has_half(device: torch.device) -> bool:
    """Whether the compiled update runs on `device`, for code that is traced."""
    return device.type in compiled.DEVICE_TYPES and compiled.missing_half(device) is None


def op_takes(tensors: list[Tensor | None]) -> bool:
    """Whether a registered op takes a parameter, its gradient and its states, in traced code.

    The op takes contiguous and channels-last tensors only, since traced code cannot compare strides that are symbols.

    Args:
        tensors: the parameter, its gradient, its states; None for what is missing.
    """
    p = tensors[0]
    assert p is not None  # the parameter
    # Counters have a shape of their own.
    alike = [t for t in tensors if t is not None and (t.dim() == p.dim() or t is tensors[1])]
    if any(t.layout != torch.strided or t.dtype != p.dtype or t.device != p.device for t in alike):
        return False
    if p.dtype not in compiled.DTYPES or not has_half(p.device) or any(t.shape != p.shape for t in alike):
        return False
    if all(t.is_contiguous() for t in alike):
        return True
    return p.dim() == 4 and all(t.is_contiguous(memory_format=torch.channels_last) for t in alike)


def update_by_op_(
    op: Callable[..., None],
    groups: list[tuple[dict[str, Any], list[list[Tensor]], list[bool], dict[str, Any]]],
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> list[tuple[dict[str, Any], list[Tensor]]]:
    """Calls the op once for each set of equal hyperparameters; returns groups and parameters that it does not take.

    groups: param group, the op's lists for it, whether each parameter shares memory, the op's keyword arguments.
    """
    # For each set of equal numbers: the lists of tensors, the layer of each tensor, and the layers' rates.
    calls: dict[tuple, tuple[list[list[Tensor]], list[int], list[Any]]] = {}
    rest = []
    for group, lists, shares, numbers in groups:
        begun = []
        for i, p in enumerate(lists[0]):
            tensors = [each[i] if each else None for each in lists]
            # SGD's first step with dampening has no momentum buffer yet.
            lacks_state = any(len(each) > 0 and each[i] is None for each in lists)
            if lacks_state or shares[i] or not op_takes(tensors):
                rest.append((group, [p]))
                continue
            key: tuple[Any, ...] = (p.dtype, p.device, *numbers.items())
            if key not in calls:
                calls[key] = ([[] for _ in lists], [], [])
            gathered, layer_of, lrs = calls[key]
            if key not in begun:
                begun.append(key)
                lrs.append(group["lr"])
            layer_of.append(len(lrs) - 1)
            for each, tensor in zip(gathered, tensors, strict=True):
                if tensor is not None:
                    each.append(tensor)
    with torch.no_grad():
        for key, (gathered, layer_of, lrs) in calls.items():
            rates = None
            if any(isinstance(lr, Tensor) for lr in lrs):
                rates = torch.stack([torch.as_tensor(lr, dtype=torch.float64, device=key[1]).view(()) for lr in lrs])
                lrs = [0.0] * len(lrs)
            op(*gathered, layer_of, lrs, grad_scale, found_inf, rates, **dict(key[2:]))
    return rest
