"""An optimizer's param groups: split into one a layer, joined again, and their learning rates set."""

from collections.abc import Iterable

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


def check_optimizer(optimizer: torch.optim.Optimizer) -> None:
    if not hasattr(optimizer, "param_groups") or not hasattr(optimizer, "state"):
        raise TypeError(f"optimizer must be a torch optimizer, got {type(optimizer).__name__}")
    if any(GROUP_KEYS[0] in group for group in optimizer.param_groups):
        raise ValueError("optimizer must not be held by another FreezeOut; call its close() first")
    if isinstance(optimizer, torch.optim.LBFGS):
        raise TypeError("optimizer must take several param groups, LBFGS reads only the first")
    if hasattr(optimizer.step, "_wrapped_by_lr_sched"):
        raise ValueError("optimizer must not have an LR scheduler yet: FreezeOut splits its groups, attach it after")


def split_groups(optimizer: torch.optim.Optimizer, layer_of: dict[nn.Parameter, int], layers: Layers) -> list[list]:
    """Splits each param group into one a layer, in place; returns the parameters of the unsplit groups."""
    unsplit = [list(group["params"]) for group in optimizer.param_groups]
    held = {p for params in unsplit for p in params}
    for i, layer in enumerate(layers):
        for name, p in layer.parameters.items():
            if p not in held:
                raise ValueError(f"optimizer must hold every trainable parameter, {name} of layer {i} is not in it")
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
