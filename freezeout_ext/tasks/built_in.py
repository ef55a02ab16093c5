"""built_in: the tasks that have a name. These are digits, CIFAR-10, CIFAR-100 and a folder of images."""

from collections.abc import Callable
from pathlib import Path

import torch

from . import images
from .image_folder import image_folder_task
from .task import Task

FOLDER = "imagefolder"
DATA = (*images.NAMES, FOLDER)


def built_in(
    data: str,
    model: str,
    *,
    data_dir: str | Path | None = None,
    download: bool = False,
    val_fraction: float = 0.0,
    seed: int = 0,
    device: str | torch.device = "cpu",
    augment: bool = True,
    image_size: int | None = None,
    weights: str | None = None,
    workers: int | None = None,
    skip_broken: bool = False,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Task:
    """The task of training the net called `model` on the data called `data`.

    Args:
        data: one of DATA.
        model: see `nets.find_net`.
        data_dir: see `images.load_data` and `image_folder_task`.
        download: see `images.load_data`.
        val_fraction: see `images.load_data` and `image_folder_task`.
        seed: of the split.
        device: where whole sets lie. A folder's images are read batch by batch.
        augment: see `images.image_task` and `image_folder_task`.
        image_size: side of the inputs. Default: 224 for a folder; other sets keep theirs.
        weights: see `nets.find_net`.
        workers: of a folder, see `image_folder_task`.
        skip_broken: of a folder, see `image_folder_task`.
        on_progress: of a folder, see `image_folder_task`.

    Raises:
        ValueError, OSError, ImportError: one sentence on what is wrong with the data or the net.
    """
    if data not in DATA:
        raise ValueError(f"data must be one of {', '.join(DATA)}, got {data!r}")
    if data == FOLDER:
        return image_folder_task(
            data_dir,
            model,
            image_size=image_size or 224,
            weights=weights,
            val_fraction=val_fraction,
            seed=seed,
            augment=augment,
            workers=workers,
            skip_broken=skip_broken,
            on_progress=on_progress,
        )
    found = images.load_data(data, data_dir, download=download, val_fraction=val_fraction, seed=seed, device=device)
    return images.image_task(found, model, augment=augment, image_size=image_size, weights=weights, name=data)
