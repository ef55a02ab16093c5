"""Whole image sets on the device: splits, and batches cropped, flipped and normalised there."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

NAMES = ("digits", "cifar10", "cifar100")
DIGITS_TEST_IMAGES = 450


@dataclass(frozen=True, eq=False)
class Split:
    """Images with labels, and how `batches` makes inputs of them.

    mean and std, one a channel, are those of the training split with pixels in 0..1; padding and flip are the
    augmentation that suits the set: shifts of up to `padding` pixels, and whether left and right may be swapped.
    """

    images: Tensor  # uint8 [N, C, H, W]
    labels: Tensor  # int64 [N]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    padding: int
    flip: bool

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True, eq=False)
class DataSplits:
    """The parts of a set. val is None unless asked for; conditions says what was loaded, in one line."""

    train: Split
    val: Split | None
    test: Split
    num_classes: int
    conditions: str

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return tuple(self.train.images.shape[1:])


def load_data(
    name: str,
    data_dir: str | Path | None = None,
    *,
    download: bool = False,
    val_fraction: float = 0.0,
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> DataSplits:
    """The set called `name` on `device`, as uint8.

    digits: scikit-learn's 1,797 images [1, 8, 8], of which 450, always the same, are the test split; needs no
    data_dir. cifar10, cifar100: see `read_cifar`.

    Args:
        data_dir: the folder that holds cifar-10-batches-py or cifar-100-python.
        download: fetch that folder into data_dir where it is missing.
        val_fraction: part of the training images that become the validation split, at least one image, each class
            in proportion, drawn by `seed`.

    Raises:
        ValueError: an argument out of its range; a corrupt file.
        FileNotFoundError, ConnectionError: the folder is missing, or cannot be fetched.
        ModuleNotFoundError: digits without scikit-learn, CIFAR without numpy.
    """
    if name not in NAMES:
        raise ValueError(f"data must be one of {', '.join(NAMES)}, got {name!r}")
    if not 0 <= val_fraction < 1:
        raise ValueError(f"val_fraction must be in [0, 1), got {val_fraction}")
    if name == "digits":
        (images, labels), test, source = _read_digits()
        num_classes, padding, flip = 10, 1, False
    else:
        try:
            from .cifar import SETS, read_cifar
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(f"{name} needs numpy, found none: pip install 'freezeout_ext[train]'") from error
        (images, labels), test, source = read_cifar(name, data_dir, download=download)
        num_classes, padding, flip = SETS[name].num_classes, 4, True
    held = torch.zeros(len(labels), dtype=torch.bool)
    if val_fraction:
        count = max(1, round(val_fraction * len(labels)))
        if count == len(labels):
            raise ValueError(f"val_fraction must leave a training image of {len(labels)}, got {val_fraction}")
        held = _held_out(labels, count, seed)
    mean, std = _statistics(images[~held])

    def split(images: Tensor, labels: Tensor) -> Split:
        return Split(images.to(device), labels.to(device), mean, std, padding, flip)

    train = split(images[~held], labels[~held])
    val = split(images[held], labels[held]) if val_fraction else None
    counts = f"{len(train):,} train + " + (f"{len(val):,} val + " if val else "") + f"{len(test[1]):,} test images"
    return DataSplits(train, val, split(*test), num_classes, f"{name}: {counts}, {source}")


def batches(
    split: Split,
    batch_size: int,
    *,
    shuffle: bool = False,
    augment: bool = False,
    seed: int = 0,
    epoch: int = 0,
    first_step: int = 0,
    drop_last: bool = False,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields (inputs, targets): inputs = (crop_flip(images) / 255 - mean) / std.

    Order, shifts and flips are a function of (seed, epoch) alone, on any device, so a run can go on at any step.
    Shifts are uniform in -padding..padding, the border is black.

    Shapes: inputs float32 [B, C, H, W], targets int64 [B], on the split's device; the last batch may be smaller.

    Args:
        shuffle: a new order each epoch; else that of the split.
        augment: random shifts, and flips where they suit the set.
        first_step: batches of this epoch to leave out, for resuming within it.
        drop_last: leave out a last batch smaller than batch_size.

    Raises:
        ValueError: batch_size < 1 or first_step < 0.
    """
    for name, value, least in (("batch_size", batch_size, 1), ("first_step", first_step, 0)):
        if value < least:
            raise ValueError(f"{name} must be >= {least}, got {value}")
    return _batches(split, batch_size, shuffle, augment, _generator(seed, epoch), first_step, drop_last)


def _batches(split, batch_size, shuffle, augment, generator, first_step, drop_last):
    n, padding, device = len(split), split.padding, split.images.device
    # All of the epoch at once: one copy to the device, and every draw is made whatever is used of it.
    order = torch.randperm(n, generator=generator) if shuffle else torch.arange(n)
    shifts = torch.randint(2 * padding + 1, (2, n), generator=generator)
    flips = torch.randint(2, (n,), generator=generator).bool() & split.flip
    order, shifts, flips = order.to(device), shifts.to(device), flips.to(device)
    shape = (1, -1, 1, 1)
    offset = (255 * torch.tensor(split.mean, device=device)).view(shape)
    scale = (1 / (255 * torch.tensor(split.std, device=device))).view(shape)
    end = n - n % batch_size if drop_last else n
    for start in range(first_step * batch_size, end, batch_size):
        where = slice(start, start + batch_size)
        images = split.images[order[where]]
        if augment:
            images = _crop_flip(images, *shifts[:, where], flips[where], padding=padding)
        yield images.to(torch.float32).sub_(offset).mul_(scale), split.labels[order[where]]


def _crop_flip(images: Tensor, top: Tensor, left: Tensor, flip: Tensor, *, padding: int) -> Tensor:
    """y[n, :, h, w] = pad(x)[n, :, top_n + h, left_n + w], then w reversed where flip_n.

    Shapes: images [N, C, H, W]; top, left int64 [N] in 0..2 * padding, flip bool [N].
    """
    height, width = images.shape[2:]
    # A view of all crops, [N, C, 2 * padding + 1, 2 * padding + 1, H, W]; the indexing copies one for each image.
    crops = functional.pad(images, (padding,) * 4).unfold(2, height, 1).unfold(3, width, 1)
    chosen = crops[torch.arange(len(images), device=images.device), :, top, left]
    return torch.where(flip.view(-1, 1, 1, 1), chosen.flip(3), chosen)


def _generator(*seeds: int) -> torch.Generator:
    # Hashed, so that neighbouring seeds and epochs do not share streams.
    digest = hashlib.sha256(repr(seeds).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))


def _held_out(labels: Tensor, count: int, seed: int) -> Tensor:
    """Mask [N] of `count` images drawn by seed, each class in proportion (largest remainders)."""
    order = torch.randperm(len(labels), generator=_generator(seed))
    share = torch.bincount(labels) * count
    quota = share // len(labels)
    quota[(share % len(labels)).argsort(descending=True, stable=True)[: count - int(quota.sum())]] += 1
    held = torch.zeros(len(labels), dtype=torch.bool)
    for label, wanted in enumerate(quota.tolist()):
        held[order[labels[order] == label][:wanted]] = True
    return held


def _statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel, pixels in 0..1: uint8 [N, C, H, W] -> C numbers each."""
    values = torch.arange(256, dtype=torch.float64) / 255
    # From counts: exact, and no float copy of the set.
    counts = torch.stack([torch.bincount(channel.flatten(), minlength=256) for channel in images.unbind(1)])
    weights = counts / counts.sum(1, keepdim=True, dtype=torch.float64)
    mean = weights @ values
    variance = (weights * (values - mean[:, None]).square()).sum(1)
    # A channel of one value has nothing to scale.
    std = variance.sqrt().where(variance > 0, 1.0)
    return tuple(mean.tolist()), tuple(std.tolist())


def _read_digits() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], str]:
    try:
        import sklearn
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        message = "digits needs scikit-learn, found none: pip install 'freezeout_ext[train]'"
        raise ModuleNotFoundError(message) from error
    digits = load_digits()
    # Pixels are 0..16; times 15 they fill a byte and stay exact.
    images = torch.from_numpy(digits.images).mul(15).to(torch.uint8).unsqueeze(1)
    labels = torch.from_numpy(digits.target).to(torch.int64)
    test = _held_out(labels, DIGITS_TEST_IMAGES, seed=0)
    source = f"scikit-learn {sklearn.__version__}"
    return (images[~test], labels[~test]), (images[test], labels[test]), source
