"""bench/bench_finetune.py with a tiny net: what a run does, what the tables compare with."""

import json
import sys
from dataclasses import replace

import pytest
import torch
from load_script import BENCH, load_script

from freezeout_ext.features import FeatureCache
from freezeout_ext.models import build_model
from freezeout_ext.tasks import Task
from freezeout_ext.tasks.images import Split
from freezeout_ext.training import feed, trainer

pytest.importorskip("scipy")


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    monkeypatch.setattr(trainer, "keep_freed_memory", lambda: None)  # for the whole process
    return load_script(BENCH / "bench_finetune.py")


@pytest.fixture
def experiment(bench):
    drawn = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (16, 3, 8, 8), dtype=torch.uint8, generator=drawn)
    split = Split(pixels, torch.arange(16) % 4, (0.5,) * 3, (0.25,) * 3, padding=4, flip=True)
    images = split.dataset(augment=True)
    task = Task(make_model=lambda: build_model("wrn-10-1", 4), train=images, evaluation=images)
    tasks = sys.modules["finetune_tasks"]
    config = replace(tasks.SGD, epochs=4, batch_size=8)
    return tasks.Experiment(lambda seed: task, config, (1, 1e9), "noise")


def test_a_kept_run_fills_its_views(bench, experiment, monkeypatch):
    arms = sys.modules["finetune_arms"]
    # By the clock keeping does not pay on a net as small as this one.
    monkeypatch.setattr(feed, "FeatureCache", lambda *a, **k: FeatureCache(*a, **k | {"measure": False}))
    row = bench.run(experiment, arms.frozen(3).keeping(2), 0)
    assert row["transitions"] == [[0, 3]]
    assert row["steps"] == 8
    assert row["cache"]["rows"] == 32
    assert row["cache"]["hits"] == row["cache"]["misses"] == 32
    assert 0 < row["memory_bytes"] < bench.run(experiment, arms.Arm(), 0)["memory_bytes"]


def test_the_clock_leaves_the_yardstick_out_and_counts_a_run_in_its_steps(bench, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(bench.time, "process_time", lambda: now[0])

    def full_step():
        now[0] += 0.5

    clock = bench.Clock(full_step, steps=2, every=3.0)
    clock.start()
    for seconds in (2.0, 2.0, 1.0):
        now[0] += seconds
        clock.lap()
    clock.lap(end=True)
    assert (clock.seconds, clock.full_steps, clock.yardsticks) == (5.0, 10.0, [0.5] * 3)


def test_norms_adapt_before_the_first_layers_freeze(bench, experiment):
    task = bench.adapted(experiment.task(0), 1, experiment.config)
    torch.manual_seed(0)
    model = task.make_model()
    assert model.blocks[0].bn1.num_batches_tracked == 2 and model.blocks[0].bn1.running_mean.abs().sum() > 0


def test_the_rival_lies_on_the_line_in_the_logarithm_of_the_cost(bench):
    at = sys.modules["finetune_report"].rival_at
    rivals = [{0: {"full_steps": 10.0, "accuracy": 20.0}}, {0: {"full_steps": 1000.0, "accuracy": 40.0}}]
    assert at(100.0, 0, rivals, "accuracy") == (pytest.approx(30.0), "")
    assert at(5.0, 0, rivals, "accuracy") == (20.0, "cheapest")
    assert at(2000.0, 0, rivals, "accuracy") == (40.0, "dearest")
    assert at(100.0, 1, rivals, "accuracy") is None


def test_a_run_that_has_its_line_is_not_repeated(bench, experiment, tmp_path, monkeypatch, capsys):
    arms = sys.modules["finetune_arms"]
    monkeypatch.setitem(bench.EXPERIMENTS, "classes", lambda data_dir, work: experiment)
    chosen = {"full": arms.Arm(), "short 60 %": arms.Arm(length=0.6), "first 4, paid": arms.frozen(2)}
    monkeypatch.setitem(bench.ARMS, "classes", chosen)
    rows = tmp_path / "rows.jsonl"
    given = ["bench_finetune.py", "classes", "--data-dir", str(tmp_path), "--seeds", "2"]
    given += ["--rows", str(rows), "--work", str(tmp_path), "--json", str(tmp_path / "all.json")]
    monkeypatch.setattr(sys, "argv", given)
    threads = torch.get_num_threads()
    bench.main()
    assert len(rows.read_text().splitlines()) == 6
    monkeypatch.setattr(sys, "argv", [*given, "--collect"])
    bench.main()
    torch.set_num_threads(threads)
    assert len(rows.read_text().splitlines()) == 6
    found = json.loads((tmp_path / "all.json").read_text())
    assert [row["arm"] for row in found["rows"]] == ["full"] * 2 + ["short 60 %"] * 2 + ["first 4, paid"] * 2
    table = capsys.readouterr().out.splitlines()
    assert any(line.startswith("| first 4, paid | 2 |") for line in table)
