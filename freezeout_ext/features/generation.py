"""Generation: what is kept behind one number of frozen layers, and what its rows were computed from."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .frontier import Frontier
from .guard import Guard
from .probe import padded_length
from .store import Store


@dataclass(eq=False)
class Generation:
    """What is kept behind one number of frozen layers.

    given_up: reading takes longer than computing.
    layers_seconds: of a sample in the layers in front, as far as they were timed.
    origins: which earlier generations a row passed through, by the number that the store keeps for it.
    """

    frontier: Frontier
    store: Store
    guard: Guard
    given_up: bool = False
    layers_seconds: float = 0.0
    origins: list[tuple["Generation", ...]] = field(default_factory=lambda: [()])

    def origin(self, base: "Generation | None", keys: Tensor) -> Tensor | None:
        """-> int16 [B], the numbers of the origins of rows computed from those of `base`; None where none matters."""
        if base is None or not base.store.is_lossy:
            return None  # rows that are kept as they were computed are what computing anew gives
        before, found = base.store.origin(keys), torch.full((len(keys),), -1, dtype=torch.int16, device="cpu")
        if base.frontier.length is not None and self.frontier.length is None:
            return found  # the lengths of its samples are kept no more
        for number in before.unique().tolist():
            if number >= 0:
                passed = (*base.origins[number], base)
                if passed not in self.origins:
                    self.origins.append(passed)
                found[before == number] = self.origins.index(passed)
        return found

    def length(self, args: tuple, kwargs: Mapping) -> int | None:
        """-> what a batch is padded to, None where rows are all as long."""
        return None if self.frontier.length is None else padded_length(args, kwargs)
