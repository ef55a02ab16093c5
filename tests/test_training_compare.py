"""Comparisons: which runs are made, in which order, from what config, and the arithmetic of their summary."""

import json
from dataclasses import replace

import pytest

from freezeout_ext.tasks import built_in
from freezeout_ext.training.arms import Arm, make_arms
from freezeout_ext.training.compare import Comparison
from freezeout_ext.training.config import BadInput, TrainConfig
from freezeout_ext.training.reporters import Reporter
from freezeout_ext.training.run_folder import RunFolder
from freezeout_ext.training.summary import curves, run_folder, spread, undisturbed_seconds
from freezeout_ext.training.tables import as_text, comparison_blocks

BASE = TrainConfig(model="wrn-10-1", steps=8, batch_size=16, t_0=0.6, threads=1, device="cpu")
TASK = built_in("digits", "wrn-10-1")
FULL, FREEZEOUT, NO_ANNEAL = Arm("full"), Arm("freezeout", 0.6, "cubic"), Arm("no-anneal", 0.6, "cubic")


def compare(out, arms, seeds=(0, 1), **options):
    titles = []

    def make_reporter(title):
        titles.append(title)
        return Reporter()

    comparison = Comparison(options.pop("base", BASE), out, arms=arms, seeds=seeds, task=TASK, **options)
    return comparison.run(make_reporter, say=lambda text: None), titles


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A finished comparison: (folder, summary, titles of its runs in order)."""
    out = tmp_path_factory.mktemp("compare") / "out"
    return out, *compare(out, make_arms(["short", "full", "freezeout", "no-anneal"], [0.6], ["cubic"]))


def test_arms():
    assert [arm.name for arm in make_arms(["freezeout", "full"], [0.5, 0.8], ["cubic", 1.5])] == [
        "full",
        "freezeout cubic 0.5",
        "freezeout cubic 0.8",
        "freezeout 1.5 0.5",
        "freezeout 1.5 0.8",
    ]
    assert make_arms(["full", "full", "freezeout"], [0.6, 0.6], ["cubic"]) == [FULL, FREEZEOUT]
    # What the matched arms take their length from comes along.
    assert [arm.kind for arm in make_arms(["short"], [0.5], ["cubic"])] == ["full", "freezeout", "short"]
    assert [arm.kind for arm in make_arms(["const-time"], [0.5], ["cubic"])] == ["full", "freezeout", "const-time"]
    with pytest.raises(ValueError, match=r"arms must be of full, .*, got 'half'"):
        make_arms(["half"], [0.5], ["cubic"])


def test_arms_differ_in_the_method_alone():
    base = BASE.resolved()
    for arm in (FULL, FREEZEOUT, NO_ANNEAL):
        assert arm.config(base, 3) == replace(base, method=arm.kind, seed=3)
    assert Arm("short", 0.5, "linear").config(base, 3, steps=5) == replace(base, method="full", seed=3, steps=5)
    assert Arm("const-time", 0.5, "linear").config(base, 0, steps=11) == replace(
        base, t_0=0.5, how_scale="linear", steps=11
    )


def test_runs_alternate_by_seed_and_matched_arms_come_last(done):
    _, _, titles = done
    assert titles == [
        "full, seed 0",
        "freezeout cubic 0.6, seed 0",
        "no-anneal cubic 0.6, seed 0",
        "no-anneal cubic 0.6, seed 1",
        "freezeout cubic 0.6, seed 1",
        "full, seed 1",
        "short cubic 0.6, seed 0",
        "short cubic 0.6, seed 1",
    ]


def test_summary_is_that_of_the_runs(done):
    out, summary, _ = done
    assert json.loads((out / "compare.json").read_text()) == summary
    results = {
        arm["name"]: [run_folder(out, arm["name"], seed).load_result() for seed in (0, 1)] for arm in summary["arms"]
    }
    assert len(results) == 4
    full = results["full"]
    for arm in summary["arms"]:
        runs = results[arm["name"]]
        accuracies = [run["test_accuracy"] for run in runs]
        assert arm["test_accuracy"] == spread(accuracies)
        assert arm["train_seconds"]["mean"] == pytest.approx(sum(run["train_seconds"] for run in runs) / 2, rel=1e-12)
        assert [run["test_accuracy"] for run in arm["runs"]] == accuracies
        if arm["kind"] != "full":
            gains = [run["test_accuracy"] - f["test_accuracy"] for run, f in zip(runs, full, strict=True)]
            ratios = [run["train_seconds"] / f["train_seconds"] for run, f in zip(runs, full, strict=True)]
            assert arm["accuracy_over_full"] == spread(gains)
            assert arm["seconds_over_full"] == spread(ratios)
    freezeout = summary["arms"][1]
    assert [t["step"] for t in freezeout["transitions"]] == [
        t["step"] for t in results[freezeout["name"]][0]["transitions"]
    ]
    assert freezeout["phases"][0]["memory_bytes"] == summary["arms"][0]["peak_memory_bytes"]
    assert freezeout["phases"][-1]["memory_bytes"] < freezeout["phases"][0]["memory_bytes"]
    assert summary["conditions"].keys() >= {"device", "cpu", "threads", "torch", "python", "commit", "freezeout_ext"}


def test_spread():
    assert spread([1.0, 2.0, 6.0]) == {"mean": 3.0, "sd": pytest.approx(7**0.5, rel=1e-15), "n": 3}
    assert spread([0.5]) == {"mean": 0.5, "sd": None, "n": 1}


def took(seconds, phases=({"steps": 100, "cpu_seconds_per_step": None},), graphs=None):
    return {"train_seconds": seconds, "total_steps": 100, "phases": phases, "graphs_compiled": graphs}


def test_other_programs_do_not_count_where_that_is_known():
    phases = [{"steps": 60, "cpu_seconds_per_step": 0.1}, {"steps": 40, "cpu_seconds_per_step": 0.05}]
    assert undisturbed_seconds(took(50.0, phases)) == pytest.approx(8.0)
    assert undisturbed_seconds(took(50.0, phases, {0: 3})) == 50.0
    assert undisturbed_seconds(took(50.0)) == 50.0


def test_matched_arms_take_the_other_arms_seconds(tmp_path):
    comparison = Comparison(BASE, tmp_path / "out", arms=[FULL, FREEZEOUT], seeds=[0, 1, 2], task=TASK)
    results = {
        FULL: {s: took(t) for s, t in enumerate((10.0, 10.0, 20.0))},
        FREEZEOUT: {s: took(t) for s, t in enumerate((8.0, 9.0, 14.0))},
    }
    # Ratios 0.8, 0.9, 0.7: the median is 0.8.
    assert comparison._matched_steps(Arm("short", 0.6, "cubic"), results) == 80
    assert comparison._matched_steps(Arm("const-time", 0.6, "cubic"), results) == 125
    assert comparison._matched_steps(FREEZEOUT, results) is None
    # A run that exists decides, whatever the seconds say now.
    run_folder(tmp_path / "out", "short cubic 0.6", 1).create(replace(BASE, steps=77))
    assert comparison._matched_steps(Arm("short", 0.6, "cubic"), results) == 77


def test_resume_trains_what_is_missing_and_keeps_the_rest(done):
    out, summary, _ = done
    kept = {path: path.read_bytes() for path in (out / "runs").rglob("*") if path.is_file()}
    lost = run_folder(out, "no-anneal cubic 0.6", 1)
    for path in lost.path.iterdir():
        path.unlink()
        del kept[path]
    again, _ = compare(out, make_arms(["short", "full", "freezeout", "no-anneal"], [0.6], ["cubic"]), resume=True)
    assert {path: path.read_bytes() for path in kept} == kept
    assert lost.load_result()["test_accuracy"] == summary["arms"][2]["runs"][1]["test_accuracy"]
    for a, b in zip(summary["arms"], again["arms"], strict=True):
        assert a["test_accuracy"] == b["test_accuracy"] and a["total_steps"] == b["total_steps"]


def test_another_base_is_refused_by_the_field(done):
    out, _, _ = done
    with pytest.raises(BadInput, match=r"another one: momentum is 0\.9 there, 0\.8 here"):
        compare(out, [FULL], base=replace(BASE, momentum=0.8), resume=True)
    with pytest.raises(BadInput, match="out must be a new or an empty folder"):
        compare(out, [FULL])
    with pytest.raises(BadInput, match="out must be a new or an empty folder"):
        compare(run_folder(out, "full", 0).path, [FULL], resume=True)


def test_bad_arms_leave_nothing_behind(tmp_path):
    # 0.1 cubed of 8 steps: the first layer would freeze within the warm-up.
    arms = make_arms(["full", "freezeout"], [0.1], ["cubic"])
    with pytest.raises(BadInput, match="warmup_steps must end before"):
        compare(tmp_path / "out", arms, base=replace(BASE, warmup_steps=2))
    assert not (tmp_path / "out").exists()


def test_tables_show_each_arm_and_each_transition(done):
    _, summary, _ = done
    text = as_text(comparison_blocks(summary))
    for arm in summary["arms"]:
        accuracy = arm["test_accuracy"]
        cell = f"{100 * accuracy['mean']:.2f} ± {100 * accuracy['sd']:.2f} (n=2)"
        assert any(line.startswith(arm["name"]) and cell in line for line in text.splitlines())
    section = text[text.index("between its transitions") :]
    for transition in summary["arms"][1]["transitions"]:
        assert f"{transition['num_frozen']} of 5  {', '.join(transition['layers'])}" in section
    assert "counted" in text and "1 thread;" in text and "wrn-10-1" in text


def test_tables_of_one_seed_have_no_spread(tmp_path):
    summary, _ = compare(tmp_path / "out", [FREEZEOUT], seeds=[5])
    (row,) = [line for line in as_text(comparison_blocks(summary)).splitlines() if "(n=1)" in line]
    assert "±" not in row
    assert "accuracy_over_full" not in summary["arms"][0]


def test_curves_are_the_logs(done):
    out, summary, _ = done
    found = curves(out, summary)
    assert found["full"][1] == RunFolder(out / "runs" / "full" / "seed-1").read_log()
    assert [len(runs) for runs in found.values()] == [2, 2, 2, 2]
