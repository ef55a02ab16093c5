"""What is put on the user's modules: a pin in eval mode, hooks, forwards on the instance."""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn


def pin(module: nn.Module) -> None:
    """Puts the module in eval mode and keeps it there: model.train() reaches a module through its `train`."""
    module.training = False
    # A partial of a plain function: pickles, and a deepcopy of the model pins the copied module.
    module.train = partial(_stay_in_eval, module)


def _stay_in_eval(module: nn.Module, mode: bool = True) -> nn.Module:
    return module


def unpin(module: nn.Module, training: bool) -> None:
    module.__dict__.pop("train", None)
    module.training = training


class TransientHook:
    """Calls function(*args) and returns nothing; a deepcopy or a pickle of the module holds a hook that does nothing.

    `observes_only` hooks change no tensor: the frozen prefix need not keep away from them.
    """

    observes_only = True

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, *args: Any) -> None:
        self.function(*args)

    def __reduce__(self) -> tuple:
        return _no_hook, ()


def _no_hook() -> Callable[..., None]:
    return _do_nothing


def _do_nothing(*_: Any) -> None:
    return None


class OwnForward:
    """A forward on the instance that copies and pickles of the module do not keep."""

    def __init__(self, module: nn.Module, function: Callable) -> None:
        self.module = module
        self.function = function
        self.replaced = module.__dict__.get("forward")
        self.original = module.forward
        module.forward = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)

    def __reduce__(self) -> tuple:
        if self.replaced is not None:
            return _same, (self.replaced,)
        return partial, (_class_forward, self.module)

    def remove(self) -> None:
        # Whoever wrapped this forward since keeps a forward that does what the module's own does.
        self.function = self.original
        if self.module.__dict__.get("forward") is self:
            del self.module.forward
            if self.replaced is not None:
                self.module.forward = self.replaced


def _class_forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return type(module).forward(module, *args, **kwargs)


def _same(forward: Callable) -> Callable:
    return forward
