"""Parts: what torch's DataLoader is made of, for views that are asked for, and for the batches of a CacheLoader."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

from torch.utils.data import Dataset

from .views import Views


class Numbered(Protocol):
    """A loader whose batches have numbers within an epoch, see `CacheLoader`."""

    epoch: int
    batch_size: int
    drop_last: bool

    @property
    def num_samples(self) -> int: ...

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator: ...

    def set_epoch(self, epoch: int) -> None: ...

    def load_state_dict(self, state_dict: Mapping) -> None: ...


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

    def __init__(self, loader: Numbered) -> None:
        self._loader, self._made = loader, iter(())
        self._next = -1

    def __len__(self) -> int:
        return self._loader.num_samples

    def __getitem__(self, step: int) -> Any:
        if step != self._next:
            self._loader.load_state_dict({"epoch": self._loader.epoch, "step": step})
            self._made = iter(self._loader)
        self._next = step + 1
        return next(self._made)


class Numbers:
    """The numbers of a loader's batches, each a batch of its own."""

    def __init__(self, loader: Numbered) -> None:
        self._loader, self.set_epoch = loader, loader.set_epoch
        self.batch_size, self.drop_last = loader.batch_size, loader.drop_last

    def __iter__(self) -> Iterator[list[int]]:
        return iter([i] for i in range(len(self._loader)))

    def __len__(self) -> int:
        return len(self._loader)


class Requested(Dataset):
    """The views that are asked for, (sample, seed) each."""

    def __init__(self, views: Views) -> None:
        self._views = views

    def __getitem__(self, request: tuple[int, int]) -> Any:
        return self._views.load(*request)


class Collate:
    """A batch of what was read; None where nothing was."""

    def __init__(self, collate: Callable[[list], Any]) -> None:
        self._collate = collate

    def __call__(self, items: list) -> Any:
        return self._collate(items) if items else None
