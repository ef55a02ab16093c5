"""Nested arguments and results of modules."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map


def map_tensors(function: Callable[[Tensor], Any], tree: Any) -> Any:
    """tree with function(tensor) for each tensor, the rest as it is: pytree would make a tuple of a torch.Size."""

    def apply(leaf: Any) -> Any:
        return function(leaf) if isinstance(leaf, Tensor) else leaf

    return tree_map(apply, tree, is_leaf=lambda node: isinstance(node, torch.Size))
