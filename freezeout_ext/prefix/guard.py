"""What a captured prefix relies on, cheap to compare at each call; and how a module's forward is replaced."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn


class Guard:
    """Remembers the state of modules and says at a later call what of it changed.

    State: training flags, hooks, for each parameter and buffer its identity, address, version and requires_grad, and
    the numbers among the attributes of modules that are not torch's own (an engine may have baked them in).
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self.modules = tuple(dict.fromkeys(m for module in modules for m in module.modules()))
        self._tables = tuple((m._parameters, m._buffers) for m in self.modules)
        self._attributes = tuple(vars(m) for m in self.modules if not type(m).__module__.startswith("torch.nn"))
        self._tensors = self._tensor_state()
        self._numbers = self._number_state()

    def broken(self) -> str | None:
        """What keeps the captured prefix from running at this call, None if nothing does."""
        for module in self.modules:
            if module.training:
                return "a frozen module is in training mode"
            if has_hooks(module):
                return HOOKED
        if has_global_hooks():
            return "a global module hook is registered"
        if self._tensor_state() != self._tensors or self._number_state() != self._numbers:
            return STALE
        return None

    def _number_state(self) -> list:
        return [v for table in self._attributes for v in table.values() if type(v) in (bool, int, float)]

    def _tensor_state(self) -> list[tuple]:
        return [
            (id(t), t.data_ptr(), -1 if t.is_inference() else t._version, t.requires_grad)
            for tables in self._tables
            for table in tables
            for t in table.values()
            if t is not None
        ]


HOOKED = "a hook is registered on a frozen module"
STALE = "a frozen parameter, buffer or number was changed"


def has_hooks(module: nn.Module) -> bool:
    """Whether calling the module runs something besides its forward that could see or change a value."""
    hooks = module._forward_hooks, module._forward_pre_hooks
    return any(not getattr(hook, "observes_only", False) for table in hooks if table for hook in table.values())


def has_global_hooks() -> bool:
    hooks = torch.nn.modules.module
    return bool(hooks._global_forward_hooks or hooks._global_forward_pre_hooks)


def ineligible(module: nn.Module) -> str | None:
    """Why the module is not a constant function of its input, None if it is."""
    for inner in module.modules():
        if has_hooks(inner):
            return f"a hook is registered on a {type(inner).__name__}"
        if inner.training:
            return f"a {type(inner).__name__} is in training mode"
        if getattr(inner, "_compiled_call_impl", None) is not None:
            return f"a {type(inner).__name__} is compiled"
        if isinstance(inner, torch.jit.ScriptModule):
            return f"a {type(inner).__name__} is scripted"
    for name, p in module.named_parameters():
        if p.requires_grad:
            return f"{name} still trains"
    return None


def autocast_state(device: torch.device) -> tuple:
    kind = device.type
    return torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)


def plain_tensor(x: Any) -> bool:
    """Whether x is a real tensor: no subclass, not inside vmap or grad transforms, not being traced."""
    return type(x) is Tensor and not _wrapped(x) and not torch.jit.is_tracing() and not torch.compiler.is_compiling()


_wrapped: Callable[[Tensor], bool] = getattr(
    getattr(torch._C, "_functorch", None), "is_functorch_wrapped_tensor", lambda x: False
)
