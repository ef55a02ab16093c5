"""Keeps a module in eval mode through model.train(), in copies, pickles and replicas of the model too."""

from functools import partial

from torch import nn

from .replicas import follow_replicas, leave_replicas


def pin(module: nn.Module) -> None:
    """Puts the module in eval mode and keeps it there: model.train() reaches a module through its `train`."""
    module.training = False
    # A partial of a plain function: pickles, and a deepcopy of the model pins the copied module.
    module.train = partial(_stay_in_eval, module)
    follow_replicas(module)


def _stay_in_eval(module: nn.Module, mode: bool = True) -> nn.Module:
    return module


def unpin(module: nn.Module, training: bool) -> None:
    module.__dict__.pop("train", None)
    leave_replicas(module)
    module.training = training
