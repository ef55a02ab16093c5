"""bench/bench_finetune.py with a tiny net: what a run does, what the tables compare with."""

import json
import math
import sys
from functools import partial

import pytest
import torch
from load_script import BENCH, load_script

from freezeout_ext.models import build_model
from freezeout_ext.tasks.images import Split

pytest.importorskip("scipy")


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    module = load_script(BENCH / "bench_finetune.py")
    monkeypatch.setattr(module, "keep_freed_memory", lambda: None)  # for the whole process
    return module


@pytest.fixture
def images(bench):
    drawn = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (16, 3, 8, 8), dtype=torch.uint8, generator=drawn)
    split = Split(pixels, torch.arange(16) % 4, (0.5,) * 3, (0.25,) * 3, padding=4, flip=True)
    return split.dataset(augment=True)


@pytest.fixture
def experiment(images):
    tasks = sys.modules["finetune_tasks"]

    def make_model(seed: int) -> torch.nn.Module:
        torch.manual_seed(seed)
        return build_model("wrn-10-1", 4)

    return tasks.Experiment(
        make_model=make_model,
        train=lambda seed: images,
        test=lambda seed: images,
        make_optimizer=tasks.sgd,
        epochs=4,
        batch_size=8,
        timed=(1, 1e9),
        data="noise",
    )


def test_a_kept_run_fills_its_views_and_thaws_when_asked_to(bench, experiment, monkeypatch):
    arms, runs = sys.modules["finetune_arms"], sys.modules["finetune_runs"]
    # By the clock keeping does not pay on a net as small as this one.
    monkeypatch.setattr(runs, "FeatureCache", partial(runs.FeatureCache, measure=False))
    row = runs.Run(experiment, arms.Arm(start=3, views=2), 0).row()
    assert row["transitions"] == [[0, 3]]
    assert row["steps"] == 8
    assert row["cache"]["rows"] == 32
    assert row["cache"]["hits"] == row["cache"]["misses"] == 32
    thawed = runs.Run(experiment, arms.Arm(start=3, views=2, thaw=(0.5, 1, 0.5)), 0).row()
    assert thawed["transitions"] == [[0, 3], [4, 1]]
    assert thawed["memory_bytes"] > row["memory_bytes"]


def test_rates_follow_the_cosine_times_the_factors_of_the_arm(bench, experiment):
    arms, runs = sys.modules["finetune_arms"], sys.modules["finetune_runs"]
    run = runs.Run(experiment, arms.Arm(start=2, rate=2.0, thaw=(0.5, 1, 0.25)), 0)
    run._prepare()
    rates = []
    while run.step < run.total:
        for batch in run._epoch():
            rates.append(run.optimizer.param_groups[-1]["lr"])
            run._train_step(*batch)
    whole = [0.1 * (1 + math.cos(math.pi * step / 8)) for step in range(8)]
    assert rates == pytest.approx([*whole[:4], *(0.25 * rate for rate in whole[4:])])


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
    chosen = {"full": arms.Arm(), "short 60 %": arms.Arm(length=0.6), "first 4, paid": arms.Arm(start=2)}
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
