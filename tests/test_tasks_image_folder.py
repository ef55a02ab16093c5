"""A folder of images: layouts, splits, pixels, augmentation, and files that are broken."""

import numpy as np
import pytest
import torch

from freezeout_ext.tasks import batches, built_in
from freezeout_ext.tasks.image_folder import MEAN, STD, ImageFiles, opened

Image = pytest.importorskip("PIL.Image", reason="pip install freezeout_ext[train]")
COLOURS = {"blue": (20, 30, 220), "green": (10, 200, 30), "red": (230, 10, 20)}


def photo(path, colour=(0, 0, 0), size=(40, 30), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(len(str(path))).integers(0, 20, (size[1], size[0], 3))
    Image.fromarray((noise + np.array(colour)).clip(0, 255).astype("uint8")).save(path, **options)
    return path


def folder(root, count=10, suffix=".png"):
    for name, colour in COLOURS.items():
        for i in range(count):
            photo(root / name / f"{i}{suffix}", colour)
    return root


def make(root, **options):
    return built_in("imagefolder", "wrn-10-1", data_dir=root, image_size=16, workers=0, **options)


def names(dataset):
    return [f"{path.parent.name}/{path.name}" for path, _ in dataset.files]


def test_subfolders_are_classes_and_a_fifth_of_each_is_judged(tmp_path):
    task = make(folder(tmp_path))
    assert task.notes == (f"{tmp_path}: 24 train + 6 test images of 3 classes",)
    assert sorted(names(task.train) + names(task.evaluation)) == sorted(
        f"{c}/{i}.png" for c in COLOURS for i in range(10)
    )
    assert [name.split("/")[0] for name in names(task.evaluation)] == ["blue"] * 2 + ["green"] * 2 + ["red"] * 2
    assert names(make(tmp_path).evaluation) == names(task.evaluation)
    assert names(make(tmp_path, seed=1).evaluation) != names(task.evaluation)
    task.check()


def test_a_validation_part_is_taken_from_the_training_images(tmp_path):
    task, plain = make(folder(tmp_path), val_fraction=0.25), make(tmp_path)
    assert names(task.evaluation) == names(plain.evaluation) and len(task.validation) == 6
    assert sorted(names(task.train) + names(task.validation)) == sorted(names(plain.train))
    assert not task.validation.augmented and not task.evaluation.augmented and task.train.augmented


def test_train_and_val_are_taken_as_they_are(tmp_path):
    folder(tmp_path / "train", 3)
    folder(tmp_path / "val", 2, ".jpg")
    (tmp_path / "train" / "red" / "notes.txt").write_text("no image")
    task = make(tmp_path)
    assert (len(task.train), len(task.evaluation)) == (9, 6)
    assert [label for _, label in task.evaluation.files] == [0, 0, 1, 1, 2, 2]
    photo(tmp_path / "val" / "violet" / "0.png")
    with pytest.raises(ValueError, match="val must have the classes of train, it also has violet"):
        make(tmp_path)


def test_an_image_that_is_judged_is_its_middle_normalised(tmp_path):
    path = photo(tmp_path / "a.png", (100, 50, 10), (60, 40))
    found, label = ImageFiles([(path, 2)], 16, augmented=False)[0]
    side = 40 * 224 / 256
    image = Image.open(path).resize(
        (16, 16), Image.Resampling.BILINEAR, box=(30 - side / 2, 20 - side / 2, 30 + side / 2, 20 + side / 2)
    )
    expected = (np.asarray(image, dtype=np.float64) / 255 - MEAN) / STD
    assert label == 2 and found.dtype == torch.float32 and found.is_contiguous()
    # float32 of values up to 3.
    np.testing.assert_allclose(found.permute(1, 2, 0).numpy(), expected, rtol=0, atol=1e-6)


def test_augmentation_is_a_function_of_seed_epoch_and_sample(tmp_path):
    task = make(folder(tmp_path, 3))

    def epoch(**options):
        found = list(batches(task.train, 2, **{"shuffle": True, "seed": 1, "epoch": 1, **options}))
        return [torch.cat(parts) for parts in zip(*found, strict=True)]

    first = epoch()
    assert all(map(torch.equal, epoch(workers=2), first))
    assert not torch.equal(epoch(epoch=2)[0], first[0])
    same = torch.stack([task.train[0][0] for _ in range(20)])
    assert len(same.flatten(1).unique(dim=0)) == 20


def test_crops_stay_inside_and_are_mirrored_half_of_the_time(tmp_path):
    # Red rises to the right, green downwards: a crop is read back from its corners.
    ramp = np.zeros((50, 100, 3), dtype=np.uint8)
    ramp[:, :, 0], ramp[:, :, 1], ramp[:, :, 2] = np.arange(100)[None] + 100, np.arange(50)[:, None] + 100, 255
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    data = ImageFiles([(tmp_path / "ramp.png", 0)], 32, augmented=True, mean=(0, 0, 0), std=(1, 1, 1))
    crops = torch.stack([data[0][0] for _ in range(400)]) * 255
    assert (crops[:, 2] == 255).all()  # nothing from outside
    mirrored = crops[:, 0, 0, 0] > crops[:, 0, 0, -1]
    assert abs(int(mirrored.sum()) - 200) < 50  # sd 10
    widths = (crops[:, 0, 0, -1] - crops[:, 0, 0, 0]).abs() / 100
    heights = (crops[:, 1, -1, 0] - crops[:, 1, 0, 0]) / 50
    # A crop's corners lie half a pixel of the result inside it.
    area = widths * heights * (32 / 31) ** 2
    assert 0.28 < area.min() < 0.45 and 0.8 < area.max() < 1.02


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1"])
def test_images_of_any_mode_become_rgb(tmp_path, mode):
    path = photo(tmp_path / "a.png", (200, 100, 50))
    suffix = ".jpg" if mode == "CMYK" else ".png"
    Image.open(path).convert(mode).save(tmp_path / f"b{suffix}")
    assert ImageFiles([(tmp_path / f"b{suffix}", 0)], 8, augmented=False)[0][0].shape == (3, 8, 8)


def test_a_photograph_is_turned_as_its_exif_says(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright
    path = photo(tmp_path / "a.jpg", (50, 50, 50), (40, 30), exif=exif)
    assert opened(path, 64).size == (30, 40)


def broken(root):
    whole = (root / "red" / "1.png").read_bytes()
    (root / "red" / "1.png").write_bytes(whole[: len(whole) // 2])
    (root / "green" / "3.png").write_bytes(b"not an image")
    return root


def test_broken_images_are_refused_by_name(tmp_path):
    broken(folder(tmp_path, 5))
    with pytest.raises(
        ValueError, match=r"(3|1)\.png must be an image, it cannot be read: .* \(and 1 more of 15\); skip_b"
    ):
        make(tmp_path)


def test_broken_images_are_left_out_where_that_is_asked_for_and_said(tmp_path):
    task = make(broken(folder(tmp_path, 5)), skip_broken=True)
    found = names(task.train) + names(task.evaluation)
    assert len(found) == 13 and not {"red/1.png", "green/3.png"} & set(found)
    assert "left out, 2 of 15 files cannot be read: " in task.notes[1]
    assert "red/1.png" in task.notes[1] and "green/3.png" in task.notes[1]


def test_a_truncated_jpeg_is_found(tmp_path):
    folder(tmp_path, 4, ".jpg")
    whole = photo(tmp_path / "red" / "1.jpg", (90, 0, 0), (400, 300), quality=95).read_bytes()
    (tmp_path / "red" / "1.jpg").write_bytes(whole[: len(whole) * 2 // 3])
    with pytest.raises(ValueError, match=r"red/1\.jpg must be an image, it cannot be read"):
        make(tmp_path)


def test_folders_that_are_none(tmp_path):
    with pytest.raises(ValueError, match="data_dir must be the folder whose subfolders are the classes, got None"):
        make(None)
    with pytest.raises(ValueError, match=r"data_dir must be a folder, .*none is none"):
        make(tmp_path / "none")
    photo(tmp_path / "one" / "a.png")
    with pytest.raises(ValueError, match="must have a subfolder for each of at least two classes, it has 1"):
        make(tmp_path)
    (tmp_path / "two").mkdir()
    photo(tmp_path / "one" / "b.png")
    with pytest.raises(ValueError, match=r"must hold a training image of each class, .* has none of two"):
        make(tmp_path)
    with pytest.raises(ValueError, match="image_size must be >= 8, got 4"):
        built_in("imagefolder", "wrn-10-1", data_dir=tmp_path, image_size=4)


def test_of_16_bits_the_upper_8_are_taken(tmp_path):
    grey = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000
    for name, array in (("a.png", grey), ("b.tif", grey), ("c.tif", grey.astype(">u2"))):
        Image.fromarray(array).save(tmp_path / name)
        found = np.asarray(opened(tmp_path / name, 8))
        assert found.shape == (8, 8, 3)
        np.testing.assert_array_equal(found, (grey // 256)[:, :, None].repeat(3, 2), err_msg=name)


@pytest.mark.parametrize("dtype", ["int32", "float32"])
def test_pixels_of_32_bits_have_no_white(tmp_path, dtype):
    Image.fromarray(np.ones((8, 8), dtype=dtype)).save(tmp_path / "a.tif")
    with pytest.raises(ValueError, match=r"a\.tif must be an image, .*: pixels of 32 bits do not say"):
        opened(tmp_path / "a.tif", 8)


def test_what_is_hidden_is_left_out_and_folders_below_a_class_belong_to_it(tmp_path):
    folder(tmp_path, 4)
    photo(tmp_path / "red" / "holiday" / "9.png")
    (tmp_path / "red" / "._0.jpg").write_bytes(b"what macOS writes beside a file")
    (tmp_path / "red" / ".thumbnails").mkdir()
    (tmp_path / "red" / ".thumbnails" / "0.jpg").write_bytes(b"no image")
    (tmp_path / ".trash").mkdir()
    task = make(tmp_path)
    assert task.notes == (f"{tmp_path}: 10 train + 3 test images of 3 classes",)
    assert "red/9.png" not in names(task.train) and "holiday/9.png" in names(task.train) + names(task.evaluation)


def test_all_images_are_tried_with_progress_and_after_the_net_is_known(tmp_path):
    folder(tmp_path, 4)
    told = []
    make(tmp_path, on_progress=lambda done, total: told.append((done, total)))
    assert told == [(k, 12) for k in range(1, 13)]
    with pytest.raises(ValueError, match="model must be"):
        built_in("imagefolder", "no-net", data_dir=tmp_path, on_progress=lambda *_: pytest.fail("tried too early"))
