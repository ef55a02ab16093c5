"""What is put on the user's modules: a pin in eval mode, hooks, methods on the instance. No copy keeps any of it."""

import threading
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from operator import itemgetter
from types import FunctionType
from typing import Any

import torch
from torch import nn
from torch.backends import mha


class OwnMethod:
    """A method on the instance of a module. A copy or a pickle of the module gets what stood in its place.

    A pickle names nothing of this package: the file of a model that was saved whole is read where there is none.

    Args:
        module: whose method it is.
        name: of the method.
        function: what the method does.

    Attributes:
        original: the method that is replaced, bound to the module.
        replaced: what stood on the instance under this name, or None.
    """

    def __init__(self, module: nn.Module, name: str, function: Callable) -> None:
        self.module = module
        self.name = name
        self.function = function
        self.replaced = module.__dict__.get(name)
        self.original = method_of(module, name)
        module.__dict__[name] = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)

    def __reduce__(self) -> tuple:
        if self.replaced is not None:
            return itemgetter(0), ((self.replaced,),)
        # The copy has no attributes yet as this is called, so this is the method of its class.
        return getattr, (self.module, self.name)

    def remove(self) -> None:
        # Whoever wrapped this method since keeps a method that does what the module's own does.
        self.function = self.original
        if self.module.__dict__.get(self.name) is self:
            del self.module.__dict__[self.name]
            if self.replaced is not None:
                self.module.__dict__[self.name] = self.replaced


class OwnForward(OwnMethod):
    """A forward on the instance that copies and pickles of the module do not keep."""

    def __init__(self, module: nn.Module, function: Callable) -> None:
        super().__init__(module, "forward", function)


class Pin(OwnMethod):
    """module.train(mode) leaves the module in eval mode. `remove` puts it in the mode that was asked for last."""

    def __init__(self, module: nn.Module) -> None:
        self.wanted = module.training
        super().__init__(module, "train", self._note)
        module.training = False
        self._reset = None
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.track_running_stats:
            self._reset = OwnMethod(module, "reset_running_stats", self._refuse_reset)

    def remove(self) -> None:
        super().remove()
        self.module.training = self.wanted
        if self._reset is not None:
            self._reset.remove()

    def _note(self, mode: bool = True) -> nn.Module:
        self.wanted = mode
        for child in self.module.children():
            child.train(mode)
        return self.module

    def _refuse_reset(self) -> None:
        raise RuntimeError(
            f"running statistics of a frozen {type(self.module).__name__} must not be reset: it stays in eval mode and "
            "would not learn them again; call update_bn on a copy (AveragedModel(model), copy.deepcopy(model)), or on "
            "the model after freezeout.close()"
        )


def pin(module: nn.Module) -> None:
    """Puts the module in eval mode and keeps it there: model.train() reaches a module through its `train`."""
    Pin(module)


def unpin(module: nn.Module) -> None:
    """Undoes `pin`. The module goes to the mode that model.train(mode) asked for last while it was pinned."""
    own = module.__dict__.get("train")
    if isinstance(own, Pin):
        own.remove()


def is_pinned(module: nn.Module) -> bool:
    return isinstance(module.__dict__.get("train"), Pin)


class TrainingPath:
    """In training a frozen module of torch's runs the path that it ran before it froze.

    In eval mode, without gradients, nn.TransformerEncoder, nn.TransformerEncoderLayer and nn.MultiheadAttention take
    torch's fast path: other bits, NaN for rows that are masked whole, and nested tensors that a layer which trains does
    not take. An encoder decides by its first layer. Evaluation (`model.eval()`) is torch's own.
    """

    KINDS = (nn.TransformerEncoder, nn.TransformerEncoderLayer, nn.MultiheadAttention)

    def __init__(self, module: nn.Module) -> None:
        self._decides: Any = module.layers[0] if isinstance(module, nn.TransformerEncoder) else module
        self._forward = OwnForward(module, self._run)

    def remove(self) -> None:
        self._forward.remove()

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        if not (is_pinned(self._decides) and in_training(self._forward.module)):
            return self._forward.original(*args, **kwargs)
        with no_fast_path():
            return self._forward.original(*args, **kwargs)


class no_fast_path:
    """Within the block torch.backends.mha's fast path is off; behind the last of several blocks it is as it was.

    torch's switch is one for the process. Another thread that computes meanwhile takes the plain path as well.
    """

    _lock = threading.Lock()
    _depth = 0
    _as_set = True

    def __enter__(self) -> None:
        if torch.compiler.is_compiling():  # which traces neither a lock nor the switch's function
            self._compiled = mha._is_fastpath_enabled
            mha._is_fastpath_enabled = False
            return
        cls = no_fast_path
        with cls._lock:
            if cls._depth == 0:
                cls._as_set = mha.get_fastpath_enabled()
                mha.set_fastpath_enabled(False)
            cls._depth += 1

    def __exit__(self, *_: object) -> None:
        if torch.compiler.is_compiling():
            mha._is_fastpath_enabled = self._compiled
            return
        cls = no_fast_path
        with cls._lock:
            cls._depth -= 1
            if cls._depth == 0:
                mha.set_fastpath_enabled(cls._as_set)


def in_training(module: nn.Module) -> bool:
    """Whether the module is in training mode, or would be if it were not pinned."""
    own = module.__dict__.get("train")
    return own.wanted if isinstance(own, Pin) else module.training


class TransientHook:
    """Calls function(*args) and returns nothing. In a deepcopy or a pickle of the module the hook does nothing."""

    @property
    def __name__(self) -> str:
        raise RuntimeError(_NO_SCRIPT)  # torch.jit.script asks for it

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, *args: Any) -> None:
        self.function(*args)

    def __deepcopy__(self, memo: dict) -> "TransientHook":
        return TransientHook(_do_nothing)

    def __reduce__(self) -> tuple:
        return getattr, (nullcontext(), "__exit__")  # does nothing, and is no part of this package


def observes_only(hook: Callable) -> bool:
    """Whether a hook changes no tensor, so that the frozen prefix need not keep away from it."""
    return isinstance(hook, TransientHook) or getattr(hook, "__func__", None) is nullcontext.__exit__


_NO_SCRIPT = (
    "torch.jit.script cannot compile the hooks of FreezeOut: script the model within `with freezeout.paused():`, or "
    "after freezeout.close(); of a copy made before, call clear() on its modules' _forward_hooks and _forward_pre_hooks"
)


def _do_nothing(*_: Any) -> None:
    return None


def method_of(module: nn.Module, name: str) -> Callable:
    """-> the module's method as it is called: one on the instance, or the class's own at the time of a call."""
    if name not in vars(module) and isinstance(getattr(type(module), name), FunctionType):
        return partial(_class_method, module, name)
    return getattr(module, name)


def _class_method(module: nn.Module, name: str, *args: Any, **kwargs: Any) -> Any:
    return getattr(type(module), name)(module, *args, **kwargs)
