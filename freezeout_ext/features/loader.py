"""CacheLoader: batches with the keys of their views; what the cache keeps is neither decoded nor augmented."""

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.data import BatchSampler, DataLoader, Dataset, default_collate

from ..arguments import check_callable, check_count, check_flag, check_kind
from .frontier import poison
from .items import Items
from .keys import Keys
from .serving import Serving
from .views import order_seed

# Keys, samples, seeds and what is skipped, of batches whose samples are being loaded; None: fresh views, all of them.
Planned = deque[tuple[Tensor, Tensor, Tensor, Tensor | None]]


class CacheLoader:
    """Yields (inputs, targets, keys), or a dict with the entry `keys`; each sample once an epoch, one view of it.

    What the dataset's items hold besides is yielded too, in its place before the keys. Of several processes each owns a
    fixed part of the samples and shuffles within it; samples that do not divide among them are left out of an epoch.

    `epoch` is the number of the next epoch. It decides order and views. `state_dict` says where in an epoch the next
    batch is.

    Args:
        key_name: of the entry in batches that are dicts.
        arguments: of torch's DataLoader (num_workers, pin_memory, persistent_workers, ...).
    """

    def __init__(
        self, serving: Serving, batch_size: int, *, shuffle: bool, drop_last: bool, seed: int,
        collate_fn: Callable[[list], Any] | None, rank: int, world_size: int, key_name: str, arguments: dict[str, Any],
    ) -> None:  # fmt: skip
        check_count("batch_size", batch_size, 1)
        check_count("world_size", world_size, 1)
        check_count("rank", rank, 0, world_size - 1)
        check_flag("shuffle", shuffle)
        check_flag("drop_last", drop_last)
        check_count("seed", seed, -(2**63), 2**63 - 1)
        check_kind("key_name", key_name, str, "a str")
        if collate_fn is not None:
            check_callable("collate_fn", collate_fn, "a list of samples")
        taken = {"sampler", "batch_sampler", "dataset"} & set(arguments)
        if taken:
            raise ValueError(f"{', '.join(sorted(taken))}: the cache makes its own; pass shuffle and batch_size")
        self.batch_size, self.shuffle, self.drop_last = batch_size, shuffle, drop_last
        self.key_name = key_name
        self.epoch = self._first_step = 0
        self._at = (-2, 0)  # epoch, and how many of its batches were handed out
        self._serving, self._seed, self._rank, self._world_size = serving, seed, rank, world_size
        views = serving.views
        self._collate = partial(_collated, collate_fn or default_collate)
        self._requests = Requests()
        self._items = Items(serving)
        self._loader = None
        if not views.batched:
            arguments = {**arguments, "batch_sampler": self._requests, "collate_fn": self._collate}
            self._loader = DataLoader(cast("Dataset", views), **arguments)
        elif arguments:
            raise ValueError(f"{', '.join(sorted(arguments))}: a data set that makes whole batches has no workers")

    @property
    def num_samples(self) -> int:
        """-> how many samples this process sees in an epoch."""
        return self._serving.views.num_samples // self._world_size

    def __len__(self) -> int:
        whole, rest = divmod(self.num_samples, self.batch_size)
        return whole + bool(rest and not self.drop_last)

    def set_epoch(self, epoch: int) -> None:
        if epoch != self.epoch:
            self.epoch, self._first_step = epoch, 0

    def state_dict(self) -> dict:
        """Where the next batch is: its epoch, and how many batches of that were handed out."""
        inside = self._at[0] == self.epoch - 1 and self._at[1] < len(self)
        epoch, step = self._at if inside else (self.epoch, self._first_step)
        return {"epoch": epoch, "step": step}

    def load_state_dict(self, state_dict: Mapping) -> None:
        """The next iteration goes on there.

        Raises:
            ValueError: an epoch below 0, or more batches than an epoch has; nothing was changed.
        """
        epoch, step = state_dict["epoch"], state_dict["step"]
        if epoch < 0 or not 0 <= step <= len(self):
            raise ValueError(f"state_dict must be of epochs of {len(self)} batches, got epoch {epoch}, step {step}")
        self.epoch, self._first_step = epoch, step

    @property
    def sampler(self) -> "CacheLoader":
        """Itself: trainers call `loader.sampler.set_epoch`."""
        return self

    # For who makes a DataLoader of these that begins within an epoch: accelerate.skip_first_batches.

    prefetch_factor = None

    @property
    def dataset(self) -> "Batches":
        return Batches(self)

    @property
    def batch_sampler(self) -> BatchSampler:
        numbers: Any = BatchSampler(range(len(self)), 1, drop_last=False)
        numbers.set_epoch = self.set_epoch
        return numbers

    @staticmethod
    def collate_fn(batches: list) -> Any:
        (batch,) = batches
        return batch

    def __iter__(self) -> Iterator:
        # At the first batch: trainers set the epoch after they have made the iterator.
        epoch, first_step = self.epoch, self._first_step
        self.epoch, self._first_step = epoch + 1, 0
        yield from self.batches(epoch, first_step)

    def batches(self, epoch: int, first_step: int = 0) -> Iterator:
        """The batches of an epoch from `first_step` on."""
        self._serving.begins()
        for step, batch in enumerate(self._loaded(epoch, first_step), first_step + 1):
            self._at = (epoch, step)
            yield batch
            self._serving.taken_back()

    def _loaded(self, epoch: int, first_step: int) -> Iterator:
        planned: Planned = deque()
        plans = self._plans(epoch, first_step, planned)
        if self._loader is None:
            for _ in plans:
                yield self._made(*planned.popleft())
            return
        self._requests.plans, self._requests.length = plans, len(self) - first_step
        loaded = iter(self._loader)
        while True:
            start = time.perf_counter()
            found = next(loaded, planned)  # which no loader yields
            if found is planned:
                return
            yield self._finished(*planned.popleft(), found, time.perf_counter() - start)

    def order(self, epoch: int) -> Tensor:
        """-> the samples of this process in the order of an epoch."""
        mine = torch.arange(self._rank, self._serving.views.num_samples, self._world_size, device="cpu")
        if self.shuffle:
            generator = torch.Generator(device="cpu").manual_seed(order_seed(self._seed, epoch))
            mine = mine[torch.randperm(len(mine), generator=generator, device="cpu")]
        return mine[: self.num_samples]

    def _plans(self, epoch: int, first_step: int, planned: Planned) -> Iterator[list]:
        order, serving = self.order(epoch), self._serving
        views = serving.views

        # Of the whole epoch at once: a batch's own would take as long as a small net's layer.
        @cache
        def drawn(fresh: bool, *_: Any) -> tuple[Tensor, Tensor]:
            keys = -1 - order if fresh else views.keys(order, epoch)
            return keys, views.seeds(keys, epoch)

        for step in range(first_step, len(self)):
            where = slice(step * self.batch_size, (step + 1) * self.batch_size)
            idle = serving.is_idle
            keys, seeds = drawn(idle or serving.shows_fresh(epoch), views.count, views.first_epoch)
            samples, keys, seeds = order[where], keys[where], seeds[where]
            skipped = None if idle else self._skipped(keys)
            planned.append((keys, samples, seeds, skipped))
            needed = slice(None) if skipped is None else ~skipped
            yield [] if self._loader is None else _pairs(samples[needed], seeds[needed])

    def _skipped(self, keys: Tensor) -> Tensor:
        """-> bool [B]: what a batch that is planned now leaves out."""
        kept = self._serving.skippable(keys)
        if bool(kept.all()) and self._serving.planned():
            return torch.zeros_like(kept)
        return kept if self._loader is None else kept & self._items.has(keys)

    def _made(self, keys: Tensor, samples: Tensor, seeds: Tensor, skipped: Tensor | None) -> Any:
        """A batch of a data set that makes whole batches; it was planned right before."""
        dataset, template, read, seconds = self._serving.views.dataset, self._items.template, 0, 0.0
        if template is not None and skipped is not None and bool(skipped.all()):
            leaves, spec = template
            inputs = tree_unflatten([poison((len(keys), *x.shape), x.dtype, x.device) for x in leaves], spec)
        else:
            start = time.perf_counter()
            inputs = dataset.batch(samples, seeds)
            read, seconds = len(keys), time.perf_counter() - start
            if skipped is not None:
                skipped, (leaves, spec) = torch.zeros_like(skipped), tree_flatten(inputs)
                self._items.template = [x[0].detach() for x in leaves], spec
        self._serving.delivered(keys, skipped, read, seconds)
        return inputs, dataset.targets(samples), Keys(keys, self._serving.views)

    def _finished(
        self, keys: Tensor, samples: Tensor, seeds: Tensor, skipped: Tensor | None, found: Any, seconds: float
    ) -> Any:
        """What workers brought and what was kept, as one batch."""
        found, alike = found
        read = len(keys) if skipped is None else int((~skipped).sum())
        if skipped is not None and bool(skipped.any()):
            lost = skipped & ~(self._serving.skippable(keys) & self._items.has(keys))
            found = None if bool(lost.any()) else self._items.merge(keys, skipped, found)
            if found is None:
                # The store was emptied since, or samples differ in shape: this process reads the batch whole.
                found, alike = self._collate([self._serving.views[pair] for pair in _pairs(samples, seeds)])
                skipped, read = torch.zeros_like(skipped), read + len(keys)
        if skipped is not None and not bool(skipped.any()):
            self._items.learn(keys, found, alike=alike)
        self._serving.delivered(keys, skipped, read, seconds)
        return self._with_keys(found, Keys(keys, self._serving.views))

    def _with_keys(self, batch: Any, keys: Keys) -> Any:
        if isinstance(batch, Mapping):
            if self.key_name in batch:
                raise ValueError(f"key_name must be new to the batch, which has {', '.join(map(str, batch))}")
            return {**batch, self.key_name: keys}
        if isinstance(batch, tuple | list):
            return (*batch, keys)
        return batch, keys


class Requests:
    """A batch sampler in the main process: what each batch still needs of its samples."""

    plans: Iterator[list] = iter(())
    length = 0

    def __iter__(self) -> Iterator[list]:
        return self.plans

    def __len__(self) -> int:
        return self.length


class Batches(Dataset):
    """A loader's batches by number; its length is that of an epoch in samples."""

    def __init__(self, loader: CacheLoader) -> None:
        self._loader, self._made, self._next = loader, iter(()), -1

    def __len__(self) -> int:
        return self._loader.num_samples

    def __getitem__(self, step: int) -> Any:
        if step != self._next:
            self._loader.load_state_dict({"epoch": self._loader.epoch, "step": step})
            self._made = iter(self._loader)
        self._next = step + 1
        return next(self._made)


def _collated(collate: Callable[[list], Any], items: list) -> tuple[Any, bool]:
    """-> a batch of what was read, None where nothing was; and whether its samples are of one shape.

    A collate function of the user's may pad samples of different shapes. Then a sample's shape depends on its batch.
    """
    batch = collate(items) if items else None
    alike = collate is default_collate or len(set(map(_shape, items))) < 2
    return dict(batch) if isinstance(batch, Mapping) else batch, alike


def _shape(item: Any) -> Any:
    """-> what a collate function may pad of an item: shapes, sizes of pictures, and lengths of lists."""
    if isinstance(item, Mapping):
        return tuple((name, _shape(value)) for name, value in item.items())
    if isinstance(item, tuple | list):
        return len(item), *(_shape(value) for value in item if not isinstance(value, int | float))
    return getattr(item, "shape", getattr(item, "size", None))


def _pairs(samples: Tensor, seeds: Tensor) -> list[tuple[int, int]]:
    """-> (sample, seed) of each view."""
    return list(zip(samples.tolist(), seeds.tolist(), strict=True))
