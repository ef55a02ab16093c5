"""The example of a user's file: short, and it trains on a folder of images."""

from pathlib import Path

import pytest

from freezeout_ext.tasks import TaskFault, batches, load_task

np = pytest.importorskip("numpy")
Image = pytest.importorskip("PIL.Image", reason="pip install freezeout_ext[train]")
EXAMPLE = Path(__file__).parent.parent / "examples" / "my_task.py"


def test_the_example_is_short():
    assert len([line for line in EXAMPLE.read_text().splitlines() if line.strip()]) <= 30


def test_the_example_learns_to_tell_two_kinds_of_photograph(tmp_path, monkeypatch):
    generator = np.random.default_rng(0)
    for label, name in enumerate(("day", "night")):
        (tmp_path / name).mkdir()
        for i in range(20):
            pixels = generator.integers(0, 120, (40, 50, 3)) + 120 * (1 - label)
            Image.fromarray(pixels.astype("uint8")).save(tmp_path / name / f"{i}.jpg")
    monkeypatch.setenv("PHOTOS", str(tmp_path))
    task = load_task(str(EXAMPLE))
    assert (len(task.train), len(task.evaluation)) == (32, 8)
    model = task.make_model()
    optimizer = task.optimizer(model.parameters())
    for epoch in range(3):
        model.train()
        for batch in batches(task.train, 8, shuffle=True, epoch=epoch, workers=task.workers):
            task.loss(model, batch)[0].backward()
            optimizer.step()
            optimizer.zero_grad()
    assert task.evaluate(model, batches(task.evaluation, 8))[1] == 1.0


def test_without_its_folder_the_example_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("PHOTOS", str(tmp_path / "none"))
    with pytest.raises(TaskFault, match=r"my_task\.py, line \d+: FileNotFoundError: .*none"):
        load_task(str(EXAMPLE))
