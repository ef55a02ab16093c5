"""flop_costs: FLOP by hand, and the savings that follow from them for the paper's nets."""

import pytest
import torch
from torch import nn

from freezeout_ext import Schedule
from freezeout_ext.models import build_model
from freezeout_ext.planner import flop_costs, predict

# cubic, t_0 = 0.8: percent saved with backward = 1x and 2x forward.
PAPER = {"wrn-40-4": (12.9, 17.3), "densenet-76-12": (17.6, 23.4), "vgg-16": (14.8, 19.8)}


def on_meta(name):
    with torch.device("meta"):
        return build_model(name, 100), torch.empty(2, 3, 32, 32)


@pytest.mark.parametrize("name", PAPER)
@pytest.mark.parametrize("backward", [1, 2])
def test_the_papers_nets_save_what_their_flop_say(name, backward):
    costs = flop_costs(*on_meta(name), backward=backward)
    saving = predict(costs, Schedule(len(costs.layers), 10**6, t_0=0.8, how_scale="cubic")).saving
    # The expected values are rounded to 0.1; 0.3 is what the head's share may change.
    assert 100 * saving == pytest.approx(PAPER[name][backward - 1], abs=0.1)


def test_the_share_of_the_head_changes_little():
    costs = flop_costs(*on_meta("vgg-16"))
    schedule = Schedule(14, 10**6)
    without = 2 / 3 * sum((1 - schedule.t(i)) * f for i, f in enumerate(costs.forward[:-1])) / sum(costs.forward[:-1])
    assert abs(predict(costs, schedule).saving - without) < 0.003


def test_counts_convolutions_and_linears_by_layer_and_leaves_the_model_alone():
    model = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.BatchNorm2d(5), nn.Flatten(), nn.Linear(5 * 16, 7))
    inputs = torch.randn(2, 3, 4, 4)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    costs = flop_costs(model, inputs, backward=1.5)
    conv, linear = 2 * 2 * 16 * 5 * 3 * 9, 2 * 2 * 80 * 7
    assert costs.forward == costs.frozen_forward == (conv, linear)
    assert costs.backward == costs.backward_first == (1.5 * conv, 1.5 * linear)
    assert (costs.unit, costs.step(0)) == ("FLOP", 2.5 * (conv + linear))
    assert model.training and model[1].training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_backward_must_be_positive():
    with pytest.raises(ValueError, match="backward must be > 0, got 0"):
        flop_costs(*on_meta("wrn-10-1"), backward=0)
