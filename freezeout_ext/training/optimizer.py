"""make_optimizer: what steps, as a config names it."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ..fused import FusedAdamW, FusedSGD
from ..tasks import Task
from .config import TrainConfig


def make_optimizer(
    config: TrainConfig, task: Task, parameters: Iterable[Tensor] | Iterable[dict]
) -> torch.optim.Optimizer:
    """The optimizer that config names over the parameters, or groups of them."""
    if config.optimizer == "task":
        return task.optimizer(parameters)
    assert config.lr is not None  # a resolved config has one for all but the task's own optimizer
    if config.optimizer == "fused-adamw":
        return FusedAdamW(parameters, lr=config.lr, weight_decay=config.weight_decay)
    # A CUDA graph holds what the host knew at its capture: rates and counts have to be on the device.
    fused = True if config.graph and config.device == "cuda" else None
    if config.optimizer == "adamw":
        decay = config.weight_decay
        return torch.optim.AdamW(parameters, lr=config.lr, weight_decay=decay, fused=fused, capturable=bool(fused))
    given: dict[str, Any] = {"lr": config.lr, "momentum": config.momentum, "nesterov": config.momentum > 0}
    given["weight_decay"] = config.weight_decay
    if config.optimizer == "fused-sgd":
        return FusedSGD(parameters, **given)
    return torch.optim.SGD(parameters, **given, fused=fused)
