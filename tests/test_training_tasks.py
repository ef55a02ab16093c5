"""Tasks of four kinds, each through plan, train, a stop and a resume, and compare with kept features; and tune."""

import json
import math
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from test_features_auto import measuring
from test_tasks_kinds import KINDS, classification, regression

from freezeout_ext.tasks import load_task
from freezeout_ext.training import cli, compare, plan, train
from freezeout_ext.training.config import BadInput, TrainConfig
from freezeout_ext.training.reporters import Reporter
from freezeout_ext.training.run_folder import RunFolder
from freezeout_ext.training.summary import verdict
from freezeout_ext.training.tables import as_text, comparison_blocks
from freezeout_ext.training.tune import Round, Tuning, rounds_of, settings

# The tasks' nets are small.
pytestmark = pytest.mark.filterwarnings("ignore:only 2 layers were found", "ignore:layer .* holds .* of the trainable")

OPTIONS = {"epochs": 3, "t_0": 0.5, "how_scale": "linear", "threads": 1, "device": "cpu"}


class Stop(BaseException):
    pass


class StopAt(Reporter):
    def __init__(self, step):
        self._step = step

    def step(self, step):
        if step == self._step:
            raise Stop


def weights(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)["model"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_stopped_run_of_any_task_ends_in_the_same_weights(kind, tmp_path):
    task = kind()
    whole = train(task, tmp_path / "whole", reporter=Reporter(), **OPTIONS)
    with pytest.raises(Stop):
        train(task, tmp_path / "parts", reporter=StopAt(whole["total_steps"] - 2), **OPTIONS)
    parts = train(task, tmp_path / "parts", reporter=Reporter(), resume=True, **OPTIONS)
    found, expected = weights(tmp_path / "parts"), weights(tmp_path / "whole")
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
    judge = f"test_{task.metric_name}"
    assert parts[judge] == whole[judge] and math.isfinite(whole[judge])
    assert whole["transitions"] and whole["phases"][-1]["num_frozen"] > 0
    assert whole["metric"] == {"name": task.metric_name, "higher_is_better": task.higher_is_better}


@pytest.mark.parametrize("kind", KINDS)
def test_any_task_can_be_planned(kind):
    found = plan(kind(), rounds=1, t_0s=[0.5], how_scales=["linear"], **OPTIONS)
    (prediction,) = found.predictions
    # Of one round over a tiny net: how much it saves is noise.
    assert prediction.saving < 1 and prediction.cost > 0 and found.costs.unit == "s" and "loader: " in str(found)


@pytest.mark.parametrize("kind", KINDS)
def test_any_task_can_be_compared_with_kept_features_too(kind, tmp_path):
    task = kind()
    options = {**OPTIONS, "start_frozen": 1, "views": 2}
    summary = compare(task, tmp_path / "out", seeds=2, kinds=["full", "cached", "short"], **options)
    assert [arm["kind"] for arm in summary["arms"]] == ["full", "cached", "short"]
    full, cached, short = summary["arms"]
    assert cached["ahead_of_rival"]["rival"] == short["name"] == "short cached linear 0.5"
    # Whether keeping pays in so few steps is up to the cache, by measured times.
    assert cached["features"]["views"] == 2 and full["features"] is None
    text = as_text(comparison_blocks(summary))
    assert verdict(summary) in text and f"test {task.metric_name}" in text and cached["features"]["text"] in text
    assert (tmp_path / "out" / "compare.png").read_bytes().startswith(b"\x89PNG")
    assert cli.main(["report", str(tmp_path / "out")]) == 0


def test_features_are_read_back_once_all_views_are_kept(tmp_path):
    task = classification()
    options = {
        **OPTIONS,
        "epochs": 6,
        "start_frozen": 1,
        "t_0": 1.0,
        "views": 2,
        "cache": "host",
        "cache_dtype": "bf16",
    }
    result = train(task, tmp_path / "run", reporter=Reporter(), method="no-anneal", deterministic=True, **options)
    torch.use_deterministic_algorithms(True)
    features = result["features"]
    assert features["views"] == 2 and features["where"] == "host" and features["hits"] > 0
    assert features["misses"] + features["hits"] + features["pushed"] == 6 * 40
    assert result["peak_memory_bytes"] >= features["bytes"] > 0


@pytest.mark.parametrize("store", ["host", "folder"])
def test_a_stopped_run_with_auto_views_ends_in_the_same_weights(store, tmp_path, monkeypatch):
    # Else the clock decides, in each run anew: how many views, and whether keeping pays.
    known = measuring(monkeypatch, frozen=0.2)
    monkeypatch.setattr("freezeout_ext.features.moves.Moves.decide", lambda *_: True)
    options = {**OPTIONS, "epochs": 7, "start_frozen": 1, "t_0": 1.0, "method": "no-anneal", "views": "auto"}
    where = [str(tmp_path / f"kept-{i}") if store == "folder" else store for i in range(2)]
    whole = train(classification(), tmp_path / "whole", reporter=Reporter(), cache=where[0], **options)
    steps = whole["steps_per_epoch"]
    for last in (steps, 3 * steps):  # just before the decision, and behind it
        with pytest.raises(Stop):
            train(
                classification(), tmp_path / "parts", reporter=StopAt(last + 1), resume=True, cache=where[1], **options
            )
        known.clear()
    parts = train(classification(), tmp_path / "parts", reporter=Reporter(), resume=True, cache=where[1], **options)
    assert parts["features"]["views"] == whole["features"]["views"] > 1 and not known
    found, expected = weights(tmp_path / "parts"), weights(tmp_path / "whole")
    # In memory nothing outlives the process: what is computed anew is equal within rounding.
    close = {"rtol": 0, "atol": 0} if store == "folder" else {"rtol": 1e-4, "atol": 1e-6}
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], **close)


def test_auto_views_are_refused_where_nothing_may_go_by_the_clock():
    for options, words in (
        ({"deterministic": True, "views": "auto"}, "views must be a number with deterministic"),
        ({"views": "many"}, "views must be one of auto, got 'many'"),
        ({"views": 0}, "views must be >= 1"),
    ):
        with pytest.raises(ValueError, match=words):
            TrainConfig(**options).resolved()


def test_features_of_a_comparison_lie_in_a_folder_for_each_seed(tmp_path):
    options = {**OPTIONS, "start_frozen": 1, "views": 1, "cache": str(tmp_path / "kept")}
    summary = compare(classification(), tmp_path / "out", seeds=2, kinds=["cached"], **options)
    assert sorted(path.name for path in (tmp_path / "kept" / "cached linear 0.5").iterdir()) == ["seed-0", "seed-1"]
    assert summary["arms"][-1]["features"]["where"].endswith("seed-0")


FILE = """
import torch
from torch import nn
from torch.utils.data import TensorDataset
from freezeout_ext.tasks import Task

x = torch.arange(60.0).view(60, 1)

def make_model():
    return nn.Sequential(nn.Linear(1, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))

task = Task(make_model=make_model, train=TensorDataset(x, (x[:, 0] > 30).long()),
            evaluation=TensorDataset(x, (x[:, 0] > 30).long()), epochs=2, batch_size=10)
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "my_task.py"
    path.write_text(FILE)
    return path


def test_a_users_file_goes_through_the_command_line(file, tmp_path, capsys):
    flags = ["--threads", "1", "--device", "cpu", "--t0", "0.5"]
    out = tmp_path / "run"
    assert cli.main(["train", str(file), *flags, "--out", str(out)]) == 0
    assert (
        RunFolder(out).load_config()
        == replace(TrainConfig.of_task(load_task(str(file))), threads=1, device="cpu", t_0=0.5).resolved()
    )
    assert "test accuracy" in capsys.readouterr().out
    assert cli.main(["train", str(file), "--resume", str(out)]) == 0
    assert cli.main(["train", "--resume", str(out)]) == 2
    assert "the run in" in capsys.readouterr().err
    assert cli.main(["train", str(file), "--data", "digits"]) == 2
    assert "--data is for the built-in tasks" in capsys.readouterr().err
    assert cli.main(["plan", str(file), *flags, "--rounds", "1", "--no-measure"]) == 0
    assert cli.main(["compare", str(file), *flags, "--seeds", "1", "--arms", "full", "freezeout", "short",
                     "--out", str(tmp_path / "compare")]) == 0  # fmt: skip
    assert "Nobody won: one seed shows no winner" in capsys.readouterr().out


def test_a_changed_file_is_another_run(file, tmp_path, capsys):
    out = tmp_path / "run"
    assert cli.main(["train", str(file), "--threads", "1", "--device", "cpu", "--out", str(out)]) == 0
    file.write_text(FILE.replace("nn.Linear(1, 8)", "nn.Linear(1, 8, bias=False)"))
    assert cli.main(["train", str(file), "--resume", str(out)]) == 2
    assert "the code of my_task.py has changed since" in capsys.readouterr().err


def test_what_the_users_lines_raise_in_the_run_is_one_sentence_with_the_line(file, tmp_path):
    text = FILE.replace("def make_model", "calls = []\n\ndef criterion(outputs, targets):\n    calls.append(1)\n"
                        "    if len(calls) > 4:\n        raise ZeroDivisionError('enough')\n"
                        "    return nn.functional.cross_entropy(outputs, targets)\n\ndef make_model")  # fmt: skip
    text = text.replace("epochs=2", "criterion=criterion, epochs=2")
    file.write_text(text)
    line = text.splitlines().index("        raise ZeroDivisionError('enough')") + 1
    done = subprocess.run(
        [sys.executable, "-m", "freezeout_ext", "train", str(file), "--threads", "1", "--device", "cpu",
         "--no-freezeout", "--out", str(tmp_path / "run")],
        capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr == f"freezeout: my_task.py, line {line}: ZeroDivisionError: enough\n"


def lead(mean, sd, p, n=5):
    return {"rival": "short linear 0.5", "mean": mean, "sd": sd, "n": n, "test": {"p": p}, "seconds": 2.0}


@pytest.mark.parametrize(
    ("found", "sentence"),
    [
        (lead(0.02, 0.01, 0.01), "freezeout linear 0.5 won: at equal seconds it is 2.00 points of accuracy ahead of"),
        (lead(-0.02, 0.01, 0.01), "Full training won: shortened to equal seconds, short linear 0.5 is 2.00 points"),
        (lead(0.02, 0.05, 0.4), "Nobody won: freezeout linear 0.5 ended 2.00 points of accuracy ahead of"),
    ],
)
def test_the_verdict_names_winner_difference_error_and_p(found, sentence):
    arm = {"name": "freezeout linear 0.5", "test_accuracy": {"mean": 0.9}, "train_seconds": {"mean": 2.1}}
    text = verdict(
        {"metric": {"name": "accuracy", "higher_is_better": True}, "arms": [{**arm, "ahead_of_rival": found}]}
    )
    assert text.startswith(sentence)
    error = 100 * found["sd"] / 5**0.5
    assert f"standard error {error:.2f} points of accuracy, p = {found['test']['p']:.2g}, n = 5" in text
    assert "2.1 s against 2.0 s" in text


def test_several_freezing_arms_share_their_chance_of_an_accident():
    same = {"test_accuracy": {"mean": 0.9}, "train_seconds": {"mean": 2.1}}
    means = {0.5: 0.02, 0.6: 0.01, 0.7: 0.0}
    arms = [
        {**same, "name": f"freezeout linear {t_0}", "ahead_of_rival": lead(m, 0.01, 0.02)} for t_0, m in means.items()
    ]
    text = verdict({"metric": {"name": "accuracy", "higher_is_better": True}, "arms": arms})
    assert text.startswith("Nobody won: freezeout linear 0.5") and "p = 0.06, n = 5, p times 3" in text


def test_settings_are_full_training_and_starts_at_quarters_of_the_layers():
    found = settings([f"blocks.{i}" for i in range(8)])
    assert next(iter(found)) == "full" and len(found) == 8
    starts = {changes.get("start_frozen") for changes in found.values()}
    assert starts == {None, "blocks.1", "blocks.3", "blocks.5"}


def test_rounds_double_the_seconds_and_halve_the_settings_and_the_last_is_against_full_training():
    rounds = rounds_of(7, 80.0, seeds=3)
    assert [(each.settings, each.seconds, each.seeds) for each in rounds] == [
        (7, 10.0, 1),
        (4, 20.0, 1),
        (2, 40.0, 2),
        (2, 80.0, 3),
    ]
    assert rounds_of(1, 80.0, seeds=2) == [Round(2, 80.0, 2)]


def test_tune_halves_what_is_left_and_prints_a_command_that_trains(tmp_path, monkeypatch):
    task = replace(regression(), epochs=400)
    options = {"threads": 1, "device": "cpu", "epochs": 400}
    base = replace(TrainConfig.of_task(task), **options)
    tuning = Tuning(base, tmp_path / "out", task=task, seconds=0.4, seeds=2)
    told = []
    best = tuning.run(lambda title: Reporter(), say=told.append)
    tried = {
        k: {row["name"] for row in tuning.rows if row["round"] == k} for k in {row["round"] for row in tuning.rows}
    }
    left = len(settings(tuning._layers)) - 1 - len(tuning.refused)
    assert len(tried[1]) == left and len(tried[2]) == (left + 1) // 2
    last = max(tried)
    assert all(tried[k + 1] - {"full"} < tried[k] for k in range(1, last - 1))
    # The last round: one setting and full training, each with both seeds.
    assert len(tried[last]) == 2 and "full" in tried[last] and best["name"] in tried[last]
    assert [len(row["values"]) for row in tuning.means(last)] == [2, 2]
    text = tuning.text({"task": "my_task.py", "batch_size": 10})
    assert "Trying took" in text and "  freezeout train my_task.py --batch-size 10 --no-" in text and "--steps " in text
    assert "of training in all" in told[0] and "(standard error " in text
    # Runs that are done are kept.
    again = Tuning(base, tmp_path / "out", task=task, seconds=0.4, seeds=2, resume=True)
    with monkeypatch.context() as patched:
        patched.setattr("freezeout_ext.training.run.Run.prepare", None)
        assert again.run(lambda title: Reporter(), say=told.append) == best
    assert json.loads((tmp_path / "out" / "tune.json").read_text())["rows"] == tuning.rows
    with pytest.raises(BadInput, match="seconds or a saving must be given"):
        Tuning(base, tmp_path / "new", task=task)


def tuned(*rows):
    """A Tuning with rows (round, setting, seed, value)."""
    tuning = Tuning.__new__(Tuning)
    tuning.task = regression()  # lower is better
    tuning.rows = [
        {"round": k, "name": name, "seed": seed, "value": value, "seconds": 2.0} for k, name, seed, value in rows
    ]
    return tuning


def test_the_best_is_of_the_last_round_by_the_mean_over_its_seeds():
    tuning = tuned((1, "a", 0, 0.1), (2, "a", 0, 0.5), (2, "full", 0, 0.4), (2, "a", 1, 0.1), (2, "full", 1, 0.4))
    assert tuning.best()["name"] == "a" and tuning.best()["value"] == pytest.approx(0.3)
    # Means -0.1 and 0.3 over the seeds: 0.1, and a standard error of 0.2.
    found = tuning._against_full(tuning.best())
    assert found.startswith("Nobody won: a ended 0.1 of RMSE ahead of full, within the noise (standard error 0.2 of")


def test_a_round_that_was_interrupted_is_read_by_what_is_done():
    tuning = tuned((2, "a", 0, 0.5), (2, "full", 0, 0.4), (2, "a", 1, 0.1))
    assert tuning.best()["name"] == "a"  # both seeds are done
    assert tuning._against_full(tuning.best()).startswith(
        "Nobody won: one seed shows no winner. a ended 0.1 of RMSE behind full"
    )
    early = tuned((1, "a", 0, 0.5))
    assert "not stood against full" in early._against_full(early.best())


def test_ctrl_c_in_tune_keeps_what_is_done(file, tmp_path, capsys, monkeypatch):
    from freezeout_ext.training import commands

    class Interrupting(Reporter):
        runs = 0

        def start(self, trainer):
            Interrupting.runs += 1
            if Interrupting.runs == 3:
                raise KeyboardInterrupt

    monkeypatch.setattr(commands, "run_reporter", lambda title: Interrupting())
    flags = [str(file), "--threads", "1", "--device", "cpu", "--epochs", "200", "--out", str(tmp_path / "tune")]
    assert cli.main(["tune", *flags, "--seconds", "1"]) == 130
    shown = capsys.readouterr()
    assert "interrupted: the best of what is done" in shown.err and "  freezeout train " in shown.out
    assert len(json.loads((tmp_path / "tune" / "tune.json").read_text())["rows"]) == 2
