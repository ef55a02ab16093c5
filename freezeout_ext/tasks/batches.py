"""batches: a dataset's samples in batches whose order and augmentation are a function of (seed, epoch) alone."""

import hashlib
import multiprocessing
from collections import UserDict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from ..arguments import check_count
from ..batch import Batch
from ..torch_state import kept_generators, seeded


def batches(
    dataset: Any,
    batch_size: int,
    *,
    shuffle: bool = False,
    drop_last: bool = False,
    seed: int = 0,
    epoch: int = 0,
    collate: Callable[[list], Any] | None = None,
    workers: int = 0,
    pin_memory: bool = False,
) -> Iterator[tuple[Batch, Batch]]:
    """Yields (inputs, targets) of one epoch.

    A dataset with a method `batches` makes its batches itself, see `DeviceData`.
    Of any other dataset, sample i is drawn with torch's, numpy's and Python's generators seeded from (seed, epoch, i).
    That holds in every process. The caller's generators stay as they are.

    Args:
        dataset: map-style, or one with a method `batches`.
        batch_size: samples in a batch.
        shuffle: a new order each epoch; else that of the dataset.
        drop_last: leave out a last batch smaller than batch_size.
        seed: of order and augmentation.
        epoch: the number of the epoch.
        collate: samples -> batch. Default: torch's.
        workers: processes that load samples.
        pin_memory: as in torch's DataLoader.

    Raises:
        ValueError: batch_size < 1.
        TypeError: batch_size is no whole number; a batch is neither a pair nor a dict with "labels".
    """
    check_count("batch_size", batch_size, 1)
    if hasattr(dataset, "batches"):
        return dataset.batches(batch_size, shuffle=shuffle, drop_last=drop_last, seed=seed, epoch=epoch)
    return _loaded(
        _Seeded(dataset, seed, epoch),
        batch_size=batch_size,
        sampler=epoch_order(len(dataset), shuffle, seed, epoch).tolist(),
        collate_fn=collate or default_collate,
        num_workers=workers,
        drop_last=drop_last,
        pin_memory=pin_memory,
        multiprocessing_context=_context() if workers else None,
    )


def _loaded(dataset: "_Seeded", **options: Any) -> Iterator[tuple[Batch, Batch]]:
    with kept_generators():
        iterator = iter(DataLoader(dataset, **options))  # draws a seed for the workers
    for batch in iterator:
        yield as_batch(batch)


def _context() -> str | None:
    # A fresh process could not import a user's file as a module.
    return "fork" if "fork" in multiprocessing.get_all_start_methods() else None


def epoch_order(count: int, shuffle: bool, seed: int, epoch: int) -> Tensor:
    """The samples 0 .. count - 1 in the order of an epoch, int64 [count]."""
    return (
        torch.randperm(count, generator=generator(seed, epoch), device="cpu")
        if shuffle
        else torch.arange(count, device="cpu")
    )


def collated(dataset: Any, collate: Callable[[list], Any] | None, count: int) -> Batch:
    """The first `count` samples as one batch."""
    if hasattr(dataset, "batches"):
        return next(iter(dataset.batches(min(count, len(dataset)))))
    seeded = _Seeded(dataset, 0, 0)
    return (collate or default_collate)([seeded[i] for i in range(min(count, len(dataset)))])


def as_batch(batch: Batch) -> tuple[Batch, Batch]:
    """The batch as a pair (inputs, targets).

    In a dict with "labels", the labels are the targets and all other entries are the inputs.

    Raises:
        TypeError: the batch is neither a pair nor such a dict.
    """
    if isinstance(batch, dict | UserDict) and "labels" in batch:
        return {name: value for name, value in batch.items() if name != "labels"}, batch["labels"]
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        what = f"{type(batch).__name__} of {len(batch)}" if isinstance(batch, tuple | list) else type(batch).__name__
        raise TypeError(f'a batch must be a pair (inputs, targets) or a dict with "labels", got a {what}')
    return batch[0], batch[1]


def generator(*seeds: int) -> torch.Generator:
    """A generator seeded by all of `seeds`. Neighbouring seeds share no stream."""
    return torch.Generator(device="cpu").manual_seed(hashed(*seeds))


def hashed(*seeds: int) -> int:
    """64 bits of the hash of `seeds`."""
    return int.from_bytes(hashlib.sha256(repr(seeds).encode()).digest()[:8], "little")


class _Seeded(Dataset):
    """dataset[i] as drawn by (seed, epoch, i)."""

    def __init__(self, dataset: Any, seed: int, epoch: int) -> None:
        self._dataset, self._seed, self._epoch = dataset, seed, epoch

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, i: int) -> Any:
        with seeded(hashed(self._seed, self._epoch, i)):
            return self._dataset[i]
