"""Whole image sets on the device: their splits and the tasks of them."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from .batches import generator
from .device_data import DeviceData, uniform
from .nets import find_net, is_papers
from .task import Task

DIGITS_TEST_IMAGES = 450


@dataclass(frozen=True)
class ImageSet:
    """What a set looks like, also where the set itself is missing.

    Attributes:
        shape: (C, H, W) of an image.
        train_images: how many training images the whole set has.
        padding: of the augmentation that suits the set, see `Split`.
        flip: of the augmentation that suits the set, see `Split`.
    """

    shape: tuple[int, int, int]
    num_classes: int
    train_images: int
    padding: int
    flip: bool


SETS = {
    "digits": ImageSet((1, 8, 8), 10, 1347, padding=1, flip=False),
    "cifar10": ImageSet((3, 32, 32), 10, 50_000, padding=4, flip=True),
    "cifar100": ImageSet((3, 32, 32), 100, 50_000, padding=4, flip=True),
}
NAMES = tuple(SETS)


@dataclass(frozen=True, eq=False)
class Split:
    """Images with labels, and how inputs are made of them.

    Attributes:
        mean: of each channel of the training split, with pixels in 0..1.
        std: of each channel of the training split, with pixels in 0..1.
        padding: augmentation shifts images by up to so many pixels.
        flip: whether augmentation may swap left and right.
    """

    images: Tensor  # uint8 [N, C, H, W]
    labels: Tensor  # int64 [N]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    padding: int
    flip: bool

    def __len__(self) -> int:
        return len(self.labels)

    def dataset(self, *, augment: bool = False, size: int | None = None, channels: int | None = None) -> DeviceData:
        """inputs = scaled((crop_flip(images) / 255 - mean) / std), float32 [N, C, H, W].

        Args:
            augment: random shifts, uniform in -padding..padding with a black border, and flips where they suit the set.
            size: side to which the images are scaled; None leaves the images as they are.
            channels: of the inputs; images of one channel are repeated.
        """
        prepare = partial(self._prepared, size=size, channels=channels)
        return DeviceData(self.images, self.labels, augment=self._augmented if augment else None, prepare=prepare)

    def _augmented(self, images: Tensor, seeds: Tensor) -> Tensor:
        draws = uniform(seeds, 3).to(images.device, non_blocking=True)
        top, left = (draws[:, :2] * (2 * self.padding + 1)).long().T
        return _crop_flip(images, top, left, (draws[:, 2] < 0.5) & self.flip, padding=self.padding)

    def _prepared(self, images: Tensor, *, size: int | None, channels: int | None) -> Tensor:
        shape, device = (1, -1, 1, 1), images.device
        offset = (255 * torch.tensor(self.mean, device=device)).view(shape)
        scale = (1 / (255 * torch.tensor(self.std, device=device))).view(shape)
        if channels and channels != images.shape[1]:
            images = images.expand(-1, channels, -1, -1)
        found = images.to(torch.float32).sub_(offset).mul_(scale)
        if size and size != found.shape[2]:
            found = functional.interpolate(found, size=size, mode="bilinear", align_corners=False)
        return found


@dataclass(frozen=True, eq=False)
class DataSplits:
    """The parts of a set.

    Attributes:
        train: the training split.
        val: the validation split; None unless asked for.
        test: the test split.
        num_classes: of the set.
        conditions: one line on what was loaded.
    """

    train: Split
    val: Split | None
    test: Split
    num_classes: int
    conditions: str


def image_task(
    data: DataSplits,
    model: str,
    *,
    augment: bool = True,
    image_size: int | None = None,
    weights: str | None = None,
    name: str = "images",
) -> Task:
    """The task of classifying a set with the net called `model`.

    Args:
        model: see `nets.find_net`.
        augment: whether training images are shifted and, where that suits the set, flipped.
        image_size: side to which the images are scaled; None leaves the images as they are.
        weights: see `nets.find_net`.
    """
    channels, side, _ = data.train.images.shape[1:]
    net = find_net(model, data.num_classes, in_channels=channels, image_size=image_size or side, weights=weights)

    def prepared(split: Split, augment: bool) -> DeviceData:
        if net.mean is not None and net.std is not None:
            split = replace(split, mean=net.mean, std=net.std)
        return split.dataset(augment=augment, size=image_size, channels=net.channels)

    return Task(
        make_model=net.make,
        make_optimizer=_papers_optimizer if is_papers(model) and weights is None else None,
        epochs=30,
        batch_size=64,
        train=prepared(data.train, augment),
        evaluation=prepared(data.test, False),
        validation=None if data.val is None else prepared(data.val, False),
        name=name,
        notes=(data.conditions, *net.notes),
    )


def _papers_optimizer(parameters: Iterable) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-4)


def random_images(name: str, count: int, seed: int = 0, device: str | torch.device = "cpu") -> DataSplits:
    """`count` images of noise in the shape of the set called `name`, for measuring without the set."""
    known, drawn = SETS[name], generator(seed)
    images = torch.randint(256, (count, *known.shape), dtype=torch.uint8, generator=drawn, device="cpu")
    labels = torch.randint(known.num_classes, (count,), generator=drawn, device="cpu")
    half = (0.5,) * known.shape[0]
    split = Split(images.to(device), labels.to(device), half, half, known.padding, known.flip)
    return DataSplits(split, None, split, known.num_classes, f"random images of {name}'s shape")


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

    digits: scikit-learn's 1,797 images [1, 8, 8]. 450 of them, always the same, are the test split. No data_dir is
    needed.
    cifar10, cifar100: see `read_cifar`.

    Args:
        data_dir: the folder that holds cifar-10-batches-py or cifar-100-python.
        download: fetch that folder into data_dir where the folder is missing.
        val_fraction: part of the training images that becomes the validation split, each class in proportion. Above 0
            the split has at least one image.
        seed: draws the validation split.
        device: where the images lie.

    Raises:
        ValueError: an argument is out of its range, or a file is corrupt.
        FileNotFoundError: the folder is missing.
        ConnectionError: the folder cannot be fetched.
        ModuleNotFoundError: digits without scikit-learn, or CIFAR without numpy.
    """
    if name not in NAMES:
        raise ValueError(f"data must be one of {', '.join(NAMES)}, got {name!r}")
    if not 0 <= val_fraction < 1:
        raise ValueError(f"val_fraction must be in [0, 1), got {val_fraction}")
    if name == "digits":
        (images, labels), test, source = _read_digits()
    else:
        try:
            from .cifar import read_cifar
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(f"{name} needs numpy, found none: pip install 'freezeout_ext[train]'") from error
        (images, labels), test, source = read_cifar(name, data_dir, download=download)
    held = torch.zeros(len(labels), dtype=torch.bool, device="cpu")
    if val_fraction:
        count = max(1, round(val_fraction * len(labels)))
        if count == len(labels):
            raise ValueError(f"val_fraction must leave a training image of {len(labels)}, got {val_fraction}")
        held = _held_out(labels, count, seed)
    mean, std = _statistics(images[~held])

    def split(images: Tensor, labels: Tensor) -> Split:
        return Split(images.to(device), labels.to(device), mean, std, SETS[name].padding, SETS[name].flip)

    train = split(images[~held], labels[~held])
    val = split(images[held], labels[held]) if val_fraction else None
    counts = f"{len(train):,} train + " + (f"{len(val):,} val + " if val else "") + f"{len(test[1]):,} test images"
    return DataSplits(train, val, split(*test), SETS[name].num_classes, f"{name}: {counts}, {source}")


def _crop_flip(images: Tensor, top: Tensor, left: Tensor, flip: Tensor, *, padding: int) -> Tensor:
    """y[n, :, h, w] = pad(x)[n, :, top_n + h, left_n + w], then w reversed where flip_n.

    Shapes: images [N, C, H, W]; top, left int64 [N] in 0..2 * padding, flip bool [N].
    """
    height, width = images.shape[2:]
    # A view of all crops, [N, C, 2 * padding + 1, 2 * padding + 1, H, W]. Indexing copies one crop of each image.
    crops = functional.pad(images, (padding,) * 4).unfold(2, height, 1).unfold(3, width, 1)
    chosen = crops[torch.arange(len(images), device=images.device), :, top, left]
    return torch.where(flip.view(-1, 1, 1, 1), chosen.flip(3), chosen)


def _held_out(labels: Tensor, count: int, seed: int) -> Tensor:
    """Mask [N] of `count` images drawn by seed, each class in proportion (largest remainders)."""
    order = torch.randperm(len(labels), generator=generator(seed), device="cpu")
    share = torch.bincount(labels) * count
    quota = share // len(labels)
    quota[(share % len(labels)).argsort(descending=True, stable=True)[: count - int(quota.sum())]] += 1
    held = torch.zeros(len(labels), dtype=torch.bool, device="cpu")
    for label, wanted in enumerate(quota.tolist()):
        held[order[labels[order] == label][:wanted]] = True
    return held


def _statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel, pixels in 0..1: uint8 [N, C, H, W] -> C numbers each."""
    values = torch.arange(256, dtype=torch.float64, device="cpu") / 255
    # Counting the pixels of each value is exact, and needs no float copy of the set.
    counts = torch.stack([torch.bincount(channel.flatten(), minlength=256) for channel in images.unbind(1)])
    weights = counts / counts.sum(1, keepdim=True, dtype=torch.float64)
    mean = weights @ values
    variance = (weights * (values - mean[:, None]).square()).sum(1)
    # A channel with one value only has a std of 0, and is not scaled.
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
    # Pixels are 0..16. Times 15 they span a byte and stay exact.
    images = torch.from_numpy(digits.images).mul(15).to(torch.uint8).unsqueeze(1)
    labels = torch.from_numpy(digits.target).to(torch.int64)
    test = _held_out(labels, DIGITS_TEST_IMAGES, seed=0)
    source = f"scikit-learn {sklearn.__version__}"
    return (images[~test], labels[~test]), (images[test], labels[test]), source
