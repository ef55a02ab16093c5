"""CacheLoader: batches with the keys of their views; what the cache keeps is neither decoded nor augmented."""

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.data import DataLoader, Dataset, default_collate

from ..arguments import check_callable, check_count, check_flag, check_kind
from .poison import poison
from .store import Column, Store
from .views import Keys, Views, order_seed

# Keys, samples, seeds and what is skipped, of batches whose samples are being loaded.
Planned = deque[tuple[Tensor, Tensor, Tensor, Tensor]]


class Source(Protocol):
    """What a loader asks of its cache."""

    views: Views

    def keys(self, samples: Tensor, epoch: int) -> Tensor:
        """-> the keys of the views that this epoch shows."""

    def skippable(self, keys: Tensor) -> Tensor:
        """-> bool [B]: whose inputs no forward needs."""

    def needless(self) -> Callable[[Any], bool] | None:
        """-> which entries of a batch no forward needs, by name or place; None where all are needed."""

    def planned(self) -> bool:
        """Whether this batch, which could be skipped, is to be loaded whole for a spot check."""

    def delivered(self, keys: Tensor, skipped: Tensor, samples_read: int, seconds: float) -> None:
        """Notes which inputs a batch lacks, before it is handed out, and how long it was waited for."""

    def item_store(self, columns: list[Column], keys: int) -> Store | None:
        """-> where the entries that are still needed are kept, None where there is no room."""


class CacheLoader:
    """Yields (inputs, targets, keys), or a dict with the entry `keys`; each sample once an epoch, one view of it.

    What the dataset's items hold besides is yielded too, in its place before the keys. Of several processes each owns a
    fixed part of the samples and shuffles within it; samples that do not divide among them are left out of an epoch.

    `epoch` is the number of the next epoch. It decides order and views, so that a run resumes by setting it.

    Args:
        key_name: of the entry in batches that are dicts.
        arguments: of torch's DataLoader (num_workers, pin_memory, persistent_workers, ...).
    """

    def __init__(
        self,
        cache: Source,
        batch_size: int,
        *,
        shuffle: bool,
        drop_last: bool,
        seed: int,
        collate_fn: Callable[[list], Any] | None,
        rank: int,
        world_size: int,
        key_name: str,
        arguments: dict[str, Any],
    ) -> None:
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
        self.epoch = 0
        self._cache, self._seed, self._rank, self._world_size = cache, seed, rank, world_size
        views = cache.views
        self._collate = collate_fn or default_collate
        self._requests = _Requests()
        self._items = _Items(cache)
        self._loader = None
        if not views.batched:
            self._loader = DataLoader(
                _Requested(views), batch_sampler=self._requests, collate_fn=_Collate(self._collate), **arguments
            )
        elif arguments:
            raise ValueError(f"{', '.join(sorted(arguments))}: a data set that makes whole batches has no workers")

    @property
    def num_samples(self) -> int:
        """-> how many samples this process sees in an epoch."""
        return self._cache.views.num_samples // self._world_size

    def __len__(self) -> int:
        whole, rest = divmod(self.num_samples, self.batch_size)
        return whole + bool(rest and not self.drop_last)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    @property
    def sampler(self) -> "CacheLoader":
        """Itself: trainers call `loader.sampler.set_epoch`."""
        return self

    def __iter__(self) -> Iterator:
        # At the first batch: trainers set the epoch after they have made the iterator.
        epoch, self.epoch = self.epoch, self.epoch + 1
        yield from self.batches(epoch)

    def batches(self, epoch: int, first_step: int = 0) -> Iterator:
        """The batches of an epoch from `first_step` on."""
        self._cache.views.check()
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
        mine = torch.arange(self._rank, self._cache.views.num_samples, self._world_size, device="cpu")
        if self.shuffle:
            generator = torch.Generator(device="cpu").manual_seed(order_seed(self._seed, epoch))
            mine = mine[torch.randperm(len(mine), generator=generator, device="cpu")]
        return mine[: self.num_samples]

    def _plans(self, epoch: int, first_step: int, planned: Planned) -> Iterator[list]:
        order, views = self.order(epoch), self._cache.views
        # Those of the whole epoch at once: a batch's own would take as long as a small net's layer.
        drawn = [(keys, views.seeds(keys, epoch)) for keys in (views.keys(order, epoch), -1 - order)]
        for step in range(first_step, len(self)):
            where = slice(step * self.batch_size, (step + 1) * self.batch_size)
            samples = order[where]
            keys = self._cache.keys(samples, epoch)
            seeds = next((s[where] for k, s in drawn if torch.equal(k[where], keys)), None)
            seeds = views.seeds(keys, epoch) if seeds is None else seeds
            skipped = kept = self._cache.skippable(keys)
            if self._loader is not None:
                skipped = kept & self._items.has(keys)
            if bool(kept.all()) and self._cache.planned():
                skipped = torch.zeros_like(kept)
            planned.append((keys, samples, seeds, skipped))
            yield [] if self._loader is None else _pairs(samples[~skipped], seeds[~skipped])

    def _made(self, keys: Tensor, samples: Tensor, seeds: Tensor, skipped: Tensor) -> Any:
        """A batch of a data set that makes whole batches; it was planned right before."""
        dataset, template, seconds = self._cache.views.dataset, self._items.template, 0.0
        if template is not None and bool(skipped.all()):
            leaves, spec = template
            inputs = tree_unflatten([poison((len(keys), *x.shape), x.dtype, x.device) for x in leaves], spec)
        else:
            skipped = torch.zeros_like(skipped)
            start = time.perf_counter()
            inputs = dataset.batch(samples, seeds)
            seconds = time.perf_counter() - start
            leaves, spec = tree_flatten(inputs)
            self._items.template = [x[0].detach() for x in leaves], spec
        self._cache.delivered(keys, skipped, int((~skipped).sum()), seconds)
        return inputs, dataset.targets(samples), Keys(keys)

    def _finished(
        self, keys: Tensor, samples: Tensor, seeds: Tensor, skipped: Tensor, found: Any, seconds: float
    ) -> Any:
        """What workers brought and what was kept, as one batch."""
        if isinstance(found, Mapping):
            found = dict(found)
        read = int((~skipped).sum())
        lost = skipped & ~(self._cache.skippable(keys) & self._items.has(keys))
        if lost.any():
            # The store was emptied since: this process reads what is missing. Whole, so that there is one way.
            skipped, found = torch.zeros_like(skipped), self._read(samples, seeds)
            read += len(keys)
        if skipped.any():
            merged = self._items.merge(keys, skipped, found)
            if merged is None:
                skipped, merged = torch.zeros_like(skipped), self._read(samples, seeds)
                read += len(keys)
            found = merged
        else:
            self._items.learn(keys, found)
        self._cache.delivered(keys, skipped, read, seconds)
        return self._with_keys(found, Keys(keys))

    def _read(self, samples: Tensor, seeds: Tensor) -> Any:
        batch = self._collate([self._cache.views.load(*pair) for pair in _pairs(samples, seeds)])
        return dict(batch) if isinstance(batch, Mapping) else batch

    def _with_keys(self, batch: Any, keys: Keys) -> Any:
        if isinstance(batch, Mapping):
            if self.key_name in batch:
                raise ValueError(f"key_name must be new to the batch, which has {', '.join(map(str, batch))}")
            cast("dict", batch)[self.key_name] = keys  # see `_finished`
            return batch
        if isinstance(batch, tuple | list):
            return (*batch, keys)
        return batch, keys


def _pairs(samples: Tensor, seeds: Tensor) -> list[tuple[int, int]]:
    """-> (sample, seed) of each view."""
    return list(zip(samples.tolist(), seeds.tolist(), strict=True))


class _Requests:
    """A batch sampler in the main process: what each batch still needs of its samples."""

    plans: Iterator[list] = iter(())
    length = 0

    def __iter__(self) -> Iterator[list]:
        return self.plans

    def __len__(self) -> int:
        return self.length


class _Requested(Dataset):
    def __init__(self, views: Views) -> None:
        self._views = views

    def __getitem__(self, request: tuple[int, int]) -> Any:
        return self._views.load(*request)


class _Collate:
    def __init__(self, collate: Callable[[list], Any]) -> None:
        self._collate = collate

    def __call__(self, items: list) -> Any:
        return self._collate(items) if items else None


class _Items:
    """The entries of batches that are needed although the features are kept: targets, labels, masks."""

    def __init__(self, cache: Source) -> None:
        self.template: Any = None
        self._cache = cache
        self._store: Store | None = None
        self._kept: list[int] = []  # leaves that are kept; the others are needless
        self._off = False

    def has(self, keys: Tensor) -> Tensor:
        needless = self._needless()
        if self._store is None or needless is None or not needless <= self._without(self._kept):
            return torch.zeros(len(keys), dtype=torch.bool, device="cpu")
        return self._store.has(keys)

    def learn(self, keys: Tensor, batch: Any) -> None:
        """Keeps what later batches will need of these views."""
        if self._off or bool((keys < 0).all()):
            return
        leaves, spec = tree_flatten(batch)
        if not leaves or not all(isinstance(x, Tensor) and x.dim() and len(x) == len(keys) for x in leaves):
            self._off = True  # nothing to take rows of
            return
        if self.template is None:
            self.template = [x[0].detach().clone() for x in leaves], spec
        elif self.template[1] != spec or any(
            x.shape[1:] != like.shape for x, like in zip(leaves, self.template[0], strict=True)
        ):
            # Padded batches and the like: nothing says what a sample that is not read would be padded to.
            self._store, self._off = None, True
            return
        needless = self._needless()
        if needless is None:
            return
        if self._store is None or not needless <= self._without(self._kept):
            self._kept = [i for i in range(len(leaves)) if i not in needless]
            columns = [Column.like(leaves[i]) for i in self._kept]
            self._store = self._cache.item_store(columns, self._cache.views.num_keys)
            self._off = self._store is None
        if self._store is not None:
            kept = keys >= 0
            self._store.put(keys[kept], [leaves[i][kept] for i in self._kept])

    def merge(self, keys: Tensor, skipped: Tensor, found: Any) -> Any | None:
        """What was found, kept entries and poison for the rest, as one batch; None where their shapes differ."""
        template, spec = self.template
        assert self._store is not None  # which has what was skipped
        leaves: list[Any] = [None] * len(template)
        if found is not None:
            leaves, found_spec = tree_flatten(found)
            if found_spec != spec or not all(isinstance(x, Tensor) for x in leaves):
                return None
        rows = dict(zip(self._kept, self._store.gather(keys[skipped]), strict=True))
        whole = []
        for i, (like, some) in enumerate(zip(template, leaves, strict=True)):
            if some is None:
                whole.append(rows[i] if i in rows else poison((len(keys), *like.shape), like.dtype, like.device))
                continue
            if i in rows and some.shape[1:] != like.shape:
                return None
            full = poison((len(keys), *some.shape[1:]), some.dtype, some.device).clone()
            full[~skipped] = some
            if i in rows:
                full[skipped] = rows[i]
            whole.append(full)
        return tree_unflatten(whole, spec)

    def _needless(self) -> set[int] | None:
        """-> the leaves that no forward needs."""
        is_needless = self._cache.needless()
        if self.template is None or is_needless is None:
            return None
        leaves, spec = self.template
        tree = tree_unflatten(list(range(len(leaves))), spec)
        entries = (
            tree.items() if isinstance(tree, Mapping) else enumerate(tree if isinstance(tree, tuple | list) else ())
        )
        return {leaf for place, entry in entries if is_needless(place) for leaf in tree_flatten(entry)[0]}

    def _without(self, kept: list[int]) -> set[int]:
        return set(range(len(self.template[0]))) - set(kept)
