"""The optimizer's groups under FreezeOut: how they are split, their rates, and LR schedulers beside them."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from test_freezeout import OPTIMIZERS, TOTAL_STEPS, batch, controlled, small_net, train
from torch import nn

from freezeout_ext.checks import SchedulerConflict
from freezeout_ext.freezeout import FreezeOut


def test_optimizer_state_dict_round_trips_after_freezes():
    model, optimizer, freezeout = controlled()
    train(model, optimizer, freezeout, range(14))
    state = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(state)
    again = optimizer.state_dict()
    assert again["param_groups"] == state["param_groups"]
    assert again["state"].keys() == state["state"].keys()
    for key, values in state["state"].items():
        assert torch.equal(again["state"][key]["momentum_buffer"], values["momentum_buffer"])
    frozen = {p for group in optimizer.param_groups if group["frozen"] for p in group["params"]}
    assert frozen and not frozen & set(optimizer.state)


def test_a_state_with_momentum_for_frozen_layers_leaves_it_freed():
    model, optimizer, freezeout = controlled()
    train(model, optimizer, freezeout, range(3))
    early = copy.deepcopy(optimizer.state_dict())
    train(model, optimizer, freezeout, range(3, 14))
    for load in (lambda: optimizer.load_state_dict(early), lambda: freezeout.load_state_dict(freezeout.state_dict())):
        load()
        assert len(optimizer.state) == sum(p.requires_grad for p in model.parameters())
    assert all((group["lr"] == 0) == group["frozen"] for group in optimizer.param_groups)


def test_an_lr_scheduler_keeps_working_where_freezeout_does_not_anneal():
    model, optimizer, freezeout = controlled(anneal=False)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 100)
    for step in range(TOTAL_STEPS):
        train(model, optimizer, freezeout, [step])
        scheduler.step()
        assert freezeout.learning_rates()[-1] == pytest.approx(0.1 * (1 - (step + 1) / 100))
        scheduler.load_state_dict(scheduler.state_dict())
    assert freezeout.num_frozen == len(freezeout.layers) - 1
    assert len(scheduler.get_last_lr()) == len(optimizer.param_groups)


@pytest.mark.parametrize(
    "make",
    [
        lambda o: torch.optim.lr_scheduler.LambdaLR(o, [lambda k: 0.9**k, lambda k: 0.8**k]),
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, [0.1, 0.2], TOTAL_STEPS),
        lambda o: torch.optim.lr_scheduler.CyclicLR(o, [0.01, 0.02], [0.1, 0.2], 4),
        lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, TOTAL_STEPS),
        lambda o: torch.optim.lr_scheduler.SequentialLR(
            o, [torch.optim.lr_scheduler.LinearLR(o), torch.optim.lr_scheduler.ExponentialLR(o, 0.9)], [5]
        ),
    ],
)
def test_a_scheduler_that_was_there_before_follows_the_split_groups(make):
    def groups(model):
        parameters = list(model.parameters())
        return [{"params": parameters[::2]}, {"params": parameters[1::2], "lr": 0.05, "second": True}]

    model, plain = small_net(), small_net()
    optimizer, other = (torch.optim.SGD(groups(net), lr=0.1, momentum=0.9) for net in (model, plain))
    scheduler, expected = make(optimizer), make(other)
    freezeout = FreezeOut(model, optimizer, total_steps=TOTAL_STEPS, anneal=False, schedulers=[scheduler], t_0=0.5)
    first = next(iter(model.parameters()))
    for step in range(TOTAL_STEPS - 1):
        train(model, optimizer, freezeout, [step])
        other.step()
        scheduler.step()
        expected.step()
        for group in optimizer.param_groups:
            of = other.param_groups[int("second" in group)]
            if not group["frozen"]:
                assert group["lr"] == pytest.approx(of["lr"], rel=1e-12)
    assert freezeout.num_frozen > 2 and not first.requires_grad
    freezeout.close()
    assert len(scheduler.base_lrs if hasattr(scheduler, "base_lrs") else scheduler._last_lr) == 2
    scheduler.step()


def test_schedulers_are_refused_beside_annealing_or_where_their_lists_are_unknown():
    class Own(torch.optim.lr_scheduler.LRScheduler):
        def __init__(self, optimizer):
            self.peaks = [0.3]
            super().__init__(optimizer)

        def get_lr(self):
            return list(self.peaks)

    model = small_net()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    scheduler = Own(optimizer)
    with pytest.raises(ValueError, match="schedulers must be empty where FreezeOut sets the rates"):
        FreezeOut(model, optimizer, total_steps=10, schedulers=[scheduler])
    with pytest.raises(TypeError, match="peaks of Own may have an entry for each param group"):
        FreezeOut(model, optimizer, total_steps=10, schedulers=[scheduler], anneal=False)
    with pytest.raises(ValueError, match="must not have an LR scheduler yet"):
        FreezeOut(model, optimizer, total_steps=10, anneal=False)
    assert len(optimizer.param_groups) == 1


def test_an_lr_scheduler_beside_annealing_is_an_error_that_says_what_to_pass():
    model, optimizer, freezeout = controlled()
    torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, TOTAL_STEPS)
    F.cross_entropy(model(batch(0)[0]), batch(0)[1]).backward()
    optimizer.step()
    with pytest.raises(SchedulerConflict, match=r"LR scheduler was attached .* pass anneal=False"):
        freezeout.step()
    assert freezeout.step_count == 0


@pytest.mark.parametrize("action", ["always", "ignore"])
def test_where_a_filter_lets_the_scheduler_pass_the_rates_are_freezeouts(action):
    model, optimizer, freezeout = controlled()
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, TOTAL_STEPS)
    used = []

    optimizer.register_step_post_hook(lambda o, *_: used.append([g["lr"] for g in o.param_groups]))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter(action)
        for _ in range(TOTAL_STEPS):
            F.cross_entropy(model(batch(0)[0]), batch(0)[1]).backward()
            optimizer.step()
            optimizer.zero_grad()
            freezeout.step()
            scheduler.step()
    assert any("anneal=False" in str(w.message) for w in said) == (action == "always")
    factors = [
        [freezeout.schedule.lr_factor(g["layer"], step) for g in optimizer.param_groups] for step in range(len(used))
    ]
    base = [g["base_lr"] for g in optimizer.param_groups]
    for rates, of_layers in zip(used[1:], factors[1:], strict=True):
        assert rates == pytest.approx([b * f for b, f in zip(base, of_layers, strict=True)])


def test_freezing_without_annealing_leaves_the_rates_of_active_layers_alone():
    model, optimizer, freezeout = controlled(anneal=False)
    train(model, optimizer, freezeout, range(14))
    rates = freezeout.learning_rates()
    assert rates == [0.0] * freezeout.num_frozen + [0.1] * (len(rates) - freezeout.num_frozen)


def test_learning_rates_follow_the_schedule():
    model, optimizer, freezeout = controlled()
    for step in range(TOTAL_STEPS):
        expected = [0.1 * freezeout.schedule.lr_factor(i, step) for i in range(len(freezeout.layers))]
        assert freezeout.learning_rates() == expected
        train(model, optimizer, freezeout, [step])


def test_groups_are_split_by_layer_and_keep_every_hyperparameter():
    model = small_net()
    decay = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() <= 1]
    extra = nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.SGD(
        [{"params": decay, "weight_decay": 0.1, "mine": "yes"}, {"params": [*plain, extra], "lr": 0.5}],
        lr=0.1, momentum=0.9,
    )  # fmt: skip
    original = copy.deepcopy(optimizer.state_dict()["param_groups"])
    freezeout = FreezeOut(model, optimizer, total_steps=10, scale_lr=False)
    last = len(freezeout.layers) - 1
    for group in optimizer.param_groups:
        first = group["params"][0]
        assert group["weight_decay"] == (0.1 if first.dim() > 1 else 0)
        assert group.get("mine") == ("yes" if first.dim() > 1 else None)
        assert group["base_lr"] == group["lr"] == (0.1 if first.dim() > 1 else 0.5)
        assert all(p is extra or freezeout._groups.layer_of[p] == group["layer"] for p in group["params"])
    assert any(p is extra for group in optimizer.param_groups if group["layer"] == last for p in group["params"])
    freezeout.close()
    assert optimizer.state_dict()["param_groups"] == original


def test_a_group_added_later_anneals_with_the_last_layer():
    _, optimizer, freezeout = controlled()
    extra = nn.Parameter(torch.zeros(3))
    optimizer.add_param_group({"params": [extra], "lr": 0.4})
    freezeout.step()
    assert optimizer.param_groups[-1]["lr"] == 0.4 * freezeout.schedule.lr_factor(len(freezeout.layers) - 1, 1)
    freezeout.close()
    assert len(optimizer.param_groups) == 2 and optimizer.param_groups[1]["lr"] == 0.4


def test_tensor_learning_rates_are_written_in_place():
    model = small_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=torch.tensor(0.1), foreach=True)
    freezeout = FreezeOut(model, optimizer, total_steps=10, t_0=0.2, how_scale="linear")
    rates = [group["lr"] for group in optimizer.param_groups]
    assert len({rate.data_ptr() for rate in rates}) == len(rates)
    for _ in range(3):
        freezeout.step()
    assert all(group["lr"] is rate for group, rate in zip(optimizer.param_groups, rates, strict=True))
    assert float(rates[0]) == 0.0
    assert float(rates[-1]) == pytest.approx(0.1 * freezeout.schedule.lr_factor(len(freezeout.layers) - 1, 3))
