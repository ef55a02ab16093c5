"""A folder of images as a task: its subfolders are the classes; train/ and val/, or a split by seed."""

import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from ..arguments import check_count
from .batches import generator
from .nets import find_net
from .task import Task

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm")
# ImageNet's mean and std, with which the inputs of most pretrained nets were normalised.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
EVALUATION_FRACTION = 0.2  # where there is no val/
# From torch's and timm's recipes: an eighth of an image's side is cut off in evaluation, and a crop of a training image
# keeps at least LEAST_AREA of the image's area.
MARGIN = 256 / 224
LEAST_AREA = 0.35


class ImageFiles:
    """Map-style dataset of (input float32 [3, size, size], class) from image files, by Pillow.

    Args:
        augmented: whether a random crop, scaled, and a flip are drawn from torch's generator; else the middle is taken.
    """

    def __init__(
        self,
        files: Sequence[tuple[Path, int]],
        size: int,
        *,
        augmented: bool,
        mean: Sequence[float] = MEAN,
        std: Sequence[float] = STD,
    ) -> None:
        self.files, self.size, self.augmented = list(files), size, augmented
        self._mean, self._std = (torch.tensor(values, device="cpu").view(3, 1, 1) for values in (mean, std))

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        from PIL import Image

        path, label = self.files[i]
        image = opened(path, self.size)
        width, height = image.size
        box = _random_box(width, height) if self.augmented else _middle(width, height)
        image = image.resize((self.size, self.size), Image.Resampling.BILINEAR, box=box)
        pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
        pixels = pixels.view(self.size, self.size, 3).permute(2, 0, 1).float().div_(255)
        if self.augmented and torch.rand((), device="cpu") < 0.5:
            pixels = pixels.flip(2)
        return pixels.sub(self._mean).div_(self._std).contiguous(), label


def opened(path: Path, size: int):
    """The decoded image as RGB of 8 bits, turned as its EXIF says.

    A JPEG is decoded at a scale not far above `size`.
    Of pixels with 16 bits the upper 8 bits are taken.

    Raises:
        ValueError: the file is broken, is no image, or has pixels of 32 bits. The error names the file.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as file:
            file.draft("RGB", (2 * size, 2 * size))
            image = ImageOps.exif_transpose(file)
            if image.mode.startswith("I;16") or (image.mode == "I" and file.format == "PNG"):
                # Pillow would clip all values above 255.
                image = image.convert("I").point(lambda value: value * (1 / 256)).convert("L")
            if image.mode in ("I", "F"):
                raise ValueError("pixels of 32 bits do not say which values are black and white")
            return image.convert("RGB")
    except Exception as error:  # a broken file raises whatever its decoder raises
        raise ValueError(f"{path} must be an image, it cannot be read: {' '.join(str(error).split())}") from None


def image_folder_task(
    data_dir: str | Path | None,
    model: str,
    *,
    image_size: int = 224,
    weights: str | None = None,
    val_fraction: float = 0.0,
    seed: int = 0,
    augment: bool = True,
    workers: int | None = None,
    skip_broken: bool = False,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Task:
    """The task of classifying the images below data_dir.

    The images are data_dir/train/CLASS/* and data_dir/val/CLASS/* (or test/), or data_dir/CLASS/*.
    In the last case a fifth, drawn by `seed` and each class in proportion, is the evaluation.
    Folders below a class belong to the class. Files and folders whose names begin with a dot are left out.

    Args:
        data_dir: the folder.
        model: see `nets.find_net`.
        image_size: side of the inputs.
        weights: see `nets.find_net`.
        val_fraction: part of the training images that chooses best.pt.
        seed: of the splits.
        augment: whether training images are cropped and flipped at random.
        workers: processes that read images. None: one for each core but one, at most 8.
        skip_broken: leave out files that cannot be read; else such a file is an error. All files are tried first.
        on_progress: called with (files tried, files) after each file.

    Raises:
        ValueError: data_dir is no such folder, or holds files that cannot be read. The error names them.
        ModuleNotFoundError: Pillow is missing.
    """
    if data_dir is None:
        raise ValueError("data_dir must be the folder whose subfolders are the classes, got None")
    check_count("image_size", image_size, 8)
    try:
        import PIL  # noqa: F401
    except ImportError:
        raise ModuleNotFoundError("imagefolder needs Pillow: pip install 'freezeout_ext[train]'") from None
    root = Path(data_dir)
    notes: list[str] = []
    train, evaluation, classes = _splits(root, seed)
    net = find_net(model, len(classes), image_size=image_size, weights=weights)  # before all files are tried
    train, evaluation = _readable(root, train, evaluation, image_size, skip_broken, notes, on_progress)
    validation: Files = []
    if val_fraction:
        train, validation = _divided(train, val_fraction, len(classes), seed + 1)
    if not evaluation:
        raise ValueError(f"data_dir must hold images for the evaluation, {root} has none")
    if empty := sorted({*range(len(classes))} - {label for _, label in train}):
        raise ValueError(f"data_dir must hold a training image of each class, {root} has none of {classes[empty[0]]}")
    statistics = {"mean": net.mean or MEAN, "std": net.std or STD}

    def dataset(files: list, augmented: bool) -> ImageFiles:
        return ImageFiles(files, image_size, augmented=augmented, **statistics)

    counts = f"{len(train):,} train + " + (f"{len(validation):,} val + " if validation else "")
    return Task(
        make_model=net.make,
        train=dataset(train, augment),
        evaluation=dataset(evaluation, False),
        validation=dataset(validation, False) if validation else None,
        workers=_workers() if workers is None else workers,
        name=root.resolve().name,
        notes=(f"{root}: {counts}{len(evaluation):,} test images of {len(classes)} classes", *notes, *net.notes),
    )


def _workers() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(8, cores - 1)


Files = list[tuple[Path, int]]


def _splits(root: Path, seed: int) -> tuple[Files, Files, list[str]]:
    if not root.is_dir():
        raise ValueError(f"data_dir must be a folder, {root} is none")
    if (root / "train").is_dir():
        judged = next((root / name for name in ("val", "valid", "test") if (root / name).is_dir()), None)
        classes = _classes(root / "train")
        train = _files(root / "train", classes)
        if judged is None:
            return *_divided(train, EVALUATION_FRACTION, len(classes), seed), classes
        if odd := set(_classes(judged)) - set(classes):
            raise ValueError(f"{judged} must have the classes of train, it also has {', '.join(sorted(odd)[:3])}")
        return train, _files(judged, classes), classes
    classes = _classes(root)
    return *_divided(_files(root, classes), EVALUATION_FRACTION, len(classes), seed), classes


def _classes(folder: Path) -> list[str]:
    found = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if len(found) < 2:
        raise ValueError(f"{folder} must have a subfolder for each of at least two classes, it has {len(found)}")
    return found


def _files(folder: Path, classes: list[str]) -> Files:
    found: Files = []
    for label, name in enumerate(classes):
        there = sorted(path for path in (folder / name).rglob("*") if path.suffix.lower() in SUFFIXES)
        found += [(path, label) for path in there if path.is_file() and not _is_hidden(path.relative_to(folder))]
    return found


def _is_hidden(path: Path) -> bool:
    """Whether the path's name, or that of a folder on the path, begins with a dot.

    On a foreign disk macOS puts such a file beside each file.
    """
    return any(part.startswith(".") for part in path.parts)


def _divided(files: Files, fraction: float, num_classes: int, seed: int) -> tuple[Files, Files]:
    """(the rest, a part): the part holds `fraction` of each class, drawn by seed.

    A class of two or more files has at least one file in each. A class of one file has it in the rest.
    """
    rest: Files = []
    part: Files = []
    for label in range(num_classes):
        own = [file for file in files if file[1] == label]
        order = torch.randperm(len(own), generator=generator(seed, label), device="cpu").tolist()
        count = min(max(1, round(fraction * len(own))), len(own) - 1) if own else 0
        drawn = set(order[:count])
        part += [file for k, file in enumerate(own) if k in drawn]
        rest += [file for k, file in enumerate(own) if k not in drawn]
    return rest, part


def _readable(
    root: Path,
    train: Files,
    evaluation: Files,
    size: int,
    skip: bool,
    notes: list[str],
    on_progress: Callable[[int, int], None],
) -> tuple[Files, Files]:
    """(train, evaluation), without the files that cannot be read where `skip` is true.

    Raises:
        ValueError: a file cannot be read and `skip` is false.
    """

    def fault(file: tuple[Path, int]) -> str | None:
        try:
            opened(file[0], size)
        except ValueError as error:
            return str(error)
        return None

    files, found = train + evaluation, {}
    with ThreadPoolExecutor() as pool:  # decoders leave Python's lock
        for file, reason in zip(files, pool.map(fault, files), strict=True):
            found[file] = reason
            on_progress(len(found), len(files))
    broken = [file for file, reason in found.items() if reason]
    if broken and not skip:
        more = f" (and {len(broken) - 1} more of {len(found)})" if len(broken) > 1 else ""
        raise ValueError(f"{found[broken[0]]}{more}; skip_broken (--skip-broken) leaves such files out")
    if broken:
        names = ", ".join(str(path.relative_to(root)) for path, _ in broken[:5])
        more = f" and {len(broken) - 5} more" if len(broken) > 5 else ""
        notes.append(f"left out, {len(broken)} of {len(found)} files cannot be read: {names}{more}")
    return [file for file in train if not found[file]], [file for file in evaluation if not found[file]]


def _random_box(width: int, height: int) -> tuple[float, float, float, float]:
    """A random crop. Its area is LEAST_AREA..1 of the image's, and the ratio of its sides is between 3:4 and 4:3."""
    area = (LEAST_AREA + (1 - LEAST_AREA) * torch.rand((), device="cpu").item()) * width * height
    ratio = math.exp((2 * torch.rand((), device="cpu").item() - 1) * math.log(4 / 3))
    w, h = min(width, math.sqrt(area * ratio)), min(height, math.sqrt(area / ratio))
    left, top = (torch.rand(2, device="cpu") * torch.tensor([width - w, height - h], device="cpu")).tolist()
    return left, top, left + w, top + h


def _middle(width: int, height: int) -> tuple[float, float, float, float]:
    side = min(width, height) / MARGIN
    return (width - side) / 2, (height - side) / 2, (width + side) / 2, (height + side) / 2
