"""Feed: the batches of a run on its device, fresh ones or those of a cache of features."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from ..batch import Batch, part, to
from ..features import FeatureCache
from ..tasks import Task, batches
from ..tasks.batches import as_batch
from .config import CACHE_DTYPES, TrainConfig
from .ranks import Ranks

# Whole sets are evaluated in batches of this size at least: of kernels too short for a GPU, or too large for a cache.
EVALUATION_BATCH = {"cuda": 500, "cpu": 100}


class Feed:
    """What a run trains on and is judged by, batch by batch.

    Attributes:
        cache: of the frozen layers' outputs; None where they are not kept.
        works_ahead: whether batches are made while the step runs.
    """

    def __init__(self, config: TrainConfig, task: Task, ranks: Ranks, device: torch.device) -> None:
        self.config, self.task, self.ranks, self.device = config, task, ranks, device
        self.memory_format = torch.channels_last if config.channels_last else torch.contiguous_format
        self.works_ahead = task.workers > 0 and not hasattr(task.train, "batches")
        # Where a batch is less than whole, it is the only one.
        self._drop_last = len(task.train) >= config.batch_size
        self.cache = self._make_cache() if config.cache else None

    def train_batches(self, epoch: int) -> Iterator[tuple[Batch, Batch]]:
        """This process's parts of the batches of an epoch."""
        config = self.config
        found = self._batches(
            self.task.train, config.batch_size, shuffle=True, drop_last=self._drop_last, seed=config.seed, epoch=epoch
        )
        for batch in found:
            yield tuple(part(each, self.ranks.rank, self.ranks.world) for each in batch)

    def steps(self, epoch: int) -> Iterator[tuple[Batch, Batch, AbstractContextManager]]:
        """The batches of an epoch, each with the context in which its step runs: a cache is told the samples there."""
        if self.cache is None:
            for inputs, targets in self.train_batches(epoch):
                yield inputs, targets, nullcontext()
            return
        for found in self._loader.batches(epoch):
            if isinstance(found, Mapping):
                keys = found["keys"]
                batch = as_batch({name: value for name, value in found.items() if name != "keys"})
            else:
                *rest, keys = found
                batch = as_batch(tuple(rest))
            (batch,) = self._on_device([batch])
            yield *batch, self.cache.samples(keys)

    def evaluation_batches(
        self, dataset: Any, on_batch: Callable[[int, int], None] = lambda done, total: None
    ) -> Iterator[tuple[Batch, Batch]]:
        """All samples of a dataset of the task, in its order; calls on_batch(batches done, batches) before each."""
        batch_size = self.config.batch_size
        if hasattr(dataset, "batches"):
            batch_size = max(batch_size, EVALUATION_BATCH[self.device.type])
        for done, batch in enumerate(self._batches(dataset, batch_size)):
            on_batch(done, math.ceil(len(dataset) / batch_size))
            yield batch

    def _make_cache(self) -> FeatureCache:
        config, task = self.config, self.task
        assert config.cache is not None  # a cache was asked for
        cache = FeatureCache(
            task.train,
            views=config.views,
            store=config.cache,
            dtype=CACHE_DTYPES[config.cache_dtype],
            seed=config.seed,
            measure=not config.deterministic,
        )
        loads: dict[str, Any] = (
            {} if cache.views.batched else {"num_workers": task.workers, "pin_memory": self.device.type == "cuda"}
        )
        self._loader = cache.loader(
            config.batch_size // self.ranks.world,
            drop_last=self._drop_last,
            collate_fn=task.collate,
            rank=self.ranks.rank,
            world_size=self.ranks.world,
            **loads,
        )
        return cache

    def _batches(self, dataset: Any, batch_size: int, **options) -> Iterator[tuple[Batch, Batch]]:
        options |= {"collate": self.task.collate, "workers": self.task.workers}
        return self._on_device(batches(dataset, batch_size, pin_memory=self.device.type == "cuda", **options))

    def _on_device(self, found: Iterable[tuple[Batch, Batch]]) -> Iterator[tuple[Batch, Batch]]:
        for inputs, targets in found:
            yield to(inputs, self.device, self.memory_format), to(targets, self.device)
