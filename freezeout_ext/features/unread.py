"""Unread: samples whose inputs no batch brought, since their features were kept."""

import torch
from torch import Tensor


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
    def refuse(unread: Tensor) -> None:
        """
        Raises:
            RuntimeError: a forward needs inputs that are missing.
        """
        if bool(unread.any()):
            raise RuntimeError(
                f"{int(unread.sum())} samples of this batch were not read, since their features were kept, and these "
                "cannot be used in this forward. Freeze and thaw between a step and the next batch, not between a "
                "batch and its forward, and let nothing fetch batches far ahead"
            )
