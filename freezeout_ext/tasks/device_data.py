"""DeviceData: a whole set as tensors on a device, whose batches are made and augmented there."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..arguments import check_count
from .batches import epoch_order, generator

MOST_SEED = 2**63 - 1


class DeviceData:
    """inputs[b] = prepare(augment(inputs[b], seeds[b])): samples 0 .. N - 1 of one tensor, and their targets.

    DeviceData is a map-style dataset too. There sample i draws its seed from torch's generator.

    Args:
        inputs: of all samples, on the device on which batches are made.
        targets: of all samples, on the same device.
        augment: (inputs [B, ...], seeds) -> inputs [B, ...]. Each sample is augmented by its own seed alone; see
            `uniform`.
        prepare: inputs [B, ...] -> what the model takes, such as floats of bytes.

    Shapes: inputs [N, ...], targets [N, ...], seeds int64 [B] on the CPU.

    Raises:
        ValueError: there are not as many targets as inputs.
    """

    def __init__(
        self,
        inputs: Tensor,
        targets: Tensor,
        *,
        augment: Callable[[Tensor, Tensor], Tensor] | None = None,
        prepare: Callable[[Tensor], Any] | None = None,
    ) -> None:
        if len(inputs) != len(targets):
            raise ValueError(f"targets must be as many as inputs, {len(inputs)}, got {len(targets)}")
        self._inputs, self._targets = inputs, targets
        self._augment, self._prepare = augment, prepare

    def __len__(self) -> int:
        return len(self._inputs)

    def __getitem__(self, i: int) -> tuple[Any, Tensor]:
        """(input, target) of sample i."""
        sample = torch.arange(len(self), device="cpu")[i].reshape(1)
        seeds = torch.randint(MOST_SEED, (1,), device="cpu")
        return self.batch(sample, seeds)[0], self.targets(sample)[0]

    def batch(self, samples: Tensor, seeds: Tensor) -> Any:
        """The inputs of the samples, augmented as the seeds say.

        Shapes: samples int64 [B], seeds int64 [B] on the CPU.
        """
        inputs = self._inputs[samples.to(self._inputs.device)]
        if self._augment is not None:
            inputs = self._augment(inputs, seeds)
        return inputs if self._prepare is None else self._prepare(inputs)

    def targets(self, samples: Tensor) -> Tensor:
        """The targets of the samples [B]."""
        return self._targets[samples.to(self._targets.device)]

    def batches(
        self,
        batch_size: int,
        *,
        shuffle: bool = False,
        drop_last: bool = False,
        seed: int = 0,
        epoch: int = 0,
    ) -> Iterator[tuple[Any, Tensor]]:
        """See `tasks.batches.batches`."""
        check_count("batch_size", batch_size, 1)
        samples = epoch_order(len(self), shuffle, seed, epoch)
        seeds = torch.randint(MOST_SEED, (len(self),), generator=generator(seed, epoch, 1), device="cpu")[samples]
        samples = samples.to(self._inputs.device)  # all of an epoch at once: one copy
        end = len(self) - len(self) % batch_size if drop_last else len(self)
        for start in range(0, end, batch_size):
            where = slice(start, min(start + batch_size, end))
            yield self.batch(samples[where], seeds[where]), self.targets(samples[where])


def uniform(seeds: Tensor, count: int) -> Tensor:
    """u[b, j] = hash(seeds[b], j) / 2**24 in [0, 1): `count` random numbers of each seed, the same in every batch.

    Shapes: seeds int64 [B] -> float32 [B, count], on the device of the seeds.
    """
    x = seeds[:, None] + torch.arange(1, count + 1, device=seeds.device) * -7046029254386353131  # 0x9E3779B97F4A7C15
    # splitmix64, on int64 that wraps. Source: Steele, Lea, Flood 2014, doi 10.1145/2660193.2660195.
    # >> copies the sign, which the masks remove. Its last step changes none of the upper 24 bits, and is left out.
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -4658895280553007687  # 0xBF58476D1CE4E5B9
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -7723592293110705685  # 0x94D049BB133111EB
    return ((x >> 40) & 0xFFFFFF).to(torch.float32) / 2**24
