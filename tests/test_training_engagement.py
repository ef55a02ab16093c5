"""Predicted beside measured: the ratios by hand, the warnings and their causes, and costs for a real run."""

import math
from dataclasses import replace

import pytest
import torch

from freezeout_ext import find_layers
from freezeout_ext.planner import StepCosts
from freezeout_ext.tasks.images import image_task, load_data
from freezeout_ext.training.config import TrainConfig
from freezeout_ext.training.costing import kept_costs, run_costs
from freezeout_ext.training.engagement import (
    engaged,
    judged,
    over_runs,
    warnings_of,
    whole_run,
    with_engagement,
)
from freezeout_ext.training.tables import engagement_text, phases_rows

# A whole step of 10, of 8 with one layer frozen and of 5 with two.
COSTS = StepCosts(
    layers=("a", "b", "c"),
    forward=(1.0, 1.0, 1.0),
    frozen_forward=(1.0, 1.0, 1.0),
    backward=(2.0, 3.0, 2.0),
    backward_first=(2.0, 3.0, 2.0),
    optimizer=(0.0, 0.0, 0.0),
    source="worked out by hand",
)


def phase(num_frozen, seconds, error=0.0, steps=10):
    return {
        "num_frozen": num_frozen,
        "first_step": 10 * num_frozen,
        "steps": steps,
        "seconds_per_step": seconds,
        "seconds_error": error,
        "memory_bytes": 2**20,
    }


def transition(num_frozen, before, after):
    return {
        "step": 10 * num_frozen,
        "num_frozen": num_frozen,
        "layers": ["ab"[num_frozen - 1]],
        "parameters_frozen": 1,
        "seconds_per_step_before": before,
        "seconds_per_step_after": after,
    }


def test_engagement_is_measured_over_predicted():
    rows = engaged(
        [transition(1, 0.2, 0.17), transition(2, 0.17, 0.12)],
        [phase(0, 0.2, 0.003), phase(1, 0.17, 0.004), phase(2, 0.12)],
        replace(COSTS, saving_error=(0.0, 0.03, 0.04)),
    )
    assert [row["predicted_saving"] for row in rows] == pytest.approx([0.2, 0.5])
    assert [row["measured_saving"] for row in rows] == pytest.approx([0.15, 0.4])
    assert [row["engagement"] for row in rows] == pytest.approx([0.75, 0.8])
    assert [row["predicted_drop"] for row in rows] == pytest.approx([0.2, 0.3])
    assert [row["measured_drop"] for row in rows] == pytest.approx([0.15, 0.25])
    assert [row["drop_error"] for row in rows] == pytest.approx([0.005 / 0.2, 0.004 / 0.2])
    assert rows[0]["layers"] == ["a"]
    # The ratio a / w of two times has the relative error of both.
    errors = [math.hypot(0.004 / 0.17, 0.003 / 0.2) * 0.17 / 0.2, 0.003 / 0.2 * 0.12 / 0.2]
    assert [row["measured_error"] for row in rows] == pytest.approx(errors)
    assert [row["engagement_error"] for row in rows] == pytest.approx(
        [0.75 * math.hypot(errors[0] / 0.15, 0.03 / 0.2), 0.8 * math.hypot(errors[1] / 0.4, 0.04 / 0.5)]
    )


@pytest.mark.parametrize(
    ("measured_error", "predicted_error", "told"), [(0.02, 0.01, True), (0.04, 0, False), (0.01, 0.04, False)]
)
def test_no_ratio_of_what_is_within_the_noise(measured_error, predicted_error, told):
    row = judged(
        {
            "predicted_saving": 0.1,
            "predicted_error": predicted_error,
            "measured_saving": 0.08,
            "measured_error": measured_error,
        }
    )
    assert (row["engagement"] == pytest.approx(0.8)) if told else (row["engagement"] is row["engagement_error"] is None)


def test_of_several_runs_the_error_is_that_of_their_mean():
    runs = [
        engaged([transition(1, 0.2, a)], [phase(0, 0.2, 0.001), phase(1, a, 0.001)], COSTS) for a in (0.15, 0.16, 0.17)
    ]
    (row,) = over_runs(runs)
    assert (row["measured_saving"], row["measured_drop"]) == pytest.approx((0.2, 0.2))
    assert (row["measured_error"], row["drop_error"]) == pytest.approx((0.05 / 3**0.5,) * 2)
    assert row["engagement"] == pytest.approx(1.0) and row["engagement_error"] == pytest.approx(0.25 / 3**0.5)
    assert over_runs(runs[:1]) == runs[0]
    # Equal runs by chance: what scatters within them is left.
    (row,) = over_runs([runs[1]] * 3)
    assert row["measured_error"] == pytest.approx(runs[1][0]["measured_error"] / 3**0.5) and row["drop_error"] > 0
    assert over_runs([runs[0], engaged([transition(1, 0.2, None)], [phase(0, 0.2)], COSTS)])[0]["engagement"] is None


def test_cpu_time_goes_before_the_clock():
    phases = [
        {**phase(0, 0.2), "cpu_seconds_per_step": 0.1, "cpu_seconds_error": 0.0},
        {**phase(1, 0.3), "cpu_seconds_per_step": 0.08, "cpu_seconds_error": 0.0},
    ]
    found = with_engagement({"transitions": [transition(1, 0.2, 0.3)], "phases": phases}, COSTS, {})
    assert found["transitions"][0]["measured_saving"] == pytest.approx(0.2)
    assert found["engagement"]["whole_run"]["measured_saving"] == pytest.approx(0.1)
    assert "of the CPU time of a step" in engagement_text(found)


def test_a_phase_without_a_timed_step_has_no_engagement():
    rows = engaged([transition(1, 0.2, None), transition(2, None, 0.1)], [phase(0, 0.2), phase(1, None)], COSTS)
    assert [row["engagement"] for row in rows] == [None, None]
    assert rows[0]["predicted_saving"] == pytest.approx(0.2)
    assert warnings_of(rows, COSTS, {}) == []


def test_the_run_saves_the_mean_over_its_steps():
    phases = [phase(0, 0.2, 0.002, 50), phase(1, 0.17, 0.003, 30), phase(2, 0.12, 0.004, 20)]
    row = whole_run(phases, replace(COSTS, saving_error=(0.0, 0.01, 0.02)))
    assert row["predicted_saving"] == pytest.approx(0.3 * 0.2 + 0.2 * 0.5)
    assert row["measured_saving"] == pytest.approx(0.3 * 0.15 + 0.2 * 0.4)
    assert row["predicted_error"] == pytest.approx(0.3 * 0.01 + 0.2 * 0.02)
    # By small changes of each time.
    changes = []
    for k in range(3):
        moved = [p | {"seconds_per_step": p["seconds_per_step"] + 1e-6 * (j == k)} for j, p in enumerate(phases)]
        slope = (whole_run(moved, COSTS)["measured_saving"] - row["measured_saving"]) / 1e-6
        changes.append(slope * phases[k]["seconds_error"])
    assert row["measured_error"] == pytest.approx(math.hypot(*changes), rel=1e-4)
    assert row["engagement"] == pytest.approx(0.125 / 0.16)
    assert whole_run([phase(1, 0.2)], COSTS)["measured_saving"] is None
    assert whole_run([phase(0, None)], COSTS)["engagement"] is None


@pytest.mark.parametrize(
    ("after", "error", "warns"), [(0.199, 0.001, True), (0.19, 0.001, False), (0.199, 0.02, False)]
)
def test_warns_of_a_transition_that_clearly_shortened_nothing(after, error, warns):
    phases = [phase(0, 0.2, error), phase(1, after)]
    rows = engaged([transition(1, 0.2, after)], phases, COSTS)
    found = warnings_of(rows, COSTS, {"device": "cpu"})
    assert len(found) == warns
    if warns:
        assert found[0].startswith(
            "step 10: freezing a should have saved 20.0 % of a step and saved 0.5 %. Likely causes:"
        )
        assert "other work on this machine" in found[0]


@pytest.mark.parametrize(
    ("config", "costs", "cause"),
    [
        ({}, replace(COSTS, loader=20.0), "waits for the loader (20000.00 ms a batch)"),
        ({"device": "cuda"}, COSTS, "waits for the host"),
        ({"compile": True}, COSTS, "recompiled"),
        ({"prefix": "folded"}, COSTS, "prefix=folded"),
        ({"device": "cuda", "graph": True, "prefix": "exact"}, COSTS, None),
    ],
)
def test_names_the_causes_that_fit(config, costs, cause):
    rows = engaged([transition(1, 0.2, 0.2)], [phase(0, 0.2), phase(1, 0.2)], costs)
    (text,) = warnings_of(rows, costs, config)
    causes = text.partition("Likely causes: ")[2].split("; ")
    assert len(causes) == (2 if cause is None else 3)
    assert cause is None or cause in causes[0]


def test_table_and_text():
    result = {
        "transitions": [transition(1, 0.2, 0.2), transition(2, 0.2, 0.1)],
        "phases": [phase(0, 0.2), phase(1, 0.2, 0.02), phase(2, 0.1, 0.002)],
    }
    found = with_engagement(result, replace(COSTS, saving_error=(0.0, 0.01, 0.01)), {"device": "cpu"})
    header, whole, first, second = phases_rows(found["phases"], found["transitions"], 3)
    assert header == (
        "from step", "frozen", "newly frozen", "steps", "ms/step", "peak MiB", "saved, predicted", "measured",
        "engagement",
    )  # fmt: skip
    assert whole == ("0", "0 of 3", "", "10", "200.00", "1.0", "", "", "")
    assert first == ("10", "1 of 3", "a", "10", "200.00", "1.0", "20.0 ± 1.0 %", "0.0 ± 10.0 %", "in the noise")
    assert second == ("20", "2 of 3", "b", "10", "100.00", "1.0", "50.0 ± 1.0 %", "50.0 ± 1.0 %", "1.00 ± 0.03")
    assert [row[:6] for row in phases_rows(result["phases"], result["transitions"], 3)] == [
        row[:6] for row in (header, whole, first, second)
    ]
    text = engagement_text(found)
    assert "predicted: worked out by hand" in text
    assert "all steps: predicted 23.3 ± 0.7 %, measured 16.7 ± 3.3 %, engagement 0.71 ± 0.15" in text
    assert "warning: " not in text
    exact = with_engagement({**result, "phases": [phase(0, 0.2), phase(1, 0.2), phase(2, 0.1)]}, COSTS, {})
    assert engagement_text(exact).count("warning: ") == 1
    assert engagement_text(result) == ""


@pytest.fixture(scope="module")
def digits():
    return image_task(load_data("digits"), BASE.model)


BASE = TrainConfig(model="wrn-10-1", batch_size=16, steps=300, threads=1, device="cpu")


def test_costs_of_a_run_are_measured_with_its_own_batches(digits):
    torch.manual_seed(5)
    state = torch.get_rng_state()
    costs = run_costs(BASE.resolved(), digits)
    assert torch.equal(torch.get_rng_state(), state)
    # A round of 8 + 5 steps twice fits into a tenth of 300.
    assert costs.unit == "s" and "batch 16" in costs.source and "of 2 rounds" in costs.source
    assert costs.loader > 0 and not costs.loader_ahead
    assert len(costs.layers) == 5


def test_a_run_too_short_to_measure_gets_flop(digits):
    config = replace(BASE, steps=20).resolved()
    costs = run_costs(config, digits)
    assert costs.unit == "FLOP" and costs.whole_step is None
    assert run_costs(config, digits, runs=7).unit == "s"


def test_costs_are_kept(digits, tmp_path):
    config = replace(BASE, steps=20).resolved()
    names = [layer.name for layer in find_layers(digits.make_model())]
    costs = kept_costs(tmp_path / "costs.json", config, digits, names)
    assert kept_costs(tmp_path / "costs.json", replace(config, lr=0.5), digits, names) == costs
    with pytest.raises(ValueError, match=r"costs\.json must hold this net's costs: its layers are stem, .*; delete it"):
        kept_costs(tmp_path / "costs.json", config, digits, names[1:])


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "[]",
        lambda text: "[" * 100_000,
        lambda text: text.replace("0", "NaN", 1),
        lambda text: text.replace('"loss"', '"lost"'),
        lambda text: text.replace('"forward": [', '"forward": ["x", '),
    ],
)
def test_damaged_costs_are_one_sentence(digits, tmp_path, change):
    names = [layer.name for layer in find_layers(digits.make_model())]
    path = tmp_path / "costs.json"
    kept_costs(path, replace(BASE, steps=20).resolved(), digits, names)
    path.write_text(change(path.read_text()))
    with pytest.raises(
        ValueError, match=r"costs\.json must hold this net's costs: .*; delete it, they are measured anew"
    ):
        kept_costs(path, BASE.resolved(), digits, names)
