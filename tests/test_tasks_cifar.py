"""The official CIFAR folders: what is read, checked, refused and fetched."""

import dataclasses
import hashlib
import os
import pickle
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from freezeout_ext.tasks import cifar
from freezeout_ext.tasks.cifar import SETS, read_cifar

SHARED = Path(__file__).resolve().parents[2] / "shared"


def write_folder(data_dir, name, *, per_file=10, protocol=2, as_text=False):
    """A tiny folder in the official layout. Returns the rows and labels of train and test."""
    known = SETS[name]
    folder = data_dir / known.folder
    folder.mkdir(parents=True)
    (folder / known.meta).write_bytes(pickle.dumps({b"label_names": [b"x"]}, protocol=2))
    rng, rows = np.random.default_rng(0), {}
    for k, file in enumerate((*known.train, *known.test)):
        images = rng.integers(0, 256, (per_file + k, 3072), dtype=np.uint8)
        labels = rng.integers(0, known.num_classes, per_file + k).tolist()
        content = {b"data": images, known.labels.encode(): labels, b"filenames": [b"a.png"] * len(labels)}
        if name == "cifar100":
            content[b"coarse_labels"] = [0] * len(labels)
        if as_text:
            content = {key.decode(): value for key, value in content.items()}
        (folder / file).write_bytes(pickle.dumps(content, protocol=protocol))
        rows[file] = images, labels
    return [
        (np.concatenate([rows[file][0] for file in files]), [label for file in files for label in rows[file][1]])
        for files in (known.train, known.test)
    ]


def official(monkeypatch, data_dir, name):
    """Makes the files in data_dir the official ones."""
    known = SETS[name]

    def table(files):
        contents = {file: (data_dir / known.folder / file).read_bytes() for file in files}
        return {file: (len(content), hashlib.md5(content).hexdigest()) for file, content in contents.items()}

    known = dataclasses.replace(known, train=table(known.train), test=table(known.test))
    monkeypatch.setitem(SETS, name, known)


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
@pytest.mark.parametrize(("protocol", "as_text"), [(2, False), (4, True)])
def test_reads_all_files_in_order(tmp_path, name, protocol, as_text):
    expected = write_folder(tmp_path, name, protocol=protocol, as_text=as_text)
    train, test, source = read_cifar(name, tmp_path)
    for (images, labels), (rows, numbers) in zip((train, test), expected, strict=True):
        assert images.dtype == torch.uint8 and labels.dtype == torch.int64
        # Rows hold the red plane, then green, then blue, each line by line.
        assert np.array_equal(images.numpy(), rows.reshape(-1, 3, 32, 32))
        assert labels.tolist() == numbers
    count = len(train[1]) + len(test[1])
    assert count == {"cifar10": 75, "cifar100": 21}[name]
    assert source == f"subset ({count} images), not md5-checked"


def test_official_files_are_md5_checked(tmp_path, monkeypatch):
    write_folder(tmp_path, "cifar10")
    official(monkeypatch, tmp_path, "cifar10")
    assert read_cifar("cifar10", tmp_path)[2] == "md5-checked"
    monkeypatch.setitem(SETS["cifar10"].train, "data_batch_2", (1, "0" * 32))
    assert read_cifar("cifar10", tmp_path)[2] == "subset (75 images), not md5-checked"


@pytest.mark.parametrize("file", ["data_batch_3", "test_batch"])
def test_one_wrong_byte_in_an_official_file_is_found(tmp_path, monkeypatch, file):
    write_folder(tmp_path, "cifar10")
    official(monkeypatch, tmp_path, "cifar10")
    path = tmp_path / "cifar-10-batches-py" / file
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{file} must have md5 \w{{32}}, got \w{{32}}: the file is corrupt"):
        read_cifar("cifar10", tmp_path)


def test_one_official_file_among_others_is_not_called_checked(tmp_path, monkeypatch):
    write_folder(tmp_path, "cifar100")
    official(monkeypatch, tmp_path, "cifar100")
    monkeypatch.setitem(SETS["cifar100"].test, "test", (1, "0" * 32))
    assert read_cifar("cifar100", tmp_path)[2] == "subset (21 images), not md5-checked"


def test_a_whole_set_in_files_of_another_size_is_complete_but_not_checked(tmp_path, monkeypatch):
    write_folder(tmp_path, "cifar100")
    monkeypatch.setattr(cifar, "TRAIN_IMAGES", 10)
    monkeypatch.setattr(cifar, "TEST_IMAGES", 11)
    assert read_cifar("cifar100", tmp_path)[2] == "complete (21 images), not md5-checked"


def test_missing_folder_and_files(tmp_path):
    with pytest.raises(ValueError, match=r"data_dir must be the folder that holds cifar-10-batches-py .*got None"):
        read_cifar("cifar10", None)
    with pytest.raises(FileNotFoundError, match=r"folder .*cifar-100-python, found none: .*--download"):
        read_cifar("cifar100", tmp_path)
    write_folder(tmp_path, "cifar10")
    for file in ("data_batch_2", "test_batch"):
        (tmp_path / "cifar-10-batches-py" / file).unlink()
    # A folder that is there is never overwritten, so download does not help.
    for download in (False, True):
        with pytest.raises(FileNotFoundError, match=r"needs data_batch_2, test_batch in .*found no such file"):
            read_cifar("cifar10", tmp_path, download=download)


ROWS = np.zeros((2, 3072), dtype=np.uint8)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "must be a pickle of arrays and lists, it does not load: Ran out of input"),
        (b"no pickle at all", "must be a pickle"),
        (pickle.dumps({b"data": ROWS, b"fine_labels": [0, 1]}, protocol=2)[:-3000], "it does not load"),
        (pickle.dumps([1, 2]), "must hold a dict, got list"),
        (pickle.dumps({b"data": ROWS}), "must have the key fine_labels, got data"),
        (pickle.dumps({b"fine_labels": [0, 1]}), "must have the key data, got fine_labels"),
        (pickle.dumps({b"data": ROWS.tolist(), b"fine_labels": [0, 1]}), r"uint8 array \[N, 3072\], got list"),
        (pickle.dumps({b"data": ROWS[:, 1:], b"fine_labels": [0, 1]}), r"got uint8 \[2, 3071\]"),
        (pickle.dumps({b"data": ROWS.astype(float), b"fine_labels": [0, 1]}), r"got float64 \[2, 3072\]"),
        (pickle.dumps({b"data": ROWS.reshape(2, 3, 1024), b"fine_labels": [0, 1]}), r"got uint8 \[2, 3, 1024\]"),
        (pickle.dumps({b"data": ROWS, b"fine_labels": [0]}), r"one for each of 2 >= 1 images, got int64 \[1\]"),
        (pickle.dumps({b"data": ROWS, b"fine_labels": [0.5, 1]}), r"got float64 \[2\]"),
        (pickle.dumps({b"data": ROWS[:0], b"fine_labels": np.zeros(0, int)}), "each of 0 >= 1 images"),
        (pickle.dumps({b"data": ROWS, b"fine_labels": [0, 100]}), r"must be in 0\.\.99, got 0\.\.100"),
        (pickle.dumps({b"data": ROWS, b"fine_labels": [-1, 5]}), r"must be in 0\.\.99, got -1\.\.5"),
    ],
)
def test_a_file_that_is_not_what_it_should_be(tmp_path, content, message):
    write_folder(tmp_path, "cifar100")
    path = tmp_path / "cifar-100-python" / "test"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        read_cifar("cifar100", tmp_path)
    assert str(path) in str(caught.value)


class Call:
    def __init__(self, function, *args):
        self.reduced = function, args

    def __reduce__(self):
        return self.reduced


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("function", [os.mkdir, eval, getattr, np.load, np.frombuffer])
def test_a_pickle_that_calls_is_refused(tmp_path, protocol, function):
    write_folder(tmp_path, "cifar100")
    made = tmp_path / "made"
    arguments = {os.mkdir: (str(made),), getattr: (1, "real"), eval: (f"__import__('os').mkdir({str(made)!r})",)}
    content = {b"data": ROWS, b"fine_labels": [0, 1], b"x": Call(function, *arguments.get(function, (b"1",)))}
    (tmp_path / "cifar-100-python" / "train").write_bytes(pickle.dumps(content, protocol=protocol))
    with pytest.raises(ValueError, match=rf"it does not load: .*{function.__name__}.* is refused"):
        read_cifar("cifar100", tmp_path)
    assert not made.exists()


@pytest.fixture
def archive(tmp_path, monkeypatch):
    """An official archive at an address that the machine itself serves; its md5 is the one expected."""
    expected = write_folder(tmp_path / "there", "cifar100")
    path = tmp_path / "there" / "cifar-100-python.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        tar.add(tmp_path / "there" / "cifar-100-python", "cifar-100-python")
    known = dataclasses.replace(
        SETS["cifar100"], url=path.as_uri(), archive_md5=hashlib.md5(path.read_bytes()).hexdigest()
    )
    monkeypatch.setitem(SETS, "cifar100", known)
    return path, expected


def test_download(tmp_path, archive):
    path, expected = archive
    data_dir = tmp_path / "new" / "data"
    train, _, _ = read_cifar("cifar100", data_dir, download=True)
    assert train[1].tolist() == expected[0][1]
    assert os.listdir(data_dir) == ["cifar-100-python"]
    assert sorted(os.listdir(data_dir / "cifar-100-python")) == ["meta", "test", "train"]
    path.unlink()
    # What is there is not fetched again.
    assert torch.equal(read_cifar("cifar100", data_dir, download=True)[0][0], train[0])


def test_download_that_fails_leaves_nothing(tmp_path, archive):
    path, _ = archive
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ConnectionError, match=r"must have md5 \w{32}, got \w{32}"):
        read_cifar("cifar100", tmp_path / "data", download=True)
    path.unlink()
    with pytest.raises(ConnectionError, match=r"download of file:.* failed: .*No such file"):
        read_cifar("cifar100", tmp_path / "data", download=True)
    assert os.listdir(tmp_path / "data") == []


def test_official_table():
    for known in SETS.values():
        hashes = [md5 for _, md5 in (*known.train.values(), *known.test.values())] + [known.archive_md5]
        assert len(set(hashes)) == len(hashes) and all(len(md5) == 32 for md5 in hashes)
        # 3,073 bytes an image at least, the label among them.
        assert sum(size for size, _ in known.train.values()) > 50_000 * 3073
        assert sum(size for size, _ in known.test.values()) > 10_000 * 3073


@pytest.mark.parametrize(("name", "mean"), [("cifar10", (0.491, 0.482, 0.447)), ("cifar100", (0.507, 0.487, 0.441))])
def test_real_images(tmp_path, name, mean):
    tool = SHARED / "tools" / "unpack_cifar.py"
    if not tool.exists():
        pytest.skip("the packed CIFAR images are not beside the checkout")
    pytest.importorskip("PIL", reason="unpacking the real images needs Pillow")
    subprocess.run([sys.executable, tool, name, tmp_path, "--small"], check=True, capture_output=True)
    train, test, source = read_cifar(name, tmp_path)
    assert source == "subset (12,000 images), not md5-checked"
    assert torch.bincount(train[1]).tolist() == [10_000 // SETS[name].num_classes] * SETS[name].num_classes
    assert len(test[1]) == 2_000
    # A fifth of the training set: its means differ from those of the whole by a few thousandths.
    assert (train[0].double() / 255).mean((0, 2, 3)).tolist() == pytest.approx(mean, abs=0.006)
