"""fused_sgd_, the torch op, and fused_sgd_reference_, which judges it."""

import torch
from torch import Tensor

from freezeout_ext import native
from freezeout_ext.fused import compiled


def fused_sgd_reference_(
    params: list[Tensor],
    grads: list[Tensor],
    momentum_buffers: list[Tensor],
    layer_of: list[int],
    lrs: list[float],
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    *,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
    first_step: list[bool] | None = None,
) -> None:
    """d = grad + weight_decay * p;  v = momentum * v + (1 - dampening) * d;  p -= lr * (d + momentum * v) or lr * v

    In place, with torch's own operations, tensor by tensor. See fused_sgd_ for the arguments.
    """
    if found_inf is not None and found_inf.item() != 0:
        return
    for i, (p, grad) in enumerate(zip(params, grads, strict=True)):
        if grad_scale is not None:
            grad.mul_(compiled.inverse_of(grad_scale))
        d = -grad if maximize else grad
        if weight_decay != 0:
            d = d.add(p, alpha=weight_decay)
        if momentum != 0:
            v = momentum_buffers[i]
            if first_step is not None and first_step[i]:
                v.copy_(d)
            else:
                v.mul_(momentum).add_(d, alpha=1 - dampening)
            d = d.add(v, alpha=momentum) if nesterov else v
        p.add_(d, alpha=-lrs[layer_of[i]])


@torch.library.custom_op("freezeout_ext::fused_sgd_", mutates_args=("params", "grads", "momentum_buffers"))
def fused_sgd_(
    params: list[Tensor],
    grads: list[Tensor],
    momentum_buffers: list[Tensor],
    layer_of: list[int],
    lrs: list[float],
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    *,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
    first_step: list[bool] | None = None,
) -> None:
    """p -= lr * v, v = momentum * v + (1 - dampening) * (grad + weight_decay * p): many tensors in one call, in place.

    Args:
        params, grads: dense tensors of one dtype (float32, float64, float16, bfloat16) on one device; each gradient
            laid out in memory as its parameter.
        momentum_buffers: one for each parameter, laid out as it; empty without momentum.
        layer_of: for each parameter, the index of its rate; ascending.
        lrs: learning rates.
        grad_scale: gradients are divided by it, in place.
        found_inf: nothing happens where it is not 0.
        first_step: whether a buffer holds nothing yet, for each parameter; default: none of them.

    Raises:
        ValueError: lists of different lengths, a layer without a rate, a tensor that is not as above.
        RuntimeError: no compiled half for the device.
    """
    if not params:
        return
    device = params[0].device
    _check(params, grads, momentum_buffers if momentum != 0 else None, layer_of, lrs, first_step)
    missing = compiled.missing_half(device)
    if missing is not None:
        raise RuntimeError(f"fused_sgd_ has no compiled half for {device}: {missing}")
    if device.type == "cpu" and found_inf is not None and found_inf.item() != 0:
        return
    options = {"weight_decay": weight_decay != 0, "maximize": maximize, "momentum": momentum != 0, "nesterov": nesterov}
    bits = sum(compiled.OPTIONS[name] for name, on in options.items() if on)
    buffers = [b.data_ptr() for b in momentum_buffers] if momentum != 0 else [0] * len(params)
    firsts = first_step or [False] * len(params)
    update = native.C.Update(
        dtype=compiled.DTYPES[params[0].dtype],
        device_type=compiled.DEVICE_TYPES[device.type],
        device_index=device.index or 0,
        work=[
            (p.data_ptr(), buffer, grad.data_ptr(), p.numel(), layer, first)
            for p, buffer, grad, layer, first in zip(params, buffers, grads, layer_of, firsts, strict=True)
        ],
        groups=[(lr, 0.0, 0.0, momentum, 1 - dampening, weight_decay, bits) for lr in lrs],
    )
    table = compiled.upload_table(update, device)
    compiled.run(update, device, table=table, grad_scale=grad_scale, found_inf=found_inf)


@fused_sgd_.register_fake
def _(*arguments, **options) -> None:
    return None


def _check(
    params: list[Tensor],
    grads: list[Tensor],
    momentum_buffers: list[Tensor] | None,
    layer_of: list[int],
    lrs: list[float],
    first_step: list[bool] | None,
) -> None:
    lists = {"grads": grads, "momentum_buffers": momentum_buffers, "layer_of": layer_of, "first_step": first_step}
    for name, values in lists.items():
        if values is not None and len(values) != len(params):
            raise ValueError(f"{name} must have one entry for each of {len(params)} parameters, got {len(values)}")
    if list(layer_of) != sorted(layer_of) or layer_of[0] < 0 or layer_of[-1] >= len(lrs):
        raise ValueError(f"layer_of must ascend within 0..{len(lrs) - 1}, got {layer_of}")
    if params[0].device.type not in compiled.DEVICE_TYPES:
        raise ValueError(f"params must be on the CPU or a CUDA device, got {params[0].device}")
    for i, p in enumerate(params):
        if (p.dtype, p.device) != (params[0].dtype, params[0].device):
            raise ValueError(f"params must share dtype and device, got {p.dtype} on {p.device} (parameter {i})")
        if p.dtype not in compiled.DTYPES or not compiled.is_dense(p):
            raise ValueError(f"params must be dense and of a floating dtype, got {p.dtype}, strides {p.stride()} ({i})")
        for name, others in (("grads", grads), ("momentum_buffers", momentum_buffers)):
            if others is not None and not compiled.same_layout(p, others[i]):
                raise ValueError(f"{name} must be laid out as their parameters, got strides {others[i].stride()} ({i})")
