"""Watch: which frozen outputs and which inputs of a model the rest of its forward reads, seen in one forward."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves

from ..torch_state import device_states, host_states, version_of
from .effects import address_of, leaves_of, storage_of, tensors_in, versions_of, written_by

Taint = frozenset
NONE: Taint = frozenset()
ACTIVE, RANDOM, INSIDE = "active", "random", "inside"
# What takes a tensor for its shape, dtype and device alone.
SHAPE_ONLY = {
    getattr(torch.ops.aten, name)
    for name in (
        "empty_like", "zeros_like", "ones_like", "full_like", "new_empty", "new_zeros", "new_ones", "new_full",
        "new_empty_strided", "rand_like", "randn_like",
    )
}  # fmt: skip
READS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
PLAIN = (type(None), bool, int, float, complex, str, torch.dtype, torch.device, torch.Size, torch.memory_format, slice)


class Refused(Exception):
    """Why the features of these layers cannot be kept."""


class Call:
    """One call of a frozen module.

    Attributes:
        spec: the structure of its output.
        leaves: of its output; tensors as ones on the meta device.
    """

    def __init__(self, name: str, module: nn.Module, output: Any) -> None:
        self.name, self.module = name, module
        leaves, self.spec = tree_flatten(output)
        for leaf in leaves:
            if not isinstance(leaf, (Tensor, *PLAIN)):
                raise Refused(f"{name} returns a {type(leaf).__name__}, which cannot be kept")
        self.leaves = [
            torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta") if isinstance(x, Tensor) else x
            for x in leaves
        ]


class Watch(TorchDispatchMode):
    """Runs once around a forward, with the frozen modules' calls going through `call`.

    Each input of the model and each output of a frozen module is a source. An operation outside frozen modules hands
    the sources of its operands on to its results. A source is needed where it meets something that trains, is read by
    the host, or is part of the model's output.

    Attributes:
        calls: of frozen modules, in order.
        ends: (call, leaf) -> the first and the last sample of a tensor [B, ...].
        needed: sources that the rest of the forward reads.
        mutated: sources that are written to in place.
        states: tensors of the model outside frozen modules that went into these.
        active_from: how many calls were made before something ran that trains, or that writes to the model's tensors.
    """

    def __init__(
        self, model: nn.Module, frozen: Mapping[str, nn.Module], args: tuple, kwargs: dict, batch_size: int
    ) -> None:
        super().__init__()
        self._batch_size = batch_size
        self.calls: list[Call] = []
        self.ends: dict[tuple[int, int], Tensor] = {}
        self.needed: set = set()
        self.mutated: set = set()
        self.states: dict[str, Tensor] = {}
        self.active_from: int | None = None
        self._refusals: list[str] = []
        self._taints: dict[int, tuple[StorageWeakRef, Taint]] = {}
        self._depth = 0
        self._called: set[nn.Module] = set()
        inside = {m for module in frozen.values() for m in module.modules()}
        self._state_tensors = {
            name: t
            for prefix, module in model.named_modules()
            if module not in inside
            for name, t in _own_tensors(prefix, module)
        }
        self._versions = {name: version_of(t) for name, t in self._state_tensors.items()}
        for name, t in self._state_tensors.items():
            self._mark(t, Taint({ACTIVE} if t.requires_grad else {("state", name)}))
        for i, x in enumerate(tree_leaves((args, kwargs))):
            if isinstance(x, Tensor):
                self._mark(x, Taint({("input", i)}))
        self._input_storages = {address_of(x) for x in tensors_in((args, kwargs))}
        self._own_storages = {address_of(t) for t in self._state_tensors.values()}
        self._host_states = host_states()
        self._dropouts = [
            name
            for name, m in model.named_modules()
            if m not in inside and isinstance(m, nn.modules.dropout._DropoutNd) and m.training and m.p
        ]

    # The forward

    def call(self, name: str, module: nn.Module, original: Callable, args: tuple, kwargs: dict) -> Any:
        """A call of a frozen module."""
        if self._depth:
            return original(*args, **kwargs)
        given, tensors = tree_leaves((args, kwargs)), tensors_in((args, kwargs))
        taint = self._of(tensors)
        real = _real(taint)
        trains = any(p.requires_grad for p in module.parameters()) or any(m.training for m in module.modules())
        if ACTIVE in taint or trains or any(x.requires_grad for x in tensors):
            self._is_active(real)
            return self._run(original, args, kwargs, Taint({ACTIVE}))
        if not real and RANDOM not in taint:
            return self._run(original, args, kwargs, taint)  # the same at every step
        opaque = [x for x in given if not isinstance(x, (Tensor, *PLAIN))]
        if opaque:
            kind = type(opaque[0]).__name__
            advice = ": set model.config.use_cache = False" if "Cache" in kind else ""
            self._refuse(f"{name} is handed a {kind}, which it may change{advice}")
        if RANDOM in taint or host_states() != self._host_states:
            advice = f": set p = 0 in {', '.join(self._dropouts[:3])}, or name it in layers=" if self._dropouts else ""
            self._refuse(f"random numbers are drawn in front of {name}, and differ at every step{advice}")
        if INSIDE in taint:
            self._refuse(f"{name} reads a value from inside a frozen module")
        if module in self._called:
            self._refuse(f"{name} is called more than once in a forward")
        self._called.add(module)
        names = [s[1] for s in taint if isinstance(s, tuple) and s[0] == "state"]
        self.states.update({name: self._state_tensors[name] for name in names})
        buffers = list(module.buffers())
        own, versions, drawn = versions_of(buffers), versions_of(tensors), device_states(tensors)
        output = self._run(original, args, kwargs, NONE)
        if versions_of(buffers) != own:
            self._refuse(f"{name} changes a buffer of its own at every call")
        changed = (x for x, v in zip(tensors, versions, strict=True) if version_of(x) != v)
        if any(address_of(x) in self._input_storages for x in changed):
            self._refuse(f"{name} changes an input of the model in place")
        if device_states(tensors) != drawn or host_states() != self._host_states:
            self._refuse(f"{name} draws random numbers")
        self._source(name, module, output)
        return output

    def finish(self, output: Any) -> None:
        """After the forward: what the model gives back is needed.

        Raises:
            Refused: with all reasons.
        """
        for leaf in leaves_of(output):
            self.needed |= _real(self._of([leaf]))
            if INSIDE in self._of([leaf]):
                self._refuse("the model returns a value from inside a frozen module")
        for name in self.states:
            if version_of(self._state_tensors[name]) != self._versions[name]:
                self._refuse(f"{name} goes into frozen modules and changes in each forward")
        if self._refusals:
            raise Refused("; ".join(list(dict.fromkeys(self._refusals))[:3]))

    def _source(self, name: str, module: nn.Module, output: Any) -> None:
        self._depth += 1  # what is done here is no part of the forward
        try:
            call = Call(name, module, output)
            for i, x in enumerate(tree_leaves(output)):
                if isinstance(x, Tensor):
                    self._mark(x, Taint({("call", len(self.calls), i)}))
                    if x.dim() and len(x) == self._batch_size:
                        self.ends[len(self.calls), i] = torch.cat([x[:1], x[-1:]])
            self.calls.append(call)
        except Refused as reason:
            self._refuse(str(reason))
        finally:
            self._depth -= 1

    def _run(self, original: Callable, args: tuple, kwargs: dict, taint: Taint) -> Any:
        self._depth += 1
        try:
            output = original(*args, **kwargs)
        finally:
            self._depth -= 1
        for x in tensors_in(output):
            self._mark(x, taint)
        return output

    # Operations

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if self._depth:
            output = func(*args, **kwargs)
            for x in tensors_in(output):
                if address_of(x) not in self._taints:
                    self._mark(x, Taint({INSIDE}))
            return output
        packet = getattr(func, "overloadpacket", func)
        tensors = tensors_in((args, kwargs))
        # Before the call, whose results may overwrite an operand.
        taint = NONE if packet in SHAPE_ONLY else self._of(tensors)
        seeded = torch.Tag.nondeterministic_seeded in getattr(func, "tags", ())
        drawn = device_states(tensors) if seeded else None
        output = func(*args, **kwargs)
        real, results, written = _real(taint), tensors_in(output), written_by(func, args, kwargs)
        if packet in SHAPE_ONLY:
            pass
        elif ACTIVE in taint or any(x.requires_grad for x in tensors):
            self._is_active(real)
            if INSIDE in taint:
                self._refuse(f"{packet} outside frozen modules reads a value from inside one")
            taint = Taint({ACTIVE})
        elif READS & set(getattr(func, "tags", ())) or (real and not (results or output is None or written)):
            self.needed |= real
            if RANDOM in taint:
                self._refuse("random numbers are read by the host: the model draws which layers run")
        if drawn is not None and device_states(tensors) != drawn:
            taint |= {RANDOM}
        for x in written:
            if address_of(x) in self._own_storages:
                self._is_active(real)
            self.mutated |= _real(self._of([x]))
            self._mark(x, self._of([x]) | taint)
        addresses = {address_of(x) for x in tensors}
        for x in results:
            self._mark(x, taint | (self._of([x]) if address_of(x) in addresses else NONE))
        return output

    def _is_active(self, real: Taint) -> None:
        self.needed |= real
        if self.active_from is None:
            self.active_from = len(self.calls)

    def _refuse(self, reason: str) -> None:
        self._refusals.append(reason)

    def _mark(self, x: Tensor, taint: Taint) -> None:
        storage = storage_of(x)
        if storage is None:
            return
        # Weak: nothing stays in memory longer; but its address is not given to another one.
        self._taints[storage._cdata] = (StorageWeakRef(storage), taint)

    def _of(self, tensors: Iterable) -> Taint:
        found = NONE
        for x in tensors:
            if entry := self._taints.get(address_of(x)):
                found |= entry[1]
        return found


def _real(taint: Taint) -> Taint:
    return Taint(s for s in taint if isinstance(s, tuple) and s[0] != "state")


def _own_tensors(prefix: str, module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for table in (module._parameters, module._buffers):
        for name, t in table.items():
            if t is not None:
                yield (f"{prefix}.{name}" if prefix else name), t
