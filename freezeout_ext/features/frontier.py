"""Frontier: what of a frozen prefix is kept, and how a forward runs from that alone, with poison for the rest."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from .columns import Column
from .watch import Refused, Watch


class _Reached(BaseException):
    """Ends a forward behind the last output that is kept; no Exception, so that no model catches it."""


@dataclass
class Frontier:
    """The frozen calls of a forward, and which of their outputs are kept.

    num_frozen: layers.
    modules: name -> module of each call, in order.
    specs, leaves: of each call its output's structure, and its tensors without memory or plain values.
    kept: (call, leaf) of each column.
    inputs_needed: numbers of the model's input leaves that the rest of the forward reads.
    input_names: where each input leaf comes from: a keyword, or a position.
    sliceable: whether nothing that trains runs before the last kept output.
    states: tensors of the model outside frozen modules that went into kept outputs.
    length: what dimension 1 of padded tensors was in the forward that was watched, None where nothing is padded.
    shapes: of the model's inputs, see `shapes_of`.
    """

    num_frozen: int
    modules: dict[str, nn.Module]
    specs: list
    leaves: list[list]
    kept: list[tuple[int, int]]
    columns: list[Column]
    inputs_needed: set[int]
    input_names: list[Any]
    sliceable: bool
    autocast: tuple
    states: dict[str, Tensor]
    batch_size: int
    length: int | None
    shapes: list
    dense: set[tuple[int, int]] = field(default_factory=set)
    _poisons: dict[tuple, Tensor] = field(default_factory=dict, repr=False)

    @classmethod
    def of(
        cls, watch: Watch, num_frozen: int, batch_size: int, length: int | None, kept: torch.dtype | None,
        args: tuple, kwargs: dict, autocast: tuple,
    ) -> "Frontier":  # fmt: skip
        """The frontier that a watched forward has shown.

        Raises:
            Refused: nothing can be kept, or what would be has no row a sample.
        """
        places = sorted((s[1], s[2]) for s in watch.needed if s[0] == "call")
        if not places:
            raise Refused("no output of a frozen module is independent of layers that train and read behind them")
        columns = []
        for call, leaf in places:
            tensor, name = watch.calls[call].leaves[leaf], watch.calls[call].name
            if not tensor.dim() or len(tensor) != batch_size:
                raise Refused(f"{name} gives {tuple(tensor.shape)}, which has no row for each of {batch_size} samples")
            padded = length is not None and tensor.dim() > 1 and tensor.shape[1] == length
            columns.append(Column.like(tensor, kept, padded=padded))
        last = places[-1][0]
        return cls(
            num_frozen=num_frozen,
            modules={call.name: call.module for call in watch.calls},
            specs=[call.spec for call in watch.calls],
            leaves=[call.leaves for call in watch.calls],
            kept=places,
            columns=columns,
            inputs_needed={s[1] for s in watch.needed if s[0] == "input"},
            input_names=[*_names(args), *_names(kwargs)],
            sliceable=watch.active_from is None or watch.active_from > last,
            autocast=autocast,
            states=dict(watch.states),
            batch_size=batch_size,
            length=length if any(column.padded for column in columns) else None,
            shapes=shapes_of(args, kwargs),
            dense={(s[1], s[2]) for s in watch.mutated if s[0] == "call"},
        )

    @property
    def names(self) -> list[str]:
        """-> the modules whose outputs are kept."""
        calls = list(self.modules)
        return list(dict.fromkeys(calls[call] for call, _ in self.kept))

    def needless(self, place: Any) -> bool:
        """Whether the model's inputs by this name are not needed; place 0: none of the inputs that have no name."""
        if place == 0:
            return not self.inputs_needed
        chosen = {i for i, name in enumerate(self.input_names) if name == place}
        return bool(chosen) and not chosen & self.inputs_needed

    @contextmanager
    def replaced(self, rows: Sequence[Tensor], length: int | None = None, *, whole: bool = True) -> Iterator[None]:
        """Inside, frozen modules do not run: calls give the rows [B, ...] that are kept, and poison for the rest.

        whole: the forward inside runs to its end.
        """
        given = dict(zip(self.kept, rows, strict=True))
        order = {name: i for i, name in enumerate(self.modules)}
        device, batch_size, met = rows[0].device, len(rows[0]), set()

        def call(name: str, module: nn.Module, original: Callable, args: tuple, kwargs: dict) -> Any:
            i = order[name]
            if i in met:
                raise RuntimeError(f"{name} is called again in one forward, unlike in the one that was watched")
            met.add(i)
            leaves = [
                given[i, j] if (i, j) in given
                else self._poison(i, j, batch_size, length, device) if isinstance(x, Tensor) else x
                for j, x in enumerate(self.leaves[i])
            ]  # fmt: skip
            return tree_unflatten(leaves, self.specs[i])

        with through(self.modules, call):
            yield
        missing = {i for i, _ in self.kept} - met
        if missing and whole:
            names = ", ".join(list(self.modules)[i] for i in sorted(missing))
            raise RuntimeError(f"{names} did not run in this forward, unlike in the one that was watched")

    @contextmanager
    def recorded(self, *, stop: bool = False, on_last: Callable[[], None] | None = None) -> Iterator[list]:
        """Inside, frozen modules run and the list takes the outputs that are kept; `stop`: the forward ends there."""
        found: dict[tuple[int, int], Tensor] = {}
        order, last = {name: i for i, name in enumerate(self.modules)}, self.kept[-1][0]
        wanted = {i for i, _ in self.kept}
        rows: list[Tensor] = []

        def call(name: str, module: nn.Module, original: Callable, args: tuple, kwargs: dict) -> Any:
            output, i = original(*args, **kwargs), order[name]
            if i in wanted:
                leaves = tree_leaves(output)
                # A copy: what follows may change it in place.
                found.update({(i, j): leaves[j].detach().clone() for c, j in self.kept if c == i})
            if i == last:
                if on_last:
                    on_last()
                if stop:
                    raise _Reached
            return output

        with through(self.modules, call):
            try:
                yield rows
            except _Reached:
                if not stop:
                    raise
        if len(found) == len(self.kept):
            rows += [found[place] for place in self.kept]

    def computed(self, forward: Callable, args: tuple, kwargs: dict) -> list[Tensor]:
        """-> what is kept, computed from these inputs; the forward ends there, and leaves generators as they were."""
        device = next((x.device for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)), torch.device("cpu"))
        devices = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices), torch.no_grad(), self.recorded(stop=True) as rows:
            forward(*args, **kwargs)
        if not rows:
            raise RuntimeError("the frozen modules did not run in this forward, unlike in the one that was watched")
        return rows

    def _poison(self, call: int, leaf: int, batch_size: int, length: int | None, device: torch.device) -> Tensor:
        key = call, leaf, batch_size, length, device
        made = self._poisons.get(key)
        if made is None:
            like = self.leaves[call][leaf]
            shape = list(like.shape)
            if shape and shape[0] == self.batch_size:
                shape[0] = batch_size
            if self.length is not None:
                shape[1:] = [length if size == self.length else size for size in shape[1:]]
            made = self._poisons[key] = poison(shape, like.dtype, device)
        return made.clone() if (call, leaf) in self.dense else made.detach()


def shapes_of(args: tuple, kwargs: Mapping) -> list:
    """-> the shape of a sample of each of the model's inputs."""
    return [tuple(x.shape[1:]) if isinstance(x, Tensor) else None for x in tree_leaves((args, kwargs))]


def sliced(tree: Any, rows: Tensor, batch_size: int) -> Any:
    """The inputs of some samples of a batch: each tensor [B, ...] of them cut to its rows."""
    return tree_map(
        lambda x: x[rows.to(x.device)] if isinstance(x, Tensor) and x.dim() and len(x) == batch_size else x, tree
    )


def merged(batch_size: int, parts: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """One batch of rows from parts (places [b], rows [b, ...]), with the strides of the first."""
    like = parts[0][1]
    order = sorted(range(1, like.dim()), key=lambda d: -like.stride()[d])
    whole = like.new_empty((batch_size, *(like.shape[d] for d in order)))
    whole = whole.permute(0, *(1 + order.index(d) for d in range(1, like.dim())))
    for places, rows in parts:
        whole[places.to(whole.device)] = rows
    return whole


def _names(inputs: tuple | Mapping) -> list[Any]:
    places = inputs.items() if isinstance(inputs, Mapping) else enumerate(inputs)
    return [place for place, value in places for _ in tree_flatten(value)[0]]


def poison(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """NaN of this shape (for integers the least value, for bool False), expanded from one element."""
    if dtype.is_floating_point or dtype.is_complex:
        value = float("nan")
    else:
        value = 0 if dtype in (torch.bool, torch.uint8) else torch.iinfo(dtype).min
    return torch.full((), value, dtype=dtype, device=device).expand(tuple(shape))


@contextmanager
def through(modules: Mapping[str, nn.Module], call: Callable) -> Iterator[None]:
    """Calls of modules' forwards become call(name, module, original, args, kwargs); all as before afterwards."""
    before = {}
    try:
        for name, module in modules.items():
            if module in before:
                continue
            before[module] = module.__dict__.get("forward")
            module.__dict__["forward"] = _Through(call, name, module, module.forward)
        yield
    finally:
        for module, forward in before.items():
            if forward is None:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = forward


class _Through:
    def __init__(self, call: Callable, name: str, module: nn.Module, original: Callable) -> None:
        self._given = call, name, module, original

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call, name, module, original = self._given
        return call(name, module, original, args, kwargs)

    def __reduce__(self) -> tuple:
        # A copy or a pickle of the module runs its own forward.
        return _same, (self._given[3],)


def _same(forward: Callable) -> Callable:
    return forward
