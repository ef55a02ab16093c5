"""What freezeout plan says of kept features: against the same run added up step by step, and what is really kept."""

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_tasks_kinds import classification

from freezeout_ext import FeatureCache
from freezeout_ext.features import spot
from freezeout_ext.features.worth import CALLS, Left, Times, reason_against
from freezeout_ext.planner import StepCosts
from freezeout_ext.planner.planning import plan_from_costs
from freezeout_ext.schedule import Schedule
from freezeout_ext.training import cli, train
from freezeout_ext.training.config import TrainConfig
from freezeout_ext.training.course import Length
from freezeout_ext.training.keeping import Keeping, KeptRun, Rows
from freezeout_ext.training.reporters import Reporter
from freezeout_ext.training.trainer import Trainer

pytestmark = pytest.mark.filterwarnings("ignore:only 2 layers were found", "ignore:layer .* holds .* of the trainable")

COSTS = StepCosts(
    layers=("a", "b", "c", "d"), forward=(1.0, 2.0, 3.0, 4.0), frozen_forward=(0.9, 1.8, 2.7, 4.0),
    backward=(2.0, 4.0, 6.0, 8.0), backward_first=(1.0, 2.0, 3.0, 4.0), optimizer=(0.4, 0.3, 0.2, 0.1), loss=0.5,
    loader=0.25,
)  # fmt: skip


class Known(Keeping):
    """Rows of 100, 200, ... bytes."""

    def _rows(self, k):
        return rows_of(k)


def rows_of(k):
    return Rows(100.0 * k, fill=0.002, gather=0.001)


def keeping(views, *, start, length, batch_size=8, deterministic=False):
    config = TrainConfig(cache="host", views=views, batch_size=batch_size, deterministic=deterministic)
    options = {"total_steps": length.total_steps, "warmup_steps": 0, "max_transitions": None, "start_frozen": start}
    return Known(None, config, plan_from_costs(COSTS, options, [0.5], ["linear"]), length)


def added_up(schedule, views):
    """The run's seconds, step by step, where rows are kept behind each freeze. `views`: in steps."""
    total, filled, before, checks = 0.0, 0, 0, spot.Schedule()
    fill, read = 8 * 0.002 + CALLS, 8 * 0.001 + CALLS
    for step in range(schedule.total_steps):
        k = schedule.num_frozen(step)
        if k > before:
            total += 3 * (sum(COSTS.frozen_forward[:k]) + sum(COSTS.forward[k:]))
            passed = sum(COSTS.frozen_forward[before:k])
            total += min(filled, schedule.total_steps - step) * (passed + fill)
            before = k
            checks.restart()
        if k and filled == views:
            total += COSTS.step(k, free_prefix=True) - COSTS.loader + read
            due = checks.due()
            checks.pass_on(done=due)
            total += due * (sum(COSTS.frozen_forward[:k]) + COSTS.loader)
        else:
            total += COSTS.step(k) + bool(k) * fill
            filled += bool(k)
    return total


@given(views=st.integers(1, 6), start=st.integers(0, 2), t_0=st.sampled_from([0.3, 0.6, 1.0]), each=st.integers(1, 7))
def test_the_saving_is_that_of_the_steps(views, start, t_0, each):
    length = Length(each, 5 * each, 0)
    found = keeping(views, start=start, length=length, deterministic=True).of(t_0, "linear")
    schedule = Schedule(4, 5 * each, t_0=t_0, how_scale="linear", start_frozen=start)
    if not schedule.num_frozen(5 * each - 1):
        return
    whole = 5 * each * COSTS.step(0)
    assert found.saving == pytest.approx(1 - added_up(schedule, views * each) / whole)
    assert found.bytes == views * 8 * each * 100 * schedule.num_frozen(5 * each - 1)


@given(views=st.integers(1, 6), t_0=st.sampled_from([0.3, 0.6, 1.0]), each=st.integers(4, 9))
def test_rows_are_kept_where_the_caches_own_judgement_keeps_them(views, t_0, each):
    schedule, steps = Schedule(4, 6 * each, t_0=t_0, how_scale="linear", start_frozen=1), 0
    found = KeptRun(COSTS, 8, rows_of).stretches(schedule, None, views * each)
    kept = 0
    for stretch in found:
        assert stretch.num_frozen == schedule.num_frozen(steps)
        if stretch.frontier != kept:
            times = Times.measured(
                8, layers=sum(COSTS.frozen_forward[kept : stretch.frontier]) / 8, wait=COSTS.loader / 8,
                forward=sum(COSTS.frozen_forward[: stretch.frontier]) + sum(COSTS.forward[stretch.frontier :]),
                gathered=0.001 if kept else None, fill=0.002, gather=0.001,
            )  # fmt: skip
            rows, left = views * each * 8, Left.of(schedule, steps, stretch.num_frozen).times(8)
            assert reason_against(times, left, rows, rows) is None
            kept = stretch.frontier
        steps += stretch.steps
    assert steps == 6 * each
    if views == 6:  # none is seen again
        assert not any(stretch.frontier for stretch in found)
        paid = 1 - sum(COSTS.step(schedule.num_frozen(step)) for step in range(steps)) / (steps * COSTS.step(0))
        nothing = keeping(views, start=1, length=Length(each, steps, 0)).of(t_0, "linear")
        assert (nothing.views, nothing.bytes) == (0, 0) and nothing.saving == pytest.approx(paid)


@given(st.floats(1.0, 2000.0))
def test_seconds_become_the_steps_of_a_run_that_keeps_features(seconds):
    def schedule(steps):
        return Schedule(4, steps, t_0=1.0, how_scale="linear", start_frozen=2)

    steps = KeptRun(COSTS, 8, rows_of, decides=False).steps_within(seconds, schedule, 20)
    assert steps == 1 or added_up(schedule(steps), 20) <= seconds
    assert added_up(schedule(steps + 1), 20) > seconds


def test_seconds_become_steps_by_what_a_step_costs_where_nothing_is_kept():
    run = KeptRun(COSTS, 8, lambda num_frozen: None)
    for start in (0, 2):
        seconds = 10.5 * COSTS.step(start)
        assert run.steps_within(seconds, lambda n, k=start: Schedule(4, n, t_0=1.0, start_frozen=k), 9) == 10
    assert run.steps_within(0.1, lambda n: Schedule(4, n, t_0=1.0), 9) == 1


def test_auto_takes_none_where_none_would_be_read_again_and_some_where_they_would():
    paid = 1 - COSTS.step(2) / COSTS.step(0)
    some = keeping("auto", start=2, length=Length(10, 40, 0)).of(1.0, "linear")
    assert some.views and some.saving > paid
    none = keeping("auto", start=2, length=Length(10, 10, 0)).of(1.0, "linear")
    assert none.views == none.bytes == 0 and none.saving == pytest.approx(paid)


@pytest.mark.parametrize("views", ["2", "auto"])
def test_plan_says_what_would_be_kept(views, tmp_path, capsys):
    flags = "--data digits --model wrn-10-1 --steps 60 --threads 1 --device cpu --rounds 1 --t0 1 --start-frozen 2"
    path = tmp_path / "plan.json"
    words = [*flags.split(), "--how-scale", "linear", "--cache", "--views", views, "--json", str(path)]
    words += ["--deterministic"] if views == "2" else []  # then rows are kept, whatever the clock says
    assert cli.main(["plan", *words]) == 0
    assert "saving, kept" in capsys.readouterr().out
    written = json.loads(path.read_text())
    (kept,) = written["kept"]
    # What never trains is there to be measured all the same.
    assert written["plans"][0]["costs"]["layers"][0] == "stem" and written["plans"][0]["schedule"]["start_frozen"] == 2
    assert kept["views"] == 2 if views == "2" else kept["views"] <= 8
    assert cli.main(["plan", *words, "--no-measure"]) == 2
    assert "--cache needs measured times" in capsys.readouterr().err


def test_the_bytes_that_are_said_are_those_that_are_kept(tmp_path, monkeypatch):
    """But for samples that divide into no whole batch, of a data set that makes whole batches and keeps no targets."""
    options = {"epochs": 6, "t_0": 1.0, "start_frozen": 1, "views": 2, "cache": "host", "threads": 1, "device": "cpu"}
    task = classification()
    # By the clock keeping does not pay on a net as small as this one.
    monkeypatch.setattr(
        "freezeout_ext.training.feed.FeatureCache", lambda *a, **k: FeatureCache(*a, **k | {"measure": False})
    )
    features = train(task, tmp_path / "run", reporter=Reporter(), method="no-anneal", **options)["features"]
    config = replace(TrainConfig.of_task(task), **options).resolved()
    trainer = Trainer(replace(config, method="full", start_frozen=0, cache=None), task)
    plan = plan_from_costs(
        flat_costs(trainer.layer_names), {"total_steps": trainer.total_steps, "start_frozen": 1}, [1.0], ["linear"]
    )
    (kept,) = Keeping(trainer, config, plan, trainer.length).predicted()
    samples = trainer.length.steps_per_epoch * config.batch_size
    assert kept.bytes / (2 * samples) == features["bytes"] / features["rows"]
    assert features["rows"] == features["of_rows"] > 0


def flat_costs(layers):
    ones = tuple(1.0 for _ in layers)
    return StepCosts(tuple(layers), ones, ones, ones, ones, ones)
