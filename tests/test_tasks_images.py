"""Splits and batches: what is held out, what an input is, and that all of it follows from (seed, epoch)."""

import sys

import pytest
import torch
from test_tasks_cifar import write_folder

from freezeout_ext.tasks import batches
from freezeout_ext.tasks.images import Split, _crop_flip, load_data

pytest.importorskip("sklearn", reason="the digits are scikit-learn's")


@pytest.fixture(scope="module")
def digits():
    return load_data("digits")


def keys(split):
    return [image.numpy().tobytes() for image in split.images]


def test_digits(digits):
    assert digits.train.images.shape[1:] == (1, 8, 8) and digits.num_classes == 10 and digits.val is None
    assert (len(digits.train), len(digits.test)) == (1347, 450)
    assert digits.train.images.dtype == torch.uint8 and digits.train.labels.dtype == torch.int64
    assert digits.conditions.startswith("digits: 1,347 train + 450 test images, scikit-learn ")
    # The pixels are those of scikit-learn, 0..16, times 15.
    assert set(digits.train.images.unique().tolist()) == {15 * k for k in range(17)}


def test_the_digits_test_split_is_stratified_and_the_rest_is_train(digits):
    from sklearn.datasets import load_digits

    source = load_digits()
    found = sorted(keys(digits.train) + keys(digits.test))
    assert found == sorted((image * 15).astype("uint8").tobytes() for image in source.images)
    sizes = torch.bincount(torch.from_numpy(source.target))
    assert (torch.bincount(digits.test.labels) - sizes * 450 / 1797).abs().max() < 1


def test_mean_and_std_are_those_of_the_training_images(tmp_path):
    write_folder(tmp_path, "cifar10", per_file=30)
    data = load_data("cifar10", tmp_path, val_fraction=0.25)
    pixels = data.train.images.double() / 255
    assert data.train.mean == pytest.approx(pixels.mean((0, 2, 3)).tolist(), rel=1e-12)
    assert data.train.std == pytest.approx(pixels.std((0, 2, 3), correction=0).tolist(), rel=1e-12)
    for split in (data.val, data.test):
        assert (split.mean, split.std) == (data.train.mean, data.train.std)


def test_a_channel_of_one_value_is_not_scaled(tmp_path, monkeypatch):
    images = torch.zeros(4, 3, 32, 32, dtype=torch.uint8)
    images[:, 1] = 51
    part = images, torch.zeros(4, dtype=torch.int64)
    monkeypatch.setattr("freezeout_ext.tasks.cifar.read_cifar", lambda *args, **options: (part, part, ""))
    data = load_data("cifar10", tmp_path)
    assert data.train.mean == (0.0, 0.2, 0.0) and data.train.std == (1.0, 1.0, 1.0)


@pytest.mark.parametrize("fraction", [0.0001, 0.1, 1 / 3, 0.99])
def test_validation_split(digits, fraction):
    data = load_data("digits", val_fraction=fraction, seed=1)
    count = max(1, round(fraction * 1347))
    assert (len(data.val), len(data.train)) == (count, 1347 - count)
    sizes = torch.bincount(digits.train.labels)
    assert (torch.bincount(data.val.labels, minlength=10) - sizes * count / 1347).abs().max() < 1
    assert sorted(keys(data.train) + keys(data.val)) == sorted(keys(digits.train))
    assert keys(data.test) == keys(digits.test)
    assert f"{1347 - count:,} train + {count:,} val + 450 test images" in data.conditions
    assert keys(data.val) == keys(load_data("digits", val_fraction=fraction, seed=1).val)
    assert keys(data.val) != keys(load_data("digits", val_fraction=fraction, seed=2).val)


def test_cifar_conditions(tmp_path):
    write_folder(tmp_path, "cifar100")
    data = load_data("cifar100", tmp_path)
    assert data.num_classes == 100 and data.train.images.shape[1:] == (3, 32, 32)
    assert data.conditions == "cifar100: 10 train + 11 test images, subset (21 images), not md5-checked"
    assert data.train.flip and data.train.padding == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "mnist"}, "data must be one of digits, cifar10, cifar100, got 'mnist'"),
        ({"name": "digits", "val_fraction": 1.0}, r"val_fraction must be in \[0, 1\), got 1.0"),
        ({"name": "digits", "val_fraction": -0.1}, "got -0.1"),
        ({"name": "digits", "val_fraction": float("nan")}, "got nan"),
        ({"name": "digits", "val_fraction": 0.9999}, "val_fraction must leave a training image of 1347, got 0.9999"),
        ({"name": "cifar10"}, "data_dir must be the folder that holds cifar-10-batches-py"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        load_data(**arguments)


def test_digits_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(
        ModuleNotFoundError, match=r"digits needs scikit-learn, found none: pip install 'freezeout_ext\[train\]'"
    ):
        load_data("digits")


def make_split(n=10, channels=3, size=8, *, padding=2, flip=True, seed=0):
    """Images without black pixels: those are the border's."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(1, 256, (n, channels, size, size), generator=generator, dtype=torch.uint8)
    mean, std = tuple(0.1 * c + 0.3 for c in range(channels)), tuple(0.2 + 0.05 * c for c in range(channels))
    return Split(images, torch.arange(n), mean, std, padding, flip)


def pixels(split, inputs):
    """The uint8 images that inputs were made of."""
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (split.mean, split.std))
    return ((inputs * std + mean) * 255).round().to(torch.uint8)


def test_plain_batches_are_the_normalised_images_in_order():
    split = make_split(10)
    found = list(batches(split.dataset(), 4))
    assert [len(targets) for _, targets in found] == [4, 4, 2]
    inputs = torch.cat([inputs for inputs, _ in found])
    assert torch.equal(torch.cat([targets for _, targets in found]), split.labels)
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (split.mean, split.std))
    # float32, values up to 4: a few roundings of 2.4e-7.
    torch.testing.assert_close(inputs, (split.images / 255 - mean) / std, rtol=0, atol=2e-6)
    assert inputs.dtype == torch.float32 and found[0][0].is_contiguous()


def test_the_images_are_not_written_to():
    split = make_split(10)
    before = split.images.clone()
    for inputs, _ in batches(split.dataset(augment=True), 10):
        inputs.zero_()
    assert torch.equal(split.images, before)


def equal(found, expected):
    return len(found) == len(expected) and all(
        torch.equal(a, b) for pair in zip(found, expected, strict=True) for a, b in zip(*pair, strict=True)
    )


def crops(image, padding):
    """All crops of one image [C, H, W] by loops, with their mirror images: {(top, left, flip): [C, H, W]}."""
    channels, height, width = image.shape
    padded = torch.zeros(channels, height + 2 * padding, width + 2 * padding, dtype=image.dtype)
    padded[:, padding : padding + height, padding : padding + width] = image
    found = {}
    for top in range(2 * padding + 1):
        for left in range(2 * padding + 1):
            crop = padded[:, top : top + height, left : left + width]
            found[top, left, False], found[top, left, True] = crop, crop.flip(2)
    return found


@pytest.mark.parametrize(("padding", "flip"), [(2, True), (1, False), (0, True), (0, False)])
def test_augmentation_is_one_of_the_crops_and_each_of_them_comes(padding, flip):
    one = make_split(1)
    n = 2000
    split = Split(one.images.expand(n, -1, -1, -1), torch.zeros(n), one.mean, one.std, padding, flip)
    inputs, _ = next(batches(split.dataset(augment=True), n))
    names = {crop.numpy().tobytes(): name for name, crop in crops(one.images[0], padding).items()}
    counts = dict.fromkeys([name for name in names.values() if flip or not name[2]], 0)
    for image in pixels(split, inputs):
        counts[names[image.numpy().tobytes()]] += 1
    assert len(counts) == (2 * padding + 1) ** 2 * (1 + flip)
    # Uniform: each count is binomial, within 5 standard deviations of its mean.
    mean = n / len(counts)
    assert all(abs(count - mean) <= 5 * mean**0.5 for count in counts.values())


def test_crop_flip_is_the_crop_asked_for():
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(1, 256, (3, 4, 7), generator=generator, dtype=torch.uint8)
    expected = crops(image, 2)
    top, left, flip = zip(*expected, strict=True)
    images = image.expand(len(expected), -1, -1, -1)
    found = _crop_flip(images, torch.tensor(top), torch.tensor(left), torch.tensor(flip), padding=2)
    assert torch.equal(found, torch.stack(list(expected.values())))


@pytest.mark.cuda
def test_cuda_gives_the_same_batches():
    data = [load_data("digits", device=device, val_fraction=0.1) for device in ("cpu", "cuda")]
    options = {"shuffle": True, "seed": 1, "epoch": 2}
    on_cpu, on_cuda = (
        [(x.cpu(), y.cpu()) for x, y in batches(d.train.dataset(augment=True), 100, **options)] for d in data
    )
    assert data[1].train.images.is_cuda and equal(on_cuda, on_cpu)
