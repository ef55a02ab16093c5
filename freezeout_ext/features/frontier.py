"""Frontier: what of a frozen prefix is kept, and how a forward runs from that alone, with poison for the rest."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from ..attach import OwnForward
from .columns import Column
from .watch import Call, Refused, Watch


class _Reached(BaseException):
    """Ends a forward behind the last output that is kept; no Exception, so that no model catches it."""


@dataclass
class Frontier:
    """The frozen calls of a forward, and which of their outputs are kept."""

    num_frozen: int  # layers
    calls: list[Call]  # in order
    kept: list[tuple[int, int]]  # (call, leaf) of each column
    dense: set[tuple[int, int]]  # (call, leaf) of what is written to in place
    columns: list[Column]
    inputs_needed: set[int]  # numbers of the model's input leaves that the rest of the forward reads
    input_names: list[Any]  # where each input leaf comes from: a keyword, or a position
    autocast: tuple  # see `autocast_state`
    states: dict[str, Tensor]  # tensors of the model outside frozen modules that went into kept outputs
    batch_size: int  # of the forward that was watched
    length: int | None  # what dimension 1 of padded tensors was in that forward; None where nothing is padded
    shapes: list | None  # of the model's inputs, see `shapes_of`; None where samples are padded
    modules: dict[str, nn.Module] = field(init=False)  # by the name of their call
    _poisons: dict[tuple, Tensor] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        self.modules = {call.name: call.module for call in self.calls}
        self._order = {call.name: i for i, call in enumerate(self.calls)}

    @classmethod
    def of(
        cls, watch: Watch, num_frozen: int, batch_size: int, length: int | None, kept: torch.dtype | None,
        args: tuple, kwargs: dict, autocast: tuple,
    ) -> "Frontier":  # fmt: skip
        """The frontier that a watched forward has shown.

        Raises:
            Refused: nothing can be kept, or what would be kept has no row a sample.
        """
        places = sorted((s[1], s[2]) for s in watch.needed if s[0] == "call")
        if not places:
            raise Refused("no output of a frozen module is independent of layers that train and read behind them")
        last = places[-1][0]
        if watch.active_from is not None and watch.active_from <= last:
            raise Refused(
                f"something that trains, or changes the model's own tensors, runs in front of {watch.calls[last].name}"
            )
        columns = []
        for call, leaf in places:
            tensor, name = watch.calls[call].leaves[leaf], watch.calls[call].name
            if not tensor.dim() or len(tensor) != batch_size:
                raise Refused(f"{name} gives {tuple(tensor.shape)}, which has no row for each of {batch_size} samples")
            padded = length is not None and tensor.dim() > 1 and tensor.shape[1] == length
            columns.append(Column.like(tensor, kept, padded=padded))
        return cls(
            num_frozen=num_frozen,
            calls=watch.calls,
            kept=places,
            dense={(s[1], s[2]) for s in watch.mutated if s[0] == "call"},
            columns=columns,
            inputs_needed={s[1] for s in watch.needed if s[0] == "input"},
            input_names=[*_names(args), *_names(kwargs)],
            autocast=autocast,
            states=dict(watch.states),
            batch_size=batch_size,
            length=length if any(column.padded for column in columns) else None,
            shapes=shapes_of(args, kwargs) if length is None else None,
        )

    @property
    def kept_names(self) -> list[str]:
        """-> the module of each column."""
        return [self.calls[call].name for call, _ in self.kept]

    @property
    def names(self) -> list[str]:
        """-> the modules whose outputs are kept."""
        return list(dict.fromkeys(self.kept_names))

    def needless(self, place: Any) -> bool:
        """Whether the model's inputs by this name are not needed; place 0: none of the inputs that have no name."""
        if place == 0:
            return not self.inputs_needed
        chosen = {i for i, name in enumerate(self.input_names) if name == place}
        return bool(chosen) and not chosen & self.inputs_needed

    def replaced(self, rows: Sequence[Tensor], length: int | None = None) -> AbstractContextManager[None]:
        """Inside, frozen modules do not run: calls give the rows [B, ...] that are kept, and poison for the rest.

        Args:
            length: what padded rows are padded to.
        """
        given = dict(zip(self.kept, rows, strict=True))
        device, batch_size, met = rows[0].device, len(rows[0]), set()

        def call(name: str, module: nn.Module, original: Callable, args: tuple, kwargs: dict) -> Any:
            i = self._order[name]
            if i in met:
                raise RuntimeError(f"{name} is called again in one forward, unlike in the one that was watched")
            met.add(i)
            leaves = [
                given[i, j] if (i, j) in given
                else self._poison(i, j, batch_size, length, device) if isinstance(x, Tensor) else x
                for j, x in enumerate(self.calls[i].leaves)
            ]  # fmt: skip
            return tree_unflatten(leaves, self.calls[i].spec)

        return through(self.modules, call)

    def computed(self, forward: Callable, args: tuple, kwargs: dict) -> list[Tensor]:
        """-> what is kept, computed from these inputs; the forward ends there, and leaves generators as they were."""
        found: dict[tuple[int, int], Tensor] = {}

        def call(name: str, module: nn.Module, original: Callable, args: tuple, kwargs: dict) -> Any:
            output, i = original(*args, **kwargs), self._order[name]
            leaves = tree_leaves(output)
            # Copies: what follows may change them in place.
            found.update({(c, leaf): leaves[leaf].detach().clone() for c, leaf in self.kept if c == i})
            if i == self.kept[-1][0]:
                raise _Reached
            return output

        device = next((x.device for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)), torch.device("cpu"))
        devices = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices), torch.no_grad(), suppress(_Reached), through(self.modules, call):
            forward(*args, **kwargs)
        if len(found) < len(self.kept):
            raise RuntimeError("the frozen modules did not run in this forward, unlike in the one that was watched")
        return [found[place] for place in self.kept]

    def _poison(self, call: int, leaf: int, batch_size: int, length: int | None, device: torch.device) -> Tensor:
        key = call, leaf, batch_size, length, device
        made = self._poisons.get(key)
        if made is None:
            like = self.calls[call].leaves[leaf]
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
    """The inputs of some samples of a batch, in order: each tensor [B, ...] of them cut to its rows."""
    if len(rows) == batch_size:
        return tree
    return tree_map(
        lambda x: x[rows.to(x.device)] if isinstance(x, Tensor) and x.dim() and len(x) == batch_size else x, tree
    )


def merged(batch_size: int, parts: Sequence[tuple[Tensor, list[Tensor]]]) -> list[Tensor]:
    """-> each column's rows of one batch, from parts (places [b] in order, each column's rows [b, ...]).

    A column has the strides that it has in the first part.
    """
    if len(parts) == 1:
        return parts[0][1]
    places = [places for places, _ in parts]
    return [_merged(batch_size, places, column) for column in zip(*(rows for _, rows in parts), strict=True)]


def _merged(batch_size: int, places: Sequence[Tensor], parts: Sequence[Tensor]) -> Tensor:
    like = parts[0]
    order = sorted(range(1, like.dim()), key=lambda d: -like.stride()[d])
    whole = like.new_empty((batch_size, *(like.shape[d] for d in order)))
    whole = whole.permute(0, *(1 + order.index(d) for d in range(1, like.dim())))
    for here, rows in zip(places, parts, strict=True):
        whole[here.to(whole.device)] = rows
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
    """Inside, calls of modules' forwards become call(name, module, original forward, args, kwargs)."""
    placed = [_placed(call, name, module) for module, name in {m: name for name, m in modules.items()}.items()]
    try:
        yield
    finally:
        for own in placed:
            own.remove()


def _placed(call: Callable, name: str, module: nn.Module) -> OwnForward:
    def forward(*args: Any, **kwargs: Any) -> Any:
        return call(name, module, own.original, args, kwargs)

    own = OwnForward(module, forward)
    return own
