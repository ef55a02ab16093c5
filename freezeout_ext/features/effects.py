"""Effects: what an operation or a module reads, writes, shares and draws, as far as tensors and generators show it."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ..torch_state import version_of


def tensors_in(tree: Any) -> list[Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor)]


def written_by(func: Any, args: tuple, kwargs: Mapping) -> list[Tensor]:
    """-> the arguments that an operation writes to, by its schema."""
    schema = getattr(func, "_schema", None)
    if schema is None or not schema.is_mutable:
        return []
    found: list[Tensor] = []
    for i, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[i] if i < len(args) else kwargs.get(argument.name)
            found += tensors_in(value)
    return found


def storage_of(x: Tensor) -> torch.UntypedStorage | None:
    return x.untyped_storage() if x.layout is torch.strided else None


def address_of(x: Tensor) -> int:
    """-> a number that tensors share whose memory is one; 0: it has none."""
    storage = storage_of(x)
    return 0 if storage is None else storage._cdata


def leaves_of(output: Any) -> Iterator[Tensor]:
    """-> the tensors of a model's output, of whatever containers that is made."""
    for leaf in tree_leaves(output):
        if isinstance(leaf, Tensor):
            yield leaf
        elif isinstance(leaf, Mapping):
            yield from leaves_of(list(leaf.values()))
        elif hasattr(leaf, "__dataclass_fields__"):
            yield from leaves_of(list(vars(leaf).values()))


def versions_of(tensors: Iterable[Tensor]) -> list[int]:
    return [version_of(x) for x in tensors]
