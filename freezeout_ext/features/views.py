"""Views: a map-style dataset and its random augmentation become K fixed views of each sample."""

import hashlib
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.data import IterableDataset

from ..arguments import check_count
from ..torch_state import seeded

# The most views with "auto". No measurement has shown that more views bring anything.
MOST_VIEWS = 8
# The seed of the view by which a data set is known.
PROBE = 20170603


@runtime_checkable
class BatchDataset(Protocol):
    """A data set that makes whole batches, such as images that lie on the device as uint8 and are augmented there."""

    def __len__(self) -> int:
        """-> N, the number of samples."""

    def batch(self, samples: Tensor, seeds: Tensor) -> Any:
        """inputs[b] = augmented(sample samples[b]), all of its randomness a function of seeds[b] alone.

        Shapes: samples, seeds int64 [B] on the CPU, seeds in 0..2**63 - 1.
        """

    def targets(self, samples: Tensor) -> Any:
        """-> the targets of the samples [B], which no augmentation changes."""


class Views:
    """Which views there are, which view an epoch shows, and from which seed each view is drawn.

    The key of a kept view is sample * stride + view.
    The key of a fresh view, which is never kept, is -1 - sample.

    Args:
        dataset: map-style, or a `BatchDataset`.
        views: of each sample, K; "auto": 1 until `decide` was called.
        seed: of all views.

    Attributes:
        count: K.
        stride: between the keys of two samples. No decision changes the stride.
        first_epoch: the epoch that kept the first views, where K is to be decided.
    """

    def __init__(self, dataset: Any, views: int | str, seed: int) -> None:
        if isinstance(dataset, IterableDataset | type) or not hasattr(dataset, "__len__"):
            raise TypeError(
                "dataset must be map-style (dataset[i] and len(dataset)): features are kept by sample, and iterable "
                f"data has no samples to name; got a {type(dataset).__name__}"
            )
        self.batched = isinstance(dataset, BatchDataset)
        if not self.batched and not hasattr(dataset, "__getitem__"):
            raise TypeError(f"dataset must have __getitem__, got a {type(dataset).__name__}")
        self.auto = isinstance(views, str)
        if not isinstance(views, str):
            check_count("views", views, 1, 2**62 // max(len(dataset), 1))  # keys are int64
        elif views != "auto":
            raise ValueError(f"views must be a whole number or 'auto', got {views!r}")
        self.dataset, self.seed = dataset, seed
        self.count, self.stride = (1, MOST_VIEWS) if isinstance(views, str) else (views, views)
        self.decided = not self.auto
        self.first_epoch: int | None = None
        self.num_samples = len(dataset)
        self._checked = False

    @property
    def num_keys(self) -> int:
        return self.num_samples * self.stride

    @property
    def asked(self) -> int | str:
        """What was asked for: K, or "auto"."""
        return "auto" if self.auto else self.count

    def decide(self, count: int) -> None:
        """K = count from now on."""
        self.count, self.decided = count, True

    def keys(self, samples: Tensor, epoch: int) -> Tensor:
        """The key of the view that this epoch shows, for each sample. Views take turns and differ among samples.

        With "auto" an epoch shows the view of the same number for all samples, so that any K includes the first views.
        """
        turn = epoch - (self.first_epoch or 0) if self.auto else samples + epoch
        return samples * self.stride + turn % self.count

    def samples(self, keys: Tensor) -> Tensor:
        """-> the samples of keys, those of fresh views included."""
        return torch.where(keys < 0, -1 - keys, keys.div(self.stride, rounding_mode="floor"))

    def seeds(self, keys: Tensor, epoch: int) -> Tensor:
        """seeds[b] = hash(seed, sample, view). A fresh view's number is its epoch, counted on from all kept views."""
        views = torch.where(keys < 0, self.stride + epoch, keys % self.stride)
        return _mix(_mix(_mix(torch.full_like(keys, self.seed)) ^ self.samples(keys)) ^ views) & (2**63 - 1)

    def __getitem__(self, view: tuple[int, int]) -> Any:
        """dataset[sample] of a view (sample, seed) with all generators seeded by `seed`, and restored afterwards."""
        sample, seed = view
        with seeded(seed):
            return self.dataset[sample]

    def digest(self) -> str:
        """-> a hash of one sample's view, by which another data set of the same length is noticed."""
        self.check()
        if self.batched:
            return _digest(self.dataset.batch(*torch.tensor([[0], [PROBE]], device="cpu")))
        return _digest(self[0, PROBE])

    def check(self) -> None:
        """Reads one sample twice with the same seeds, once.

        Raises:
            ValueError: the two differ, or the data set is no longer as long as it was.
        """
        if len(self.dataset) != self.num_samples:
            raise ValueError(
                f"dataset must keep its length, it had {self.num_samples} samples and has {len(self.dataset)} now: "
                "make a new cache"
            )
        if self.batched or not self.num_samples or self._checked:
            return
        self._checked = True
        first = _digest(self[0, PROBE])
        self[self.num_samples - 1, PROBE]
        if first != _digest(self[0, PROBE]):
            raise ValueError(
                "dataset[0] must be the same in two reads from the same seeds of torch, numpy and random; the two "
                "differ. Does its augmentation draw from a generator of its own? Features of such views cannot be kept"
            )


def rank_and_processes() -> tuple[int, int]:
    """-> this process's rank, and how many processes there are, by torch.distributed."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return 0, 1
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def order_seed(seed: int, epoch: int) -> int:
    """-> the seed of an epoch's order."""
    return int(_mix(_mix(torch.tensor(seed, device="cpu")) ^ epoch) & (2**63 - 1))


def _mix(x: Tensor) -> Tensor:
    """splitmix64's finalizer, on int64 that wraps. Source: Steele, Lea, Flood 2014, doi 10.1145/2660193.2660195."""
    x = x + -7046029254386353131  # 0x9E3779B97F4A7C15
    x = (x ^ _shifted(x, 30)) * -4658895280553007687  # 0xBF58476D1CE4E5B9
    x = (x ^ _shifted(x, 27)) * -7723592293110705685  # 0x94D049BB133111EB
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & (2 ** (64 - bits) - 1)  # >> copies the sign


def _digest(item: Any) -> str:
    """-> a hash of the values of an item. Of an object that shows none its kind counts."""
    digest = hashlib.sha256()
    for leaf in tree_leaves(item):
        if isinstance(leaf, Tensor):
            leaf = leaf.detach().cpu().contiguous().tolist()
        shows = type(leaf).__repr__ is not object.__repr__
        said = leaf.tobytes() if hasattr(leaf, "tobytes") else repr(leaf if shows else type(leaf)).encode()
        digest.update(said)
    return digest.hexdigest()
