"""fused_sgd_, the torch op, and fused_sgd_reference_, which judges it."""

import torch
from torch import Tensor

from freezeout_ext.fused import compiled


def fused_sgd_reference_(
    params: list[Tensor],
    grads: list[Tensor],
    momentum_buffers: list[Tensor],
    layer_of: list[int],
    lrs: list[float],
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    rates: Tensor | None = None,
    *,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
) -> None:
    """d = grad + weight_decay * p;  v = momentum * v + (1 - dampening) * d;  p -= lr * (d + momentum * v) or lr * v

    In place, with torch's own operations, tensor by tensor. The arguments are those of fused_sgd_.
    """
    if compiled.overflowed(found_inf):
        return
    if rates is not None:
        lrs = rates.tolist()
    for i, (p, grad) in enumerate(zip(params, grads, strict=True)):
        if grad_scale is not None:
            grad.mul_(compiled.inverse_of(grad_scale))
        d = -grad if maximize else grad
        if weight_decay != 0:
            d = d.add(p, alpha=weight_decay)
        if momentum != 0:
            v = momentum_buffers[i]
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
    rates: Tensor | None = None,
    *,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
) -> None:
    """p -= lr * v, v = momentum * v + (1 - dampening) * (grad + weight_decay * p): many tensors in one call, in place.

    Args:
        params: dense tensors of one dtype (float32, float64, float16, bfloat16) on one device, no two in the
            same memory.
        grads: one for each parameter, with the parameter's layout in memory.
        momentum_buffers: one for each parameter, with the parameter's layout in memory. They are zeros before the
            first step. Empty without momentum.
        layer_of: for each parameter, the index of its rate; ascending.
        lrs: learning rates.
        grad_scale: gradients are divided by grad_scale, in place.
        found_inf: where found_inf is not 0, nothing is written.
        rates: learning rates in one tensor, one a layer, in place of lrs.
        momentum: factor of the momentum buffer.
        dampening: 1 - dampening is the factor of what is added to the momentum buffer.
        weight_decay: factor of the parameter that is added to its gradient.
        nesterov: whether p -= lr * (d + momentum * v), with d = grad + weight_decay * p.
        maximize: whether -grad takes grad's place.

    Raises:
        ValueError: lists of different lengths, a layer without a rate, or a tensor that is not as above.
        RuntimeError: the compiled half does not run on the device.
    """
    if not params:
        return
    buffers = momentum_buffers if momentum != 0 else None
    lists = {"grads": grads, "momentum_buffers": buffers, "layer_of": layer_of}
    compiled.check_lists(params, lists, layer_of, len(lrs))
    bits = compiled.option_bits(
        "sgd",
        weight_decay=weight_decay != 0,
        maximize=maximize,
        momentum=momentum != 0,
        nesterov=nesterov and momentum != 0,
    )
    groups = [(lr, weight_decay, (momentum, 1 - dampening, 0.0), bits) for lr in lrs]
    states = [] if buffers is None else [buffers]
    compiled.update_("sgd", params, grads, states, None, layer_of, groups, grad_scale, found_inf, rates)


@fused_sgd_.register_fake
def _(*arguments, **options) -> None:
    return None
