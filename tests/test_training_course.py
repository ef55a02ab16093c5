"""The course of a run: its length, and a tail that thaws, which resumes bit for bit."""

from dataclasses import replace

import pytest
import torch

from freezeout_ext import Layer, Layers, Schedule
from freezeout_ext.planner.costs import Tail
from freezeout_ext.tasks import Task
from freezeout_ext.tasks.device_data import DeviceData
from freezeout_ext.training.arms import Arm
from freezeout_ext.training.config import BadInput, TrainConfig, parsed_thaw
from freezeout_ext.training.course import Length, freezing_options, has_whole_steps, tail_of
from freezeout_ext.training.reporters import Reporter
from freezeout_ext.training.run import Run
from freezeout_ext.training.tables import as_text, run_blocks, transition_line
from freezeout_ext.training.trainer import Trainer

LAYERS = Layers([Layer(name, {}, {}, ()) for name in "abcd"])
BASE = TrainConfig(data="made", model="own", batch_size=8, optimizer="adamw", threads=1, device="cpu", steps=20)
HALF = replace(BASE, method="no-anneal", start_frozen=2, t_0=1.0)


def make_model():
    return torch.nn.Sequential(*(torch.nn.Sequential(torch.nn.Linear(6, 6), torch.nn.Tanh()) for _ in range(4)))


def task():
    drawn = torch.Generator().manual_seed(0)
    inputs = torch.randn(32, 6, generator=drawn)
    data = DeviceData(inputs, inputs.argmax(1))
    return Task(make_model=make_model, train=data, evaluation=data)


def trainer(config):
    return Trainer(config.resolved(), task())


def test_a_length_counts_whole_batches():
    length = Length.of(replace(BASE, steps=None, epochs=3, warmup_epochs=0.5), 35)
    assert length == Length(steps_per_epoch=4, total_steps=12, warmup_steps=2) and length.epochs == 3
    short = Length.of(replace(BASE, steps=10), 35)
    assert (short.epochs, [short.end_of(epoch) for epoch in (1, 2, 3)]) == (3, [4, 8, 10])
    assert Length.of(BASE, 3).steps_per_epoch == 1  # the one batch is smaller


@pytest.mark.parametrize(("text", "found"), [("0@0.8", (0, 0.8)), ("blocks.2@75%", ("blocks.2", 0.75))])
def test_a_thaw_is_read(text, found):
    assert parsed_thaw(text) == found


@pytest.mark.parametrize("text", ["0", "@0.5", "0@", "0@1", "0@0", "0@nan", "0@80", "0@-0.1"])
def test_a_thaw_that_says_nothing_is_refused(text):
    with pytest.raises(ValueError, match="thaw_to must be LAYER@PART with a part of the run in"):
        replace(HALF, thaw_to=text).resolved()


def test_a_tail_must_lie_inside_the_run_and_thaw_something():
    length = Length.of(HALF, 32)
    assert tail_of(replace(HALF, thaw_to="a@0.75"), length, LAYERS) == Tail(15, 1)
    assert tail_of(HALF, length, LAYERS) is None
    stages = Layers([Layer(name, {}, {}, ()) for name in ("stem", "body.0", "body.1", "head")])
    assert tail_of(replace(HALF, thaw_to="body@0.75"), length, stages) == Tail(15, 3)
    with pytest.raises(ValueError, match="one behind it, got step 20 of 20"):
        tail_of(replace(HALF, thaw_to="0@0.99"), length, LAYERS)
    with pytest.raises(ValueError, match="thaw_to must name a layer, nothing is called 'e'; the layers are a, b, c, d"):
        tail_of(replace(HALF, thaw_to="e@0.5"), length, LAYERS)
    with pytest.raises(ValueError, match="fewer layers frozen than are at step 10, 2, got 2"):
        freezing_options(replace(HALF, thaw_to="b@0.5"), length, LAYERS)
    with pytest.raises(ValueError, match="thaw_to must be None where no layer freezes"):
        replace(BASE, method="full", thaw_to="0@0.5").resolved()


def test_no_layer_freezes_in_the_tail():
    config = replace(BASE, t_0=0.2, how_scale="linear", thaw_to="0@0.5")
    rule = Schedule(4, 20, t_0=0.2, how_scale="linear")
    assert [rule.milestone(i) for i in range(4)] == pytest.approx([4, 28 / 3, 44 / 3, 20])
    options = freezing_options(config, Length.of(config, 32), LAYERS)
    # The second layer would freeze in step 10, in which the tail begins.
    assert options["milestones"] == [rule.t(0), 1.0, 1.0, 1.0]
    later = freezing_options(replace(config, thaw_to="0@0.55"), Length.of(config, 32), LAYERS)
    assert later["milestones"] == [rule.t(0), rule.t(1), 1.0, 1.0]


@pytest.mark.parametrize("changes", [{}, {"method": "freezeout", "start_frozen": 0, "t_0": 0.2}])
def test_a_run_thaws_at_its_step_and_trains_all_to_the_end(changes):
    run = trainer(replace(HALF, thaw_to="0@0.6", **changes))
    before = [p.detach().clone() for p in run.model[0].parameters()]
    rows = [run.train_epoch() for _ in range(5)]
    assert [row["num_frozen"] for row in rows[2:]] == [0, 0, 0]
    assert rows[2]["step"] == 12 and [t["step"] for t in rows[2]["transitions"] if t["by_hand"]] == [12]
    assert not any(torch.equal(p, q) for p, q in zip(run.model[0].parameters(), before, strict=True))
    assert sum(phase.steps for phase in run.phases) == 20
    last = run.phases[-1]
    assert (last.num_frozen, last.first_step, last.steps) == (0, 12, 8)


def test_thawed_layers_train_at_the_rate_of_the_others_from_their_first_step_on():
    run = trainer(replace(HALF, thaw_to="0@0.6"))
    rates = []
    run.optimizer.register_step_pre_hook(
        lambda optimizer, *_: rates.append([group["lr"] for group in optimizer.param_groups if not group.get("frozen")])
    )
    for _ in range(5):
        run.train_epoch()
    cosine = Schedule(1, 20, t_0=1.0)
    assert [set(each) for each in rates] == [{0.001 * cosine.lr_factor(0, step)} for step in range(20)]
    assert [len(each) for each in rates[11:13]] == [2, 4]


@pytest.mark.parametrize("cache", [None, "device"])
@pytest.mark.parametrize("part", [0.5, 0.6, 0.7])
def test_a_run_with_a_tail_resumes(tmp_path, part, cache):
    """The thaw is within an epoch, or with its last step, before and behind the stop at step 12."""
    config = replace(HALF, thaw_to=f"1@{part}", cache=cache, views=1)

    class Stop(Reporter):
        def epoch(self, row):
            if row["epoch"] == 3:
                raise KeyboardInterrupt

    whole = Run.prepare(config, tmp_path / "whole", task=task())
    result = whole.train(Reporter())
    with pytest.raises(KeyboardInterrupt):
        Run.prepare(config, tmp_path / "stopped", task=task()).train(Stop())
    resumed = Run.prepare(config, tmp_path / "stopped", task=task(), resume=True)
    resumed.train(Reporter())
    # What memory kept is computed anew, in other batches: equal within rounding.
    tolerance = {"rtol": 0, "atol": 0} if cache is None else {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(resumed.trainer.model.state_dict(), whole.trainer.model.state_dict(), **tolerance)
    assert resumed.trainer.num_frozen == 1
    (started, thawed) = result["transitions"]
    assert (started["num_frozen"], thawed["num_frozen"], thawed["step"]) == (2, 1, round(part * 20))
    assert "thawed: 1.0" in as_text(run_blocks(result))
    assert transition_line(thawed, 4).startswith(f"step {thawed['step']}: thawed 1.0 (still frozen: 1 of 4 layers; 42 ")


def test_steps_with_nothing_frozen_are_there_before_the_first_freeze_or_in_a_tail():
    assert has_whole_steps(BASE) and not has_whole_steps(HALF) and not has_whole_steps(replace(HALF, start_frozen="b"))
    assert has_whole_steps(replace(HALF, thaw_to="0@0.5")) and not has_whole_steps(replace(HALF, thaw_to="1@0.5"))


def test_a_tail_of_another_run_is_not_resumed(tmp_path):
    Run.prepare(replace(HALF, thaw_to="0@0.5"), tmp_path / "run", task=task()).train(Reporter())
    with pytest.raises(BadInput, match=r"thaw_to is '0@0\.5' there, None here"):
        Run.prepare(HALF, tmp_path / "run", task=task(), resume=True)


def test_full_training_in_a_comparison_has_no_tail():
    config = replace(HALF, thaw_to="0@0.5")
    assert Arm("full").config(config, 0).thaw_to is None
    assert Arm("cached", 1.0, "linear").config(config, 0).thaw_to == "0@0.5"
