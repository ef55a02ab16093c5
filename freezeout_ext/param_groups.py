"""An optimizer's param groups: split into one a layer, joined again, and their learning rates set."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from .layers import Layers

# What FreezeOut adds to each group.
GROUP_KEYS = ("layer", "base_lr", "frozen")


def set_rate(group: dict, rate: float) -> None:
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate


def split_groups(
    optimizers: Sequence[torch.optim.Optimizer], layer_of: dict[nn.Parameter, int], layers: Layers
) -> list[list[list]]:
    """Splits each param group into one a layer, in place; returns the parameters of each optimizer's unsplit groups."""
    unsplit = [[list(group["params"]) for group in optimizer.param_groups] for optimizer in optimizers]
    held = {p for groups in unsplit for params in groups for p in params}
    for i, layer in enumerate(layers):
        for name, p in layer.parameters.items():
            if p not in held:
                raise ValueError(f"optimizer must hold every trainable parameter, {name} of layer {i} is not in it")
    for optimizer in optimizers:
        split = []
        for group in optimizer.param_groups:
            parts: dict[int, list] = {}
            for p in group["params"]:
                parts.setdefault(layer_of.get(p, len(layers) - 1), []).append(p)
            for i in sorted(parts):
                part = {**group, "params": parts[i]}
                if isinstance(group["lr"], Tensor):
                    part["lr"] = group["lr"].clone()
                split.append(part)
        optimizer.param_groups[:] = split
    return unsplit


def join_groups(optimizer: torch.optim.Optimizer, unsplit: Iterable[list]) -> None:
    group_of = {p: group for group in optimizer.param_groups for p in group["params"]}
    split = {id(group_of[p]) for params in unsplit for p in params}
    joined = [{**group_of[params[0]], "params": params} for params in unsplit if params]
    joined += [group for group in optimizer.param_groups if id(group) not in split]  # added since
    for group in joined:
        set_rate(group, group.get("base_lr", group["lr"]))
        for key in GROUP_KEYS:
            group.pop(key, None)
    optimizer.param_groups[:] = joined


def let_scaler_skip(optimizer: torch.optim.Optimizer) -> None:
    """GradScaler.step asserts that some gradient was checked for inf, unless the optimizer says that it sees to it.

    One whose parameters are all frozen has none and says so. It has nothing to update either way.
    """
    idle = all(group["frozen"] for group in optimizer.param_groups)
    if idle and not hasattr(optimizer, "_was_amp_aware"):
        optimizer._was_amp_aware = getattr(optimizer, "_step_supports_amp_scaling", False)
        optimizer._step_supports_amp_scaling = True
        optimizer._forget_inf = optimizer.register_step_pre_hook(_forget_inf)
    elif not idle and hasattr(optimizer, "_was_amp_aware"):
        optimizer._step_supports_amp_scaling = optimizer._was_amp_aware
        optimizer._forget_inf.remove()
        del optimizer._was_amp_aware, optimizer._forget_inf


def _forget_inf(optimizer: torch.optim.Optimizer, *_: object) -> None:
    # torch's loops refuse the sum over no devices that GradScaler sets.
    if hasattr(optimizer, "found_inf"):
        optimizer.found_inf = optimizer.grad_scale = None
