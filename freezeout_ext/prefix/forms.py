"""How a module is called and what it returns: trees of the value that goes on, of other tensors, and of constants."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from typing import Any

from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from .judge import Refused
from .reads import PLAIN


class Carried:
    """In a Form: the value that goes from unit to unit."""


@dataclass(frozen=True)
class Input:
    """In a Form: the chain's input of this number."""

    index: int


@dataclass(frozen=True)
class Form:
    """How a unit is called, or what it returns: a tree of `Carried`, `Input` and constants."""

    spec: TreeSpec
    leaves: tuple

    @classmethod
    def of(cls, tree: Any, carried: Tensor | None, inputs: list[Tensor], new: Callable[[Tensor], object]) -> "Form":
        """-> the form of what was seen.

        Args:
            new: called with a tensor that is neither. Notes the tensor as the next input, or raises.

        Raises:
            Refused: a leaf is neither a tensor nor a constant.
        """
        found, spec = flatten(tree)
        leaves: list[Any] = []
        for leaf in found:
            if carried is not None and leaf is carried:
                leaves.append(Carried)
            elif isinstance(leaf, Tensor):
                if not any(leaf is x for x in inputs):
                    new(leaf)
                leaves.append(next(Input(i) for i, x in enumerate(inputs) if x is leaf))
            elif type(leaf) in PLAIN or isinstance(leaf, Enum):
                leaves.append(leaf)
            else:
                raise Refused(f"a {type(leaf).__name__}")
        return cls(spec, tuple(leaves))

    @cached_property
    def at(self) -> int:
        """The place of the carried value among the leaves."""
        return self.leaves.index(Carried)

    @cached_property
    def alone(self) -> bool:
        """Whether a call is given the carried value and nothing else."""
        return self.leaves == (Carried,) and self.spec == _ALONE

    def fill(self, carried: Any, inputs: tuple) -> Any:
        """-> the tree with values in it."""
        if self.spec.is_leaf() and self.leaves == (Carried,):
            return carried
        values = [carried if a is Carried else inputs[a.index] if type(a) is Input else a for a in self.leaves]
        return tree_unflatten(values, self.spec)

    def match(self, tree: Any) -> list | None:
        """-> the leaves of a tree of this form in which the constants are the same, None for another tree."""
        found, spec = flatten(tree)
        if spec != self.spec:
            return None
        for leaf, known in zip(found, self.leaves, strict=True):
            if known is leaf or known is Carried or type(known) is Input:
                continue
            if type(leaf) is not type(known) or leaf != known or repr(leaf) != repr(known):  # 0.0 == -0.0
                return None
        return found


def flatten(tree: Any) -> tuple[list, TreeSpec]:
    """Tuples, lists and the dict of keyword arguments are opened. Other objects, which may change, are leaves."""
    keywords = tree[1] if type(tree) is tuple and len(tree) == 2 and type(tree[1]) is dict else None
    return tree_flatten(tree, is_leaf=lambda node: type(node) not in (tuple, list) and node is not keywords)


_ALONE = flatten(((None,), {}))[1]
