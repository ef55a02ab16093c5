"""How a module is called and what it returns: trees of the value that goes on, of other tensors, and of constants."""

from collections.abc import Sequence
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
    def of(cls, tree: Any, carried: Tensor | None, inputs: Sequence[Tensor]) -> "Form":
        """-> the form of what was seen.

        Raises:
            Refused: a leaf is neither of these tensors nor a constant.
        """
        found, spec = flatten(tree)
        return cls(spec, tuple(_place(leaf, carried, inputs) for leaf in found))

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

    def inputs(self, leaves: list) -> tuple | None:
        """-> the inputs by number among leaves that match, None where one that stands twice is two tensors now."""
        given: dict[int, Any] = {}
        for leaf, known in zip(leaves, self.leaves, strict=True):
            if type(known) is Input and given.setdefault(known.index, leaf) is not leaf:
                return None
        return tuple(given[i] for i in sorted(given))


def _place(leaf: Any, carried: Tensor | None, inputs: Sequence[Tensor]) -> Any:
    if isinstance(leaf, Tensor):
        if leaf is carried:
            return Carried
        for i, x in enumerate(inputs):
            if leaf is x:
                return Input(i)
        raise Refused("the value that it was given")
    if type(leaf) in PLAIN or isinstance(leaf, Enum):
        return leaf
    raise Refused(f"a {type(leaf).__name__}")


def flatten(tree: Any) -> tuple[list, TreeSpec]:
    """Tuples, lists and the dict of keyword arguments are opened. Other objects, which may change, are leaves."""
    keywords = tree[1] if type(tree) is tuple and len(tree) == 2 and type(tree[1]) is dict else None
    return tree_flatten(tree, is_leaf=lambda node: type(node) not in (tuple, list) and node is not keywords)


_ALONE = flatten(((None,), {}))[1]
