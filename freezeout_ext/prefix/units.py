"""Frozen units that are called one after the other, and what they give by their own forwards."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ..attach import method_of
from .forms import Form
from .guard import Guard


@dataclass
class Unit:
    """A wholly frozen top module of a layer, by name."""

    name: str
    module: nn.Module


@dataclass
class Link:
    """A unit in a chain.

    Attributes:
        call: how the unit is called.
        result: what the unit returns.
        traces: of the unit's modules. They hold as long as the guard does.
    """

    unit: Unit
    guard: Guard
    call: Form
    result: Form
    traces: dict = field(default_factory=dict)


class Units:
    """unit_n(... unit_1(inputs)) by the units' own forwards. Made while nothing is installed on the units."""

    def __init__(self, links: Sequence[Link]) -> None:
        self.links = links
        self.forwards = [method_of(link.unit.module, "forward") for link in links]

    @property
    def name(self) -> str:
        first, last = self.links[0].unit.name, self.links[-1].unit.name
        return first if first == last else f"{first} .. {last}"

    def __call__(self, *inputs: Tensor) -> tuple[Tensor]:
        (y,) = deque(self.values(*inputs), maxlen=1)  # each other one is freed once the next one is there
        return (y,)

    def values(self, *inputs: Tensor) -> Iterator[Tensor]:
        """-> what each unit gives, one after the other."""
        y = None
        for link, forward in zip(self.links, self.forwards, strict=True):
            y = _called(link, forward, y, inputs)
            yield y


def _called(link: Link, forward: Callable, y: Any, inputs: tuple[Tensor, ...]) -> Tensor:
    args, kwargs = link.call.fill(y, inputs)
    leaves = link.result.match(forward(*args, **kwargs))
    if leaves is None:
        raise RuntimeError(f"frozen module {link.unit.name} returned something else than at the capture")
    return leaves[link.result.at]
