"""Keys: the numbers of a batch's views, as a loader hands them out and as `samples()` takes them; Unread."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .views import Views


class Keys:
    """The keys of a batch's views: `tensor` is int64 [B] on the CPU.

    Keys is no tensor itself, so that code that moves batches to a device leaves the keys on the host.

    Attributes:
        views: those of the loader that made the keys, which then need no check; None where other code made the keys.
    """

    __slots__ = ("tensor", "views")

    def __init__(self, tensor: Tensor, views: Views | None = None) -> None:
        self.tensor, self.views = tensor, views

    def __len__(self) -> int:
        return len(self.tensor)

    def __repr__(self) -> str:
        return f"Keys({self.tensor.tolist()})"

    def tolist(self) -> list[int]:
        return self.tensor.tolist()


def keys_in(batch: Any) -> Keys:
    """-> the keys of a batch that a cache's loader made.

    Raises:
        ValueError: the batch has none.
    """
    entries = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, tuple | list) else ()
    found = [entry for entry in entries if isinstance(entry, Keys)]
    if len(found) != 1:
        raise ValueError("batches must hold the keys of their views: take them from cache.loader(...)")
    return found[0]


def checked_keys(keys: Keys | Tensor | Sequence[int], views: Views) -> Tensor:
    """-> keys as int64 [B] on the CPU.

    Raises:
        TypeError: keys are neither the loader's nor int64.
        ValueError: there is not one key for each sample, a key comes twice, or a key is not of these views.
    """
    if isinstance(keys, Keys):
        if keys.views is views:
            return keys.tensor
        keys = keys.tensor
    try:
        keys = torch.as_tensor(keys, dtype=torch.int64, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"keys must be the loader's, or int64 of a batch, got a {type(keys).__name__}") from error
    if keys.dim() != 1 or not len(keys):
        raise ValueError(f"keys must be one for each sample of a batch, got shape {tuple(keys.shape)}")
    numbers = keys.tolist()
    if len(set(numbers)) != len(numbers):
        twice, count = keys.unique(return_counts=True)
        raise ValueError(f"keys must be different in a batch, got {twice[count > 1].tolist()[:5]} more than once")
    least, most = min(numbers), max(numbers)
    if least < -views.num_samples or most >= views.num_keys:
        raise ValueError(
            f"keys must be of this cache's data set, in {-views.num_samples}..{views.num_keys - 1}, "
            f"got {least if least < -views.num_samples else most}"
        )
    return keys


class Unread:
    """Of each key, whether the last batch brought no input of its view.

    Attributes:
        ever: whether there was such a sample in any batch.
    """

    def __init__(self, keys: int) -> None:
        self.ever = False
        self._unread = torch.zeros(keys, dtype=torch.bool, device="cpu")

    def note(self, keys: Tensor, unread: Tensor) -> None:
        """The batch that comes next lacks these inputs, bool [B]."""
        if self.ever or bool(unread.any()):
            self.ever, kept = True, keys >= 0
            self._unread[keys[kept]] = unread[kept]

    def among(self, keys: Tensor) -> Tensor:
        """-> bool [B]: which of the batch's inputs are missing."""
        if not self.ever:
            return torch.zeros(len(keys), dtype=torch.bool, device="cpu")
        return self._unread[keys.clamp(min=0)] & (keys >= 0)

    @staticmethod
    def refuse(unread: Tensor, reason: str | None = None) -> None:
        """
        Args:
            reason: why features cannot be used. None: they were dropped as layers froze or were thawed.

        Raises:
            RuntimeError: a forward needs inputs that are missing.
        """
        if bool(unread.any()):
            reason = reason or (
                "freeze and thaw between a step and the next batch, not between a batch and its forward, and let "
                "nothing fetch batches far ahead"
            )
            raise RuntimeError(
                f"{int(unread.sum())} samples of this batch were not read, since their features were kept, and these "
                f"cannot be used in this forward: {reason}"
            )
