"""A batch: tensors, or dicts, lists and tuples of tensors."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

Batch = Any  # Tensor | Mapping[str, Batch] | tuple[Batch, ...] | list[Batch] | any other value


def call(model: nn.Module, inputs: Batch) -> Any:
    """model(**inputs) for a dict, model(*inputs) for a tuple or list, model(inputs) for anything else."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple | list) else model(inputs)


def tensors(batch: Batch) -> list[Tensor]:
    """All tensors of a batch, in order."""
    if isinstance(batch, Tensor):
        return [batch]
    values = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, tuple | list) else ()
    return [tensor for value in values for tensor in tensors(value)]


def size(batch: Batch) -> int:
    """How many samples the batch has: the length of its first tensor.

    Raises:
        TypeError: the batch holds no tensor, or its first tensor has no dimensions.
    """
    found = tensors(batch)
    if not found or not found[0].dim():
        what = type(batch).__name__ if not found else "a tensor without dimensions"
        raise TypeError(f"a batch must hold tensors whose first dimension counts the samples, got {what}")
    return len(found[0])


def to(batch: Batch, device: torch.device, memory_format: torch.memory_format = torch.contiguous_format) -> Batch:
    """The batch on `device`.

    Floating-point images [N, C, H, W] get `memory_format`.
    Mappings become dicts. Lists become tuples.
    """
    if isinstance(batch, Tensor):
        batch = batch.to(device, non_blocking=True)
        images = batch.dim() == 4 and batch.is_floating_point()
        return batch.contiguous(memory_format=memory_format) if images else batch
    return _rebuilt(batch, lambda value: to(value, device, memory_format))


def part(batch: Batch, index: int, parts: int) -> Batch:
    """Part `index` of the batch, whose samples are cut into `parts` parts."""
    if isinstance(batch, Tensor):
        return batch.chunk(parts)[index] if parts > 1 else batch
    return _rebuilt(batch, lambda value: part(value, index, parts))


def layout(batch: Batch) -> Any:
    """Shape, dtype and strides of each tensor, and every other value.

    Two batches with equal layouts can take each other's place.
    """
    if isinstance(batch, Tensor):
        return batch.shape, batch.dtype, batch.stride()
    if isinstance(batch, Mapping):
        return tuple((name, layout(value)) for name, value in batch.items())
    return tuple(map(layout, batch)) if isinstance(batch, tuple | list) else batch


def mapped(outputs: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """`outputs` with function(t) in the place of each tensor t; containers keep their type."""
    return tree_map(lambda value: function(value) if isinstance(value, Tensor) else value, outputs)


def detached(outputs: Any) -> Any:
    return mapped(outputs, Tensor.detach)


def _rebuilt(batch: Batch, function: Callable[[Batch], Batch]) -> Batch:
    if isinstance(batch, Mapping):
        return {name: function(value) for name, value in batch.items()}
    return tuple(map(function, batch)) if isinstance(batch, tuple | list) else batch
