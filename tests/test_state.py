"""FreezeOut's state: what a resumed run ends in, and what is refused of a state."""

import copy
import io

import pytest
import torch
from prefix_cases import ShyOfHooks
from test_freezeout import TOTAL_STEPS, assert_same, controlled, train
from torch import nn


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("stop", [0, 7, 8, 15, 23])  # the first layer freezes at step 8
@pytest.mark.parametrize("optimizer_first", [True, False])
def test_resume_is_bit_identical(optimizer, stop, optimizer_first):
    model, opt, freezeout = controlled(optimizer)
    train(model, opt, freezeout, range(stop))
    stored = io.BytesIO()
    torch.save(
        {"model": model.state_dict(), "optimizer": opt.state_dict(), "freezeout": freezeout.state_dict()}, stored
    )
    train(model, opt, freezeout, range(stop, TOTAL_STEPS))

    stored.seek(0)
    state = torch.load(stored, weights_only=True)
    resumed, resumed_opt, resumed_freezeout = controlled(optimizer)
    resumed.load_state_dict(state["model"])
    loads = [(resumed_opt, "optimizer"), (resumed_freezeout, "freezeout")]
    for target, key in loads if optimizer_first else reversed(loads):
        target.load_state_dict(state[key])
    train(resumed, resumed_opt, resumed_freezeout, range(stop, TOTAL_STEPS))
    assert_same(resumed.state_dict(), model.state_dict())
    assert [t.step for t in resumed_freezeout.transitions] == [t.step for t in freezeout.transitions]


def test_resume_leaves_no_hooks_on_frozen_modules():
    def run(steps, state=None):
        torch.manual_seed(0)
        head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1, 10))
        model, optimizer, freezeout = controlled(model=nn.Sequential(ShyOfHooks(1), ShyOfHooks(1), head))
        for target, values in zip((model, freezeout, optimizer), state or (), strict=False):
            target.load_state_dict(values)
        train(model, optimizer, freezeout, steps)
        return copy.deepcopy([target.state_dict() for target in (model, freezeout, optimizer)])

    whole = run(range(TOTAL_STEPS))
    assert_same(run(range(15, TOTAL_STEPS), run(range(15)))[0], whole[0])


def test_going_back_to_an_earlier_step_thaws():
    model, optimizer, freezeout = controlled()
    start = copy.deepcopy((model.state_dict(), optimizer.state_dict(), freezeout.state_dict()))
    train(model, optimizer, freezeout, range(14))
    after = copy.deepcopy(model.state_dict())
    for target, state in zip((model, optimizer, freezeout), start, strict=True):
        target.load_state_dict(state)
    assert freezeout.num_frozen == 0 and all(p.requires_grad for p in model.parameters())
    assert all(module.training for module in model.modules())
    train(model, optimizer, freezeout, range(14))
    assert_same(model.state_dict(), after)


def test_a_state_of_another_run_is_refused_and_changes_nothing():
    model, optimizer, freezeout = controlled()
    train(model, optimizer, freezeout, range(14))
    state = freezeout.state_dict()
    _, _, other = controlled(total_steps=30)
    with pytest.raises(ValueError, match="total_steps is 24 there, 30 here"):
        other.load_state_dict(state)
    _, _, other = controlled(layers=["stem", "blocks*", "head"])
    with pytest.raises(ValueError, match="same schedule, num_layers"):
        other.load_state_dict(state)
    assert other.num_frozen == 0 and other.step_count == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step": -1}, r"state_dict\['step'\] must be a whole number in 0..24, got -1"),
        ({"step": 1.5}, r"\['step'\] must be a whole number in 0..24, got 1.5"),
        ({"step": 10**9}, r"\['step'\] must be a whole number in 0..24, got 1000000000"),
        ({"step": True}, r"\['step'\] must be a whole number"),
        ({"step": None}, r"\['step'\] must be a whole number"),
        ({"transitions": [{}]}, r"state_dict\['transitions'\]\[0\] must have the entries"),
        ({"transitions": [3]}, r"\['transitions'\]\[0\] must be a dict, got int"),
        ({"transitions": "none"}, r"\['transitions'\] must be a list, got str"),
        ({"schedule": 3}, r"\['schedule'\] must be a dict, got int"),
        ({"layers": ["stem"]}, "must be of the same layers, got "),
        ({"layers": None}, "must be of the same layers, got None"),
        ({"by_hand": 3}, r"\['by_hand'\] must be None or \(step, number of layers\), got 3"),
        ({"by_hand": (20, 1)}, r"\['by_hand'\] must be a whole number in 0..16, got 20"),
        ({"by_hand": (3, 5)}, r"\['by_hand'\] must be a whole number in 0..4, got 5"),
    ],
)
def test_a_damaged_state_is_named_and_freezes_nothing(change, message):
    _, optimizer, freezeout = controlled()
    rates = freezeout.learning_rates()
    state = {**freezeout.state_dict(), "step": 16, **change}
    with pytest.raises((ValueError, TypeError), match=message):
        freezeout.load_state_dict(state)
    with pytest.raises(TypeError, match="state_dict must be a dict, got list"):
        freezeout.load_state_dict([])
    with pytest.raises(ValueError, match="schedule, layers, transitions is missing"):
        freezeout.load_state_dict({"step": 3})
    assert (freezeout.num_frozen, freezeout.step_count, freezeout.transitions) == (0, 0, [])
    assert freezeout.learning_rates() == rates and not any(group["frozen"] for group in optimizer.param_groups)


def test_a_run_beyond_its_end_and_a_state_of_an_earlier_release_can_be_loaded():
    model, optimizer, freezeout = controlled()
    train(model, optimizer, freezeout, range(TOTAL_STEPS))
    with pytest.warns(UserWarning, match="beyond total_steps"):
        freezeout.step()
    state = freezeout.state_dict()
    _, _, resumed = controlled()
    for key in ("start_frozen", "milestones"):
        del state["schedule"][key]
    del state["by_hand"]
    for transition in state["transitions"]:
        del transition["by_hand"]
    resumed.load_state_dict(state)
    assert resumed.num_frozen == 4 and resumed.step_count == TOTAL_STEPS
