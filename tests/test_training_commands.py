"""freezeout plan on the command line: tables, JSON, heat map, suggestions; and the chart by itself."""

import json

import pytest

from freezeout_ext.planner import Plan
from freezeout_ext.training import cli
from freezeout_ext.training.options import saving
from freezeout_ext.training.plot import plot_plan

PNG = b"\x89PNG\r\n\x1a\n"


def test_flop_need_no_data(tmp_path, capsys):
    files = tmp_path / "new" / "plan.json", tmp_path / "plan.png"
    flags = [
        "plan",
        "--data",
        "cifar100",
        "--model",
        "wrn-40-4",
        "--no-measure",
        "--want",
        "15%",
        "--how-scale",
        "cubic",
        "linear",
        "--t0",
        "0.8",
        "0.5",
    ]
    assert cli.main([*flags, "--json", str(files[0]), "--png", str(files[1])]) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    # The paper's model, and with a backward pass of 2x forward.
    assert "12.9 %" in shown.out and "17.3 %" in shown.out
    assert "backward = 1 x forward" in shown.out and "backward = 2 x forward" in shown.out
    assert "cubic, wanted" not in shown.out and shown.out.count("(wanted 15 %)") == 4
    assert files[1].read_bytes().startswith(PNG)
    values = json.loads(files[0].read_text())
    assert [len(plan["predictions"]) for plan in values["plans"]] == [4, 4]
    assert values["plans"][0]["schedule"]["total_steps"] == 30 * 781  # whole batches of 64
    assert values["plans"][0]["costs"]["forward"][0] == 2 * 64 * 32 * 32 * 16 * 27  # the stem's convolution
    assert [[s["how_scale"] for s in found] for found in values["suggestions"]] == [["cubic", "linear"]] * 2
    assert all(s["saving"] >= 0.15 and s["t_0"] for found in values["suggestions"] for s in found)


@pytest.mark.parametrize("data", ["digits", "cifar10"])
def test_layers_are_measured(data, tmp_path, capsys):
    flags = f"plan --data {data} --model wrn-10-1 --batch-size 4 --rounds 1 --steps 50 --threads 1 --device cpu".split()
    assert cli.main([*flags, "--json", str(tmp_path / "plan.json")]) == 0
    shown = capsys.readouterr().out
    assert ("measured on random images" in shown) == (data == "cifar10")
    assert "add up to" in shown and "loader: " in shown and "optimizer: " in shown
    values = json.loads((tmp_path / "plan.json").read_text())
    (plan,) = values["plans"]
    assert plan["costs"]["unit"] == "s" and plan["schedule"]["total_steps"] == 50
    assert values["conditions"]["threads"] == 1
    assert {"linear", "squared", "cubic"} == {p["how_scale"] for p in plan["predictions"]}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--model wrn-41-1", "depth"),
        ("--t0 1.5", "t_0 must be in (0, 1], got 1.5"),
        ("--how-scale half", "how_scale must be one of"),
        ("--want 120%", "a saving must lie between 0% and 100%"),
        ("--want lots", "a saving must lie between 0% and 100%"),
        ("--rounds 0 --steps 5", "rounds must be >= 1, got 0"),
    ],
)
def test_bad_input_is_one_sentence(flags, message, capsys):
    measure = [] if "rounds" in flags else ["--no-measure"]
    try:
        status = cli.main(["plan", *measure, *flags.split()])
    except SystemExit as error:
        status = error.code
    shown = capsys.readouterr()
    assert status == 2 and message in shown.err and shown.err.count("\n") == 1


def test_savings_are_read_with_and_without_percent():
    assert saving("20%") == saving("20 %") == saving("0.2") == 0.2


def test_the_chart_shows_each_saving_once(tmp_path):
    from freezeout_ext.planner import StepCosts, plan_from_costs

    ones = (1.0, 1.0, 1.0)
    costs = StepCosts(("a", "b", "c"), ones, ones, ones, ones, ones, source="by hand")
    plan = plan_from_costs(costs, {"total_steps": 100}, [0.5, 0.8], ["linear", 2.5])
    assert isinstance(plan, Plan)
    heat, bars, *_ = plot_plan(plan, "net").axes
    cells = [text.get_text() for text in heat.texts]
    assert cells == [f"{100 * p.saving:.1f} %\n(≤ {100 * p.ceiling:.1f})" for p in plan.predictions]
    assert [label.get_text() for label in heat.get_yticklabels()] == ["linear", "2.5"]
    assert bars.get_title() == "by hand"
