"""Formula: what a fused optimizer says of its formula."""

from collections.abc import Callable
from typing import Any

from torch import Tensor


class Formula:
    """States and hyperparameters of one formula, its registered op, and torch's for-loop for the same."""

    _formula: str
    _op: Callable[..., None]

    def _lacks_state(self, p: Tensor, group: dict[str, Any]) -> bool:
        """Whether p's states are still to be made."""
        raise NotImplementedError

    def _make_state(self, p: Tensor, group: dict[str, Any]) -> None:
        """Makes p's states, of zeros."""
        raise NotImplementedError

    def _reason_against_state(self, p: Tensor, group: dict[str, Any]) -> str | None:
        """Why the compiled update does not take p's states, or None."""
        raise NotImplementedError

    def _reason_against_numbers(self, group: dict[str, Any]) -> str | None:
        """Why the compiled update does not take the group's hyperparameters, or None."""
        raise NotImplementedError

    def _torch_update(self, group: dict[str, Any], params: list[Tensor]) -> None:
        """torch's for-loop over parameters that have a gradient."""
        raise NotImplementedError

    def _op_numbers(self, group: dict[str, Any]) -> dict[str, Any]:
        """The registered op's keyword arguments for a group."""
        raise NotImplementedError

    def _op_lists(self, group: dict[str, Any]) -> list[list[Tensor]]:
        """The registered op's lists of a group's parameters that have a gradient: params, grads, states, counters."""
        raise NotImplementedError
