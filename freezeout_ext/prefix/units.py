"""Frozen units that are called one after the other, and what they give by their own forwards."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .forms import Form
from .guard import Guard


@dataclass
class Unit:
    """A frozen top module of a layer, as one forward called it.

    Attributes:
        forward: its own, found while nothing was installed on the module.
        call: how the unit is called.
        result: what the unit returns.
    """

    name: str
    module: nn.Module
    forward: Callable
    guard: Guard
    call: Form
    result: Form


def name_of(units: Sequence[Unit]) -> str:
    return units[0].name if len(units) == 1 else f"{units[0].name} .. {units[-1].name}"


def run_units(units: Sequence[Unit], *inputs: Tensor) -> tuple[Tensor]:
    """-> (unit_n(... unit_1(inputs)),) by the units' own forwards."""
    (y,) = deque(values_of(units, inputs), maxlen=1)  # each other one is freed once the next one is there
    return (y,)


def values_of(units: Sequence[Unit], inputs: tuple[Tensor, ...]) -> Iterator[Tensor]:
    """-> what each unit gives, one after the other.

    Raises:
        RuntimeError: a unit returns something else than at the capture.
    """
    y: Any = None
    for unit in units:
        args, kwargs = unit.call.fill(y, inputs)
        leaves = unit.result.match(unit.forward(*args, **kwargs))
        if leaves is None:
            raise RuntimeError(f"frozen module {unit.name} returned something else than at the capture")
        y = leaves[unit.result.at]
        yield y
