"""fused_adamw_, the torch op, and fused_adamw_reference_, which judges it."""

import torch
from torch import Tensor

from freezeout_ext.fused import compiled


def fused_adamw_reference_(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    max_exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    layer_of: list[int],
    lrs: list[float],
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    rates: Tensor | None = None,
    *,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    amsgrad: bool = False,
    maximize: bool = False,
    decoupled: bool = True,
) -> None:
    """m, v = averages of grad and grad^2;  p -= lr * m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps)

    In place, with torch's own operations, tensor by tensor. The arguments are those of fused_adamw_.
    """
    if compiled.overflowed(found_inf):
        return
    if rates is not None:
        lrs = rates.tolist()
    for i, (p, grad, m, v) in enumerate(zip(params, grads, exp_avgs, exp_avg_sqs, strict=True)):
        lr = lrs[layer_of[i]]
        if grad_scale is not None:
            grad.mul_(compiled.inverse_of(grad_scale))
        g = -grad if maximize else grad
        steps[i].add_(1)
        if weight_decay != 0 and decoupled:
            p.mul_(1 - lr * weight_decay)
        elif weight_decay != 0:
            g = g.add(p, alpha=weight_decay)
        m.lerp_(g, 1 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        if amsgrad:
            v = torch.maximum(max_exp_avg_sqs[i], v, out=max_exp_avg_sqs[i])
        root = (1 - beta2 ** steps[i].item()) ** 0.5
        p.addcdiv_(m, (v.sqrt() / root).add_(eps), value=-(lr / (1 - beta1 ** steps[i].item())))


@torch.library.custom_op(
    "freezeout_ext::fused_adamw_",
    mutates_args=("params", "grads", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs", "steps"),
)
def fused_adamw_(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    max_exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    layer_of: list[int],
    lrs: list[float],
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    rates: Tensor | None = None,
    *,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    amsgrad: bool = False,
    maximize: bool = False,
    decoupled: bool = True,
) -> None:
    """p -= lr * m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps): many tensors in one call, in place.

    Args:
        params: dense tensors of one dtype (float32, float64, float16, bfloat16) on one device, no two in the
            same memory.
        grads: one for each parameter, with the parameter's layout in memory.
        exp_avgs: m of each parameter, with the parameter's layout in memory; zeros before the first step.
        exp_avg_sqs: v of each parameter, likewise.
        max_exp_avg_sqs: the largest v so far, likewise; empty without amsgrad.
        steps: t of each parameter, one float32 on its device; the call advances each by 1.
        layer_of: for each parameter, the index of its rate; ascending.
        lrs: learning rates.
        grad_scale: gradients are divided by grad_scale, in place.
        found_inf: where found_inf is not 0, nothing is written.
        rates: learning rates in one tensor, one a layer, in place of lrs.
        beta1: decay of m.
        beta2: decay of v.
        eps: added to the denominator.
        weight_decay: see decoupled.
        amsgrad: whether the largest v so far takes v's place in the denominator.
        maximize: whether -grad takes grad's place.
        decoupled: p *= 1 - lr * weight_decay (AdamW); else grad + weight_decay * p takes grad's place (Adam).

    Raises:
        ValueError: lists of different lengths, a layer without a rate, or a tensor that is not as above.
        RuntimeError: the compiled half does not run on the device.
    """
    if not params:
        return
    largest = max_exp_avg_sqs if amsgrad else None
    lists = {"grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs, "max_exp_avg_sqs": largest}
    compiled.check_lists(params, {**lists, "steps": steps, "layer_of": layer_of}, layer_of, len(lrs))
    decays = weight_decay != 0
    bits = compiled.option_bits(
        "adamw", weight_decay=decays, maximize=maximize, amsgrad=amsgrad, coupled=decays and not decoupled
    )
    groups = [(lr, weight_decay, (beta1, beta2, eps), bits) for lr in lrs]
    states = [exp_avgs, exp_avg_sqs] if largest is None else [exp_avgs, exp_avg_sqs, largest]
    compiled.update_("adamw", params, grads, states, steps, layer_of, groups, grad_scale, found_inf, rates)


@fused_adamw_.register_fake
def _(*arguments, **options) -> None:
    return None
