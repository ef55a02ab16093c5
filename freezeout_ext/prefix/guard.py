"""What a captured prefix relies on: kept at the capture, compared at each call."""

import ctypes
import operator
from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from ..attach import observes_only
from ..torch_state import version_of
from .judge import Refused
from .reads import HOOKS, PLAIN, read

HOOKED = "a hook is registered on a frozen module"
STALE = "a frozen parameter, buffer, attribute or submodule was changed"
TRAINING = "a frozen module is in training mode"

_memcmp = ctypes.CDLL(None).memcmp
_memcmp.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)


class Guard:
    """The state of one frozen module: all that its forward can read (see reads.py).

    Compared are:
    - of each module the class, the training flag and the hooks;
    - attributes, globals and what containers hold: by identity, immutable ones by value;
    - of each tensor the address, shape, strides, dtype, requires_grad, and each byte. `p.data.copy_()` leaves no other
      trace. An engine that reads the tensors at each call needs no bytes: `drop_values`.

    Args:
        tensors: False compares none. Nor is compared whether the module has a forward of its own, which a prefix puts
            there and takes away.

    Raises:
        Refused: the module writes, reads what cannot be compared, or is no constant function of its input.
    """

    def __init__(self, module: nn.Module, *, tensors: bool = True) -> None:
        if reason := _inconstant(module):
            raise Refused(reason)
        reads = read(module, tensors=tensors)
        self.modules = reads.modules
        self._hooks = [getattr(m, name) for m in self.modules for name in HOOKS]
        self._sources, self._sized, self._tensors = reads.sources, reads.sized, reads.tensors
        self._own: dict[str, Any] = {} if tensors else vars(module)
        self._entries, self._facts = self._entries_now(), self._facts_now()
        self._versions = list(map(version_of, self._tensors))
        self.values = [(t, t.clone()) for t in map(_bytes, self._tensors)]

    def broken(self, *, values: bool = True) -> str | None:
        """-> what keeps the captured prefix from running at this call, None if nothing does.

        Args:
            values: the bytes of tensors are compared too, where they are kept.
        """
        if any(self._hooks) and any(map(has_hooks, self.modules)):
            return HOOKED
        if not self._changed() and not (values and other_values([self])):
            return None
        return TRAINING if any(m.training for m in self.modules) else STALE

    def written(self) -> str | None:
        """-> what has changed since the guard was made, None if nothing has. Any write into a tensor is a change."""
        if list(map(version_of, self._tensors)) != self._versions:
            return "a parameter or buffer"
        return "an attribute" if self.broken() == STALE else None

    def drop_values(self) -> None:
        """From now on the bytes of tensors may change."""
        self.values = []

    @property
    def bytes_held(self) -> int:
        return sum(kept.nbytes for _, kept in self.values)

    def _entries_now(self) -> list:
        return list(chain.from_iterable([source() for source in self._sources]))

    def _facts_now(self) -> list:
        tensors = [(t.data_ptr(), t.shape, t.stride(), t.dtype, t.requires_grad) for t in self._tensors]
        kinds: list[Any] = list(map(type, self.modules))
        sizes = [len(each) - (each is self._own and "forward" in each) for each in self._sized]
        return [kinds, [kind.forward for kind in kinds], sizes, tensors]

    def _changed(self) -> bool:
        try:
            now = self._entries_now()
        except KeyError:  # an attribute is gone
            return True
        if self._facts_now() != self._facts or len(now) != len(self._entries):
            return True
        if all(map(operator.is_, now, self._entries)):
            return False
        for i, (new, old) in enumerate(zip(now, self._entries, strict=True)):
            if new is old:
                continue
            # Not `new != old`: 1 is True, and 0.0 is -0.0.
            if type(new) is not type(old) or type(new) not in PLAIN or repr(new) != repr(old):
                return True
            self._entries[i] = new
        return False


def other_values(guards: Iterable[Guard]) -> bool:
    """Whether a tensor holds other bytes than a guard has kept. For tensors on a GPU the host waits once."""
    pairs = [pair for guard in guards for pair in guard.values]
    if any(_memcmp(t.data_ptr(), kept.data_ptr(), len(t)) for t, kept in pairs if t.is_cpu):
        return True
    elsewhere = [pair for pair in pairs if not pair[0].is_cpu]
    if not elsewhere or torch.cuda.is_current_stream_capturing():
        return False
    now, kept = (torch.cat(tensors) for tensors in zip(*elsewhere, strict=True))
    return not torch.equal(now, kept)


def _bytes(t: Tensor) -> Tensor:
    """The memory from the tensor's first element to its last."""
    length = 1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True)) if t.numel() else 0
    return t.detach().as_strided((length,), (1,)).view(torch.uint8)


def has_hooks(module: nn.Module) -> bool:
    """Whether a call of the module runs a hook that could see or change a value."""
    found = chain.from_iterable(getattr(module, name).values() for name in HOOKS)
    return not all(map(observes_only, found))


def has_global_hooks() -> bool:
    hooks = torch.nn.modules.module
    return bool(hooks._global_forward_hooks or hooks._global_forward_pre_hooks)


def _inconstant(module: nn.Module) -> str | None:
    """-> why the module is no constant function of its input, None if it may be one."""
    for inner in module.modules():
        kind = type(inner).__name__
        if has_hooks(inner):
            return f"a hook is registered on a {kind}"
        if inner.training:
            return f"a {kind} is in training mode"
        if getattr(inner, "_compiled_call_impl", None) is not None:
            return f"a {kind} is compiled"
        if isinstance(inner, torch.jit.ScriptModule):
            return f"a {kind} is scripted"
        if isinstance(inner, nn.RNNBase):
            return f"a {kind} computes other bits without a graph"
    return next((f"{name} still trains" for name, p in module.named_parameters() if p.requires_grad), None)


def watched_by_user() -> bool:
    """Whether a mode of the user's sees or changes each operation: torch's function modes, dispatch modes."""
    if torch._C._len_torch_dispatch_stack() or not torch._C._len_torch_function_stack():
        return bool(torch._C._len_torch_dispatch_stack())
    return any(type(mode) is not DeviceContext for mode in _get_current_function_mode_stack())


def plain_tensor(x: Any) -> bool:
    """Whether x is a real tensor and no more: no subclass, without attributes, not being transformed or traced."""
    if type(x) not in (Tensor, nn.Parameter) or vars(x):
        return False
    traced = torch.jit.is_tracing() or torch.compiler.is_compiling() or forward_ad._current_level >= 0
    return not traced and not torch._C._functorch.is_functorch_wrapped_tensor(x)


def changes_of(module: nn.Module) -> Callable[[], str | None]:
    """-> a function that says what was changed of a frozen module since now, but for its tensors.

    Of a module whose code cannot be read it says nothing.
    """
    try:
        return Guard(module, tensors=False).broken
    except Exception:  # what a stranger's module holds is not known
        return lambda: None
