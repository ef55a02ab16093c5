"""Guard: whether the weights that kept features were computed with are still what they were, by value."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache

import torch
from torch import Tensor, nn

CHUNK = 2**17
Changes = Callable[[nn.Module], Callable[[], str | None]]


def unseen(module: nn.Module) -> Callable[[], str | None]:
    """Nothing is known of what a module reads besides its tensors."""
    return lambda: None


class Guard:
    """Compares identities, addresses and versions at every call, and the values of what those say may have changed.

    Forwards and hooks are compared too, and by `changes` all else that a module's forward reads.

    `thorough` compares all values: `p.data.copy_()` leaves version and address as they are.

    Args:
        model: that holds the modules.
        modules: name -> module; all below them is guarded.
        states: names of further tensors of the model.
        changes: gives, for a module, a function that says what was changed of it besides its tensors.
    """

    def __init__(
        self, model: nn.Module, modules: Mapping[str, nn.Module], states: Iterable[str], changes: Changes = unseen
    ) -> None:
        self.modules = dict(modules)
        self._changes = [changes(module) for module in modules.values()]
        self._forwards = self._own_forwards()
        inside = [
            (f"{name}.{inner}" if inner else name, m)
            for name, top in modules.items()
            for inner, m in top.named_modules()
        ]
        self._tables = [(name, table) for name, m in inside for table in (m._parameters, m._buffers)]
        self._links = [m._modules for _, m in inside]
        self._states = {name: _place(model, name) for name in states}
        self._quick = self._now()
        self._sums = {name: _checksum(t) for name, t in self.tensors()}

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """-> all guarded tensors by name, as they are now."""
        for prefix, table in self._tables:
            for name, t in table.items():
                if t is not None:
                    yield f"{prefix}.{name}", t
        for name, (table, key) in self._states.items():
            yield name, table[key]

    def changed(self, *, thorough: bool = False) -> str | None:
        """-> what is no longer as it was at first, None if nothing is."""
        hooks = torch.nn.modules.module
        if hooks._global_forward_hooks or hooks._global_forward_pre_hooks:
            return "a global module hook is registered"
        if any(new is not old for new, old in zip(self._own_forwards(), self._forwards, strict=True)):
            return "the forward of a frozen module was replaced"
        if reason := next((reason for ask in self._changes if (reason := ask())), None):
            return reason
        now = self._now()
        if now == self._quick and not thorough:
            return None
        if now[1] != self._quick[1]:
            return "a submodule was replaced"
        found = dict(self.tensors())
        if found.keys() != self._sums.keys():
            return f"{next(iter(found.keys() ^ self._sums.keys()))} was changed"
        for name, t in found.items():
            if not torch.equal(_checksum(t).cpu(), self._sums[name].cpu()):
                return f"{name} was changed"
        self._quick = now
        return None

    def _own_forwards(self) -> list:
        """-> the forwards that the user has put on the instances."""
        found = (vars(module).get("forward") for module in self.modules.values())
        return [None if type(f).__module__.startswith(__package__.split(".")[0]) else f for f in found]

    def _now(self) -> tuple[list, list]:
        # At every step: the fewer calls the better.
        tensors = [t for _, table in self._tables for t in table.values() if t is not None]
        tensors += [table[key] for table, key in self._states.values()]
        try:
            states = [(id(t), t.data_ptr(), t._version) for t in tensors]
        except RuntimeError:  # inference tensors have no version
            states = [(id(t), t.data_ptr(), -1 if t.is_inference() else t._version) for t in tensors]
        return states, [id(module) for links in self._links for module in links.values()]


def _place(model: nn.Module, name: str) -> tuple[dict, str]:
    """-> the table that holds a tensor of the model, and its key there."""
    path, _, key = name.rpartition(".")
    module = model.get_submodule(path)
    return (module._parameters if key in module._parameters else module._buffers), key


def fingerprint(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """-> a hash of names, dtypes, shapes and values."""
    digest = hashlib.sha256()
    for name, t in tensors:
        digest.update(f"{name} {t.dtype} {tuple(t.shape)} {_checksum(t).tolist()}".encode())
    return digest.hexdigest()


def _checksum(t: Tensor) -> Tensor:
    """-> int64 [2]: sum of the bit patterns, and of these times odd numbers that differ by their place.

    An exchange of two values shows too. Not made to withstand intent.
    """
    flat = t.detach().contiguous().reshape(-1)
    if flat.dtype is torch.bool:
        flat = flat.to(torch.uint8)
    elif flat.is_complex():
        flat = torch.view_as_real(flat).reshape(-1)
    aligned = not flat.nbytes % 8 and not flat.storage_offset() * flat.element_size() % 8
    size = 8 if aligned else flat.element_size()  # as wide as can be: fewer numbers
    words = flat.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[size])
    places = _places(flat.device)
    total = torch.zeros(2, dtype=torch.int64, device=flat.device)
    for k, chunk in enumerate(words.split(CHUNK)):
        values = chunk.to(torch.int64)
        total += torch.stack([values.sum(), (values * places[: len(values)]).sum() * (2 * k + 1)])
    return total


@cache
def _places(device: torch.device) -> Tensor:
    return torch.arange(CHUNK, device=device) * -7046029254386353131 | 1
