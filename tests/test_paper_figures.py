"""bench/paper_figures.py: a figure in stages, on digits with tiny nets."""

import json

import pytest
from load_script import BENCH, load_script


@pytest.fixture(scope="module")
def figures():
    return load_script(BENCH / "paper_figures.py")


def test_every_figure_trains_its_net_with_four_strategies(figures):
    assert {figures.FIGURES[name] for name in figures.FIGURES} == {
        ("wrn-40-4", "cifar100"),
        ("densenet-76-12", "cifar100"),
        ("densenet-76-12", "cifar10"),
        ("vgg-16", "cifar100"),
    }
    points = figures.points([0.5, 0.8])
    assert len({point.folder for point in points}) == len(points) == 1 + 4 * 2
    base = figures.TrainConfig(epochs=100, **figures.SETTINGS["paper"])
    configs = [point.config(base, 1) for point in points]
    assert [config.method for config in configs] == ["full"] + ["freezeout"] * 8
    assert {(c.how_scale, c.scale_lr, c.t_0) for c in configs[1:]} == {
        (how_scale, scaled, t_0) for how_scale in ("linear", "cubic") for scaled in (True, False) for t_0 in (0.5, 0.8)
    }
    assert all((c.batch_size, c.lr, c.weight_decay, c.momentum) == (50, 0.1, 1e-4, 0.9) for c in configs)


def test_a_figure_goes_on_from_stage_to_stage(figures, tmp_path, capsys):
    flags = ["wrn-cifar100", "--rehearse", "--seeds", "1", "--t0s", "0.8", "--device", "cpu", "--out", str(tmp_path)]
    folder = tmp_path / "wrn-cifar100-paper"
    # No time at all: nothing is trained, nothing is drawn.
    assert figures.main([*flags, "--minutes", "0"]) == figures.MORE_TO_DO
    assert list(folder.iterdir()) == []
    # A stage that ends within the first run, at its first epoch's end; the next one goes on there.
    ticks = iter([0.0, 0.0, 1e6])
    original = figures.time.monotonic
    figures.time.monotonic = lambda: next(ticks)
    try:
        assert figures.main([*flags, "--minutes", "1"]) == figures.MORE_TO_DO
    finally:
        figures.time.monotonic = original
    log = folder / "runs" / "full" / "seed-0" / "log.jsonl"
    assert len(log.read_text().splitlines()) == 1
    first = log.read_text()
    capsys.readouterr()
    assert figures.main(flags) == 0
    assert log.read_text().startswith(first) and len(log.read_text().splitlines()) == 2
    points = json.loads((folder / "results.json").read_text())["points"]
    assert [point["strategy"] for point in points] == [
        "full", "linear, scaled rates", "linear, unscaled rates", "cubic, scaled rates", "cubic, unscaled rates",
    ]  # fmt: skip
    assert points[0]["time_saved_percent"] == 0
    assert (folder / "figure.png").stat().st_size > 10_000
    assert "5 of 5 runs" not in (shown := capsys.readouterr().out) and "\ncubic, unscaled rates " in shown
    # All is done: nothing is trained again.
    before = (folder / "runs" / "full" / "seed-0" / "checkpoint.pt").stat().st_mtime_ns
    assert figures.main([*flags, "--minutes", "0"]) == 0
    assert (folder / "runs" / "full" / "seed-0" / "checkpoint.pt").stat().st_mtime_ns == before
