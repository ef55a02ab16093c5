"""CIFAR-10 and CIFAR-100 from the official python-version folders (https://www.cs.toronto.edu/~kriz/cifar.html)."""

import hashlib
import http.client
import io
import os
import pickle
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Cifar:
    """One official set: where it comes from and its files, each name with its size in bytes and md5."""

    folder: str
    url: str
    archive_md5: str
    meta: str
    labels: str
    num_classes: int
    train: dict[str, tuple[int, str]]
    test: dict[str, tuple[int, str]]


SETS = {
    "cifar10": Cifar(
        folder="cifar-10-batches-py",
        url="https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
        archive_md5="c58f30108f718f92721af3b95e74349a",
        meta="batches.meta",
        labels="labels",
        num_classes=10,
        train={
            "data_batch_1": (31_035_704, "c99cafc152244af753f735de768cd75f"),
            "data_batch_2": (31_035_320, "d4bba439e000b95fd0a9bffe97cbabec"),
            "data_batch_3": (31_035_999, "54ebc095f3ab1f0389bbae665268c751"),
            "data_batch_4": (31_035_696, "634d18415352ddfa80567beed471001a"),
            "data_batch_5": (31_035_623, "482c414d41f54cd18b22e5b47cb7c3cb"),
        },
        test={"test_batch": (31_035_526, "40351d587109b95175f43aff81a1287e")},
    ),
    "cifar100": Cifar(
        folder="cifar-100-python",
        url="https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
        archive_md5="eb9058c3a382ffc7106e4002c42a8d85",
        meta="meta",
        labels="fine_labels",
        num_classes=100,
        train={"train": (155_249_918, "16019d7e3df5f24257cddd939b257f8d")},
        test={"test": (31_049_707, "f0ef6b0ae62326f3e7ffdfab6717acfc")},
    ),
}
TRAIN_IMAGES, TEST_IMAGES = 50_000, 10_000
ROW_BYTES = 3 * 32 * 32

Images = tuple[Tensor, Tensor]  # uint8 [N, 3, 32, 32], int64 [N]


def read_cifar(name: str, data_dir: str | Path | None, *, download: bool = False) -> tuple[Images, Images, str]:
    """(train, test, what they are) of data_dir's official folder. Train and test are (images, labels) in file order.

    A file of the official size must have the official md5.
    A file of another size, such as a subset, is taken as it is. The third value says that it was not checked.

    Shapes: images uint8 [N, 3, 32, 32], labels int64 [N].

    Raises:
        ValueError: data_dir is None, or a file is damaged or holds something else.
        FileNotFoundError: the folder or one of its files is missing.
        ConnectionError: the download failed.
    """
    cifar = SETS[name]
    if data_dir is None:
        raise ValueError(f"data_dir must be the folder that holds {cifar.folder} for {name}, got None")
    folder = Path(data_dir) / cifar.folder
    if download and not folder.exists():
        _download(cifar, Path(data_dir))
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{name} needs the official folder {folder}, found none: give the folder that holds {cifar.folder}, "
            f"or fetch it with --download"
        )
    missing = [file for file in (*cifar.train, *cifar.test) if not (folder / file).is_file()]
    if missing:
        raise FileNotFoundError(f"{name} needs {', '.join(missing)} in {folder}, found no such file")
    train, train_checked = _read_split(cifar, folder, cifar.train)
    test, test_checked = _read_split(cifar, folder, cifar.test)
    if train_checked and test_checked:
        return train, test, "md5-checked"
    images = len(train[1]) + len(test[1])
    whole = (len(train[1]), len(test[1])) == (TRAIN_IMAGES, TEST_IMAGES)
    return train, test, f"{'complete' if whole else 'subset'} ({images:,} images), not md5-checked"


def _read_split(cifar: Cifar, folder: Path, files: dict[str, tuple[int, str]]) -> tuple[Images, bool]:
    parts, checked = [], True
    for name, (size, md5) in files.items():
        path = folder / name
        content = path.read_bytes()
        official = len(content) == size
        if official and (found := hashlib.md5(content, usedforsecurity=False).hexdigest()) != md5:
            raise ValueError(f"{path} must have md5 {md5}, got {found}: the file is corrupt, fetch the folder anew")
        checked &= official
        parts.append(_parse(cifar, path, content))
    images, labels = zip(*parts, strict=True)
    return (torch.from_numpy(np.concatenate(images)), torch.from_numpy(np.concatenate(labels))), checked


def _parse(cifar: Cifar, path: Path, content: bytes) -> tuple[np.ndarray, np.ndarray]:
    try:
        loaded = _ArrayUnpickler(content).load()
    # A broken pickle raises whatever error the operation raises at which loading breaks.
    except Exception as error:
        raise ValueError(f"{path} must be a pickle of arrays and lists, it does not load: {error}") from None
    if not isinstance(loaded, dict):
        raise ValueError(f"{path} must hold a dict, got {type(loaded).__name__}")
    fields = {key.decode("latin1") if isinstance(key, bytes) else key: value for key, value in loaded.items()}
    for key in ("data", cifar.labels):
        if key not in fields:
            raise ValueError(f"{path} must have the key {key}, got {', '.join(map(str, fields)) or 'none'}")
    images = fields["data"]
    if not isinstance(images, np.ndarray) or images.dtype != np.uint8 or images.shape != (len(images), ROW_BYTES):
        found = f"{images.dtype} {list(images.shape)}" if isinstance(images, np.ndarray) else type(images).__name__
        raise ValueError(f"{path}: data must be a uint8 array [N, {ROW_BYTES}], got {found}")
    labels = np.asarray(fields[cifar.labels])
    if labels.dtype.kind not in "iu" or labels.shape != (len(images),) or not len(images):
        raise ValueError(
            f"{path}: {cifar.labels} must be whole numbers, one for each of {len(images)} >= 1 images, "
            f"got {labels.dtype} {list(labels.shape)}"
        )
    if not 0 <= labels.min() <= labels.max() < cifar.num_classes:
        raise ValueError(
            f"{path}: {cifar.labels} must be in 0..{cifar.num_classes - 1}, got {labels.min()}..{labels.max()}"
        )
    return images.reshape(-1, 3, 32, 32), labels.astype(np.int64)


def _latin1(text: str, encoding: str) -> bytes:
    # How Python 3 writes bytes into pickles of protocol 2.
    return text.encode("latin1")


_RECONSTRUCT = np.empty(0).__reduce__()[0]
_ADMITTED = {
    ("_codecs", "encode"): _latin1,
    ("numpy", "dtype"): np.dtype,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy._core.multiarray", "_reconstruct"): _RECONSTRUCT,
}


class _ArrayUnpickler(pickle.Unpickler):
    """Loads numbers, text, plain containers and numpy arrays; any other class or function is refused."""

    def __init__(self, content: bytes) -> None:
        super().__init__(io.BytesIO(content), encoding="bytes")

    def find_class(self, module: str, name: str) -> object:
        if (module, name) not in _ADMITTED:
            raise pickle.UnpicklingError(f"{module}.{name} is refused")
        return _ADMITTED[module, name]


def _download(cifar: Cifar, data_dir: Path) -> None:
    """Makes data_dir/folder from the official archive, whose md5 is checked. The folder is made whole or not at all."""
    data_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".download-", dir=data_dir) as scratch:
        archive = Path(scratch) / "archive.tar.gz"
        try:
            torch.hub.download_url_to_file(cifar.url, str(archive))
        except (OSError, http.client.HTTPException) as error:
            raise ConnectionError(f"download of {cifar.url} to {data_dir} failed: {error}") from error
        with archive.open("rb") as file:
            digest = hashlib.md5(usedforsecurity=False)
            while block := file.read(1 << 20):
                digest.update(block)
        if digest.hexdigest() != cifar.archive_md5:
            raise ConnectionError(f"{cifar.url} must have md5 {cifar.archive_md5}, got {digest.hexdigest()}")
        folder = Path(scratch) / cifar.folder
        folder.mkdir()
        with tarfile.open(archive) as tar:
            for name in (*cifar.train, *cifar.test, cifar.meta):
                # Only by name and content: the archive decides nothing about paths.
                member = tar.extractfile(f"{cifar.folder}/{name}")
                assert member is not None  # a file, in the archive of this md5
                (folder / name).write_bytes(member.read())
        os.replace(folder, data_dir / cifar.folder)
