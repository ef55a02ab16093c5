"""What a captured prefix relies on: kept at the capture, compared at each call."""

import ctypes
import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .judge import Refused
from .reads import PLAIN, read

HOOKED = "a hook is registered on a frozen module"
STALE = "a frozen parameter, buffer, attribute or submodule was changed"
TRAINING = "a frozen module is in training mode"


class Guard:
    """The state of one frozen module: all that its forward can read.

    Compared are training flags and hooks; the class of each module and each attribute, containers by content, globals
    and class attributes that the code names; of each tensor its identity, address, shape and requires_grad. Tensors are
    compared by value too, once `keep_values` was called: an engine that has packed or folded them needs that, and
    `p.data.copy_()` leaves no other trace.

    Raises:
        Refused: the module writes, or reads what cannot be compared (see reads.py).
    """

    def __init__(self, module: nn.Module) -> None:
        reads = read(module)
        self.modules = reads.modules
        self._classes = [type(m) for m in self.modules]
        named = {(id(table), keys): _Entries(table, keys) for table, keys in reads.tables}
        self._read: list[_Entries | _Items] = [
            *(_Entries(*attributes) for attributes in reads.attributes),
            *named.values(),
            *map(_Items, reads.containers),
        ]
        self._tensors = list({id(t): t for t in reads.tensors}.values())
        self._state = [_state(t) for t in self._tensors]
        self._versions = [version_of(t) for t in self._tensors]
        self._kept: list[Tensor] | None = None

    def broken(self, *, values: bool = True) -> str | None:
        """What keeps the captured prefix from running at this call, None if nothing does.

        Args:
            values: compare tensors by value, where values were kept.
        """
        for module in self.modules:
            if module.training:
                return TRAINING
            if has_hooks(module):
                return HOOKED
        if list(map(type, self.modules)) != self._classes or list(map(_state, self._tensors)) != self._state:
            return STALE
        if any(read.changed() for read in self._read):
            return STALE
        return STALE if values and self._kept is not None and self._other_values() else None

    def written(self) -> str | None:
        """What has changed since the guard was made, counting each write into a tensor; for a forward that ran once."""
        if list(map(version_of, self._tensors)) != self._versions:
            return "a parameter or buffer"
        return "an attribute" if self.broken() == STALE else None

    def keep_values(self) -> None:
        """From now on tensors are compared by value."""
        if self._kept is None:
            self._kept = [t.detach().clone() for t in self._tensors]

    @property
    def bytes_held(self) -> int:
        return sum(t.nbytes for t in self._kept or ())

    def _other_values(self) -> bool:
        assert self._kept is not None  # asked for only then
        cpu = [(t, k) for t, k in zip(self._tensors, self._kept, strict=True) if t.device.type == "cpu"]
        if any(_differ(t, kept) for t, kept in cpu):
            return True
        others = [(t, k) for t, k in zip(self._tensors, self._kept, strict=True) if t.device.type != "cpu"]
        if not others or torch.cuda.is_current_stream_capturing():
            return False
        # One wait for the device in all.
        equal = [(t == kept).logical_or((t != t) & (kept != kept)).all() for t, kept in others]
        return not bool(torch.stack(equal).all())


_memcmp = ctypes.CDLL(None).memcmp
_memcmp.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)


def _differ(t: Tensor, kept: Tensor) -> bool:
    if t.stride() == kept.stride():  # a clone of what is dense has its strides
        return _memcmp(t.data_ptr(), kept.data_ptr(), t.nbytes) != 0
    return not torch.equal(t, kept)


class _Entries:
    """The entries of a mapping by some names, by identity; immutable ones by value where another such object stands."""

    def __init__(self, table: Any, keys: tuple[str, ...], ignored: tuple[str, ...] | None = None) -> None:
        self._table, self._ignored = table, ignored
        self._get = operator.itemgetter(*keys, *keys[:1]) if keys else lambda table: ()
        self._kept = list(self._entries())

    def _entries(self) -> tuple:
        if self._ignored is None:
            return self._get(self._table)
        # An attribute that is new may stand before one of the class.
        return *self._get(self._table), len(self._table) - sum(key in self._table for key in self._ignored)

    def changed(self) -> bool:
        try:
            return _changed(self._entries(), self._kept)
        except KeyError:
            return True


class _Items:
    """All that a list, tuple, set, mapping or closure's cell holds."""

    def __init__(self, items: Any) -> None:
        self._items = items
        self._kept = self._entries()

    def _entries(self) -> list:
        if isinstance(self._items, Mapping):
            return [*self._items.keys(), *self._items.values()]
        return list(self._items) if isinstance(self._items, Iterable) else [self._items.cell_contents]

    def changed(self) -> bool:
        return _changed(self._entries(), self._kept)


def _changed(entries: Sequence, kept: list) -> bool:
    if len(entries) != len(kept):
        return True
    if all(map(operator.is_, entries, kept)):
        return False
    for i, (a, b) in enumerate(zip(entries, kept, strict=True)):
        if a is b:
            continue
        if type(a) is not type(b) or not isinstance(a, PLAIN) or a != b:
            return True
        kept[i] = a
    return False


def _state(t: Tensor) -> tuple:
    return t.data_ptr(), t.shape, t.stride(), t.dtype, t.requires_grad


def version_of(t: Tensor) -> int:
    return -1 if t.is_inference() else t._version


def has_hooks(module: nn.Module) -> bool:
    """Whether calling the module runs something besides its forward that could see or change a value."""
    hooks = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    if not any(hooks):
        return False
    return any(not getattr(hook, "observes_only", False) for table in hooks if table for hook in table.values())


def has_global_hooks() -> bool:
    hooks = torch.nn.modules.module
    return bool(hooks._global_forward_hooks or hooks._global_forward_pre_hooks)


def ineligible(module: nn.Module) -> str | None:
    """Why the module is not a constant function of its input, None if it may be."""
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


def guarded(module: nn.Module) -> Guard:
    """-> the guard of a module that may be part of a chain.

    Raises:
        Refused: it is not a constant function of its input, or that cannot be told.
    """
    if reason := ineligible(module):
        raise Refused(reason)
    return Guard(module)


def autocast_state(device: torch.device) -> tuple[bool, torch.dtype]:
    kind = device.type
    return torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)


def plain_tensor(x: Any) -> bool:
    """Whether x is a real tensor: no subclass, not inside vmap or grad transforms, not being traced."""
    traced = torch.jit.is_tracing() or torch.compiler.is_compiling()
    return type(x) in (Tensor, nn.Parameter) and not traced and not torch._C._functorch.is_functorch_wrapped_tensor(x)
