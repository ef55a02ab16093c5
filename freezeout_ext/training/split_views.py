"""SplitViews: a split on the device as a data set of views for the feature cache, made in batches."""

import torch
from torch import Tensor

from ..tasks.images import Split, _crop_flip


class SplitViews:
    """A `features.BatchDataset`: inputs = (crop_flip(images) / 255 - mean) / std, a shift and a flip for each seed.

    Args:
        augment: False gives each image as it is.
    """

    def __init__(self, split: Split, *, augment: bool = True) -> None:
        self._split, self._augment = split, augment
        device, shape = split.images.device, (1, -1, 1, 1)
        self._offset = (255 * torch.tensor(split.mean, device=device)).view(shape)
        self._scale = (1 / (255 * torch.tensor(split.std, device=device))).view(shape)

    def __len__(self) -> int:
        return len(self._split)

    def batch(self, samples: Tensor, seeds: Tensor) -> Tensor:
        """-> float32 [B, C, H, W] on the split's device."""
        split = self._split
        device = split.images.device
        images = split.images[samples.to(device)]
        if self._augment:
            span = 2 * split.padding + 1
            # Three draws of one seed: disjoint parts of its 63 bits.
            top, left, flip = seeds % 2**20 % span, (seeds >> 20) % 2**20 % span, (seeds >> 40) % 2 == 1
            flip = flip & split.flip
            images = _crop_flip(images, top.to(device), left.to(device), flip.to(device), padding=split.padding)
        return images.to(torch.float32).sub_(self._offset).mul_(self._scale)

    def targets(self, samples: Tensor) -> Tensor:
        return self._split.labels[samples.to(self._split.labels.device)]
