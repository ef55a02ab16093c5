"""Layers that start frozen, milestones of the user's own, moves by hand, and layers that came without gradients."""

import copy
import io
import warnings
from dataclasses import asdict

import pytest
import torch
import torch.nn.functional as F
from test_freezeout import OPTIMIZERS, TOTAL_STEPS, assert_same, batch, controlled, frozen_tensors, small_net, train
from torch import nn

from freezeout_ext import FreezeOut, Schedule, find_layers

NAMES = [layer.name for layer in find_layers(small_net())]


def frozen_by_hand(layers, optimizer, num_frozen, rates):
    """A plain loop's way: gradients off, modules in eval mode at every step, one rate a layer."""
    for layer in layers[:num_frozen]:
        for p in layer.parameters.values():
            p.requires_grad_(False)
            p.grad = None
            optimizer.state.pop(p, None)
        for module in layer.submodules:
            module.training = False
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("prefix", ["off", "exact"])
def test_start_frozen_equals_a_plain_loop_bit_for_bit(optimizer, prefix):
    model, opt, freezeout = controlled(optimizer, start_frozen=3, prefix=prefix)
    lr = opt.param_groups[-1]["base_lr"]
    train(model, opt, freezeout, range(TOTAL_STEPS))

    plain = small_net()
    layers = find_layers(plain)
    opt = OPTIMIZERS[optimizer]([{"params": list(layer.parameters.values())} for layer in layers])
    rest = Schedule(len(layers) - 3, TOTAL_STEPS, t_0=0.3, how_scale="linear", scale_lr=freezeout.schedule.scale_lr)
    for step in range(TOTAL_STEPS):
        factors = [0.0] * 3 + [rest.lr_factor(i, step) for i in range(len(layers) - 3)]
        plain.train()
        frozen_by_hand(layers, opt, 3 + rest.num_frozen(step), [lr * factor for factor in factors])
        inputs, targets = batch(step)
        opt.zero_grad()
        F.cross_entropy(plain(inputs), targets).backward()
        opt.step()
    assert_same(model.state_dict(), plain.state_dict())


def test_what_starts_frozen_never_has_a_gradient_state_or_anything_saved():
    model, optimizer, freezeout = controlled(start_frozen=3)
    frozen = [p for layer in freezeout.layers[:3] for p in layer.parameters.values()]
    before = [t.clone() for t in frozen_tensors(freezeout)]
    first = freezeout.transitions[0]
    assert (first.step, first.num_frozen, first.layers) == (0, 3, tuple(NAMES[:3]))
    for step in range(4):
        inputs, targets = batch(step)
        loss = F.cross_entropy(model(inputs), targets)
        loss.backward()
        assert all(p.grad is None for p in frozen)
        optimizer.step()
        assert not set(frozen) & set(optimizer.state)
        freezeout.step()
    assert all(map(torch.equal, frozen_tensors(freezeout), before))


def test_memory_is_lower_from_the_first_step_on_and_shown():
    def first_step(**arguments):
        model, optimizer, freezeout = controlled(**arguments)
        with freezeout.count_memory():
            loss = F.cross_entropy(model(batch(0)[0]), batch(0)[1])
        loss.backward()
        optimizer.step()
        return freezeout, freezeout.memory()

    _, full = first_step()
    freezeout, less = first_step(start_frozen=3)
    size = sum(layer.num_parameters for layer in freezeout.layers[3:])
    assert less.gradients == less.state == 4 * size < full.gradients == full.state
    assert less.weights == full.weights
    assert less.saved < full.saved / 2
    assert f"{less.saved / 2**20:.1f} MiB saved for backward" in repr(freezeout)
    assert "start_frozen=3" in repr(freezeout)
    assert f"step 0: froze {', '.join(NAMES[:3])}" in freezeout.report()


def test_a_name_means_that_layer_and_all_before_it():
    by_number = controlled(start_frozen=NAMES.index("blocks.1") + 1)[2]
    by_name = controlled(start_frozen="blocks.1")[2]
    assert by_name.num_frozen == by_number.num_frozen == 3 and by_name.schedule == by_number.schedule
    assert controlled(start_frozen="blocks")[2].num_frozen == len(NAMES) - 1
    for name in ("blocks.9", "block", ""):
        with pytest.raises(ValueError, match=f"nothing is called '{name}'; the layers are {', '.join(NAMES)}"):
            controlled(start_frozen=name)
    with pytest.raises(ValueError, match="start_frozen must leave a layer to train, got 5 of 5"):
        controlled(start_frozen="head")
    with pytest.raises(TypeError, match=r"start_frozen must be a number of layers or a layer's name, got 1\.5"):
        controlled(start_frozen=1.5)
    with pytest.raises(ValueError, match=r"start_frozen must be in 0..5, got 6"):
        controlled(start_frozen=6)


def test_milestones_freeze_when_they_say():
    fractions = [0, 0.25, 0.25, 0.75, 1]
    model, optimizer, freezeout = controlled(milestones=fractions, t_0=0.8, how_scale="cubic")
    seen = []
    for step in range(TOTAL_STEPS):
        seen.append(freezeout.num_frozen)
        train(model, optimizer, freezeout, [step])
    assert seen == [sum(t * TOTAL_STEPS <= step for t in fractions[:-1]) for step in range(TOTAL_STEPS)]


# Moves by hand: step -> what is called before that step.
SCRIPTS = {
    "freeze early": {3: ("freeze_to", 2), 9: ("freeze_to", "blocks.1")},
    "thaw": {2: ("freeze_to", 4), 9: ("thaw_to", 1), 12: ("thaw_to", 0)},
    "thaw what started": {5: ("thaw_to", 1), 20: ("freeze_to", 4)},
}


def run_script(script, steps, parts, **arguments):
    model, optimizer, freezeout = parts
    for step in steps:
        if step in script:
            name, n = script[step]
            getattr(freezeout, name)(n)
        train(model, optimizer, freezeout, [step])


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("optimizer_first", [True, False])
def test_what_was_done_by_hand_resumes_bit_for_bit_at_every_step(script, optimizer, optimizer_first):
    start = 2 if script == "thaw what started" else 0
    whole = controlled(optimizer, start_frozen=start, t_0=0.5)
    states, frozen = [], []
    for step in range(TOTAL_STEPS):
        states.append(io.BytesIO())
        torch.save([part.state_dict() for part in whole], states[-1])
        run_script(SCRIPTS[script], [step], whole)
        frozen.append(whole[2].num_frozen)
    assert len(set(frozen)) > 2
    for stop in range(0, TOTAL_STEPS, 3):
        parts = controlled(optimizer, start_frozen=start, t_0=0.5)
        states[stop].seek(0)
        state = torch.load(states[stop], weights_only=True)
        for i in (0, 1, 2) if optimizer_first else (0, 2, 1):
            parts[i].load_state_dict(state[i])
        run_script(SCRIPTS[script], range(stop, TOTAL_STEPS), parts)
        assert_same(parts[0].state_dict(), whole[0].state_dict())
        assert parts[2].num_frozen == whole[2].num_frozen
        # seconds are a clock's
        assert [{**asdict(t), "seconds": 0} for t in parts[2].transitions] == [
            {**asdict(t), "seconds": 0} for t in whole[2].transitions
        ]


def test_thawed_layers_train_again_from_no_momentum_at_the_frontiers_rate():
    model, optimizer, freezeout = controlled(t_0=0.5, scale_lr=False)
    train(model, optimizer, freezeout, range(3))
    freezeout.freeze_to(3)
    before = [t.clone() for t in frozen_tensors(freezeout)]
    train(model, optimizer, freezeout, range(3, 13))
    assert freezeout.schedule.num_frozen(13) == 1 and freezeout.num_frozen == 3
    assert all(map(torch.equal, frozen_tensors(freezeout), before))
    freezeout.thaw_to(0)
    thawed = [p for layer in freezeout.layers[:3] for p in layer.parameters.values()]
    assert all(p.requires_grad and p.grad is None and p not in optimizer.state for p in thawed)
    assert all(module.training for module in model.modules())
    rates = freezeout.learning_rates()
    assert rates[0] == rates[1] == 0.1 * freezeout.schedule.lr_factor(1, 13) > 0
    assert rates[2:] == [0.1 * freezeout.schedule.lr_factor(i, 13) for i in range(2, 5)]
    norm = next(m for m in freezeout.layers[1].submodules if isinstance(m, nn.BatchNorm2d))
    mean = norm.running_mean.clone()
    train(model, optimizer, freezeout, [13])
    assert not torch.equal(norm.running_mean, mean) and set(thawed) <= set(optimizer.state)
    assert freezeout.transitions[-1].parameters_frozen == -sum(p.numel() for p in thawed)
    # They freeze with the layer whose rate they had.
    train(model, optimizer, freezeout, [14])
    assert freezeout.schedule.num_frozen(15) == 2 == freezeout.num_frozen


def test_bad_moves_by_hand_are_named():
    _, _, freezeout = controlled(start_frozen=2)
    for move, n, message in (
        ("freeze_to", 1, r"freeze_to must not thaw: 2 layers are frozen, got 1; use thaw_to\(1\)"),
        ("thaw_to", 3, r"thaw_to must not freeze: 2 layers are frozen, got 3; use freeze_to\(3\)"),
        ("freeze_to", 5, "freeze_to must leave a layer to train, got 5: all 5 layers"),
        ("freeze_to", "head", "freeze_to must leave a layer to train, got 'head'"),
        ("thaw_to", -1, r"thaw_to must be in 0..5, got -1"),
        ("freeze_to", "no", "freeze_to must name a layer, nothing is called 'no'; the layers are stem"),
    ):
        with pytest.raises(ValueError, match=message):
            getattr(freezeout, move)(n)
    assert freezeout.num_frozen == 2 and len(freezeout.transitions) == 1
    freezeout.close()
    with pytest.raises(RuntimeError, match=r"thaw_to\(\) must not be called after close"):
        freezeout.thaw_to(0)


def test_thawed_layers_take_the_rate_of_the_others_under_a_scheduler():
    _, optimizer, freezeout = controlled(start_frozen=2, anneal=False)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, TOTAL_STEPS)
    for _ in range(6):
        optimizer.step()
        freezeout.step()
        scheduler.step()
    freezeout.thaw_to(0)
    rates = freezeout.learning_rates()
    assert rates == [rates[-1]] * len(NAMES) and 0 < rates[-1] < 0.1


def pretrained():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU(),
        nn.Conv2d(4, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10),
    )  # fmt: skip
    model[0].requires_grad_(False)
    model[1].requires_grad_(False)
    return model


def test_layers_in_front_that_came_without_gradients_belong_to_the_prefix():
    model = pretrained()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    with pytest.warns(UserWarning, match=r"^0 came with requires_grad=False .* layers=\[\.\.\.\] without them"):
        freezeout = FreezeOut(model, optimizer, total_steps=20, t_0=0.5, how_scale="linear")
    assert [layer.name for layer in freezeout.layers] == ["3", "6", "9"]
    assert [layer.name for layer in freezeout.layers.given] == ["0"]
    assert freezeout.num_frozen == 0 and freezeout.prefix_report().num_frozen == 1
    assert "came with requires_grad=False and belongs to the frozen prefix, in eval mode: 0" in freezeout.report()
    before = {name: value.clone() for name, value in model[1].state_dict().items()}
    for step in range(12):
        model.train()
        F.cross_entropy(model(batch(step)[0]), batch(step)[1]).backward()
        optimizer.step()
        optimizer.zero_grad()
        freezeout.step()
    assert freezeout.num_frozen == 1 and freezeout.prefix_report().num_frozen == 2
    assert_same(before, model[1].state_dict())
    with pytest.raises(ValueError, match=r"nothing is called 'no'; the layers are 0, 3, 6, 9"):
        freezeout.freeze_to("no")
    freezeout.close()
    assert all(module.training for module in model.modules())
    assert [p.requires_grad for p in model.parameters()] == [False] * 4 + [True] * 8


def test_layers_that_came_frozen_in_eval_mode_are_no_surprise_and_those_behind_are_left_alone():
    model = pretrained()
    model[1].eval()
    model[6] = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1))
    model[6][1].requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        freezeout = FreezeOut(model, optimizer, total_steps=20)
    assert [layer.name for layer in freezeout.layers] == ["3", "6.0", "6.2", "9"]
    assert [layer.name for layer in freezeout.layers.given] == ["0"]
    freezeout.close()
    assert [module.training for module in model] == [i != 1 for i in range(10)]
    # A division that leaves them out leaves them as they are.
    freezeout = FreezeOut(model, optimizer, total_steps=20, layers=[["3", "4"], "6", "9"])
    model.train()
    assert model[1].training and not freezeout.layers.given


def test_a_tied_weight_that_trains_is_not_taken_for_a_frozen_layer():
    model = nn.Sequential(nn.Embedding(4, 4), nn.Linear(4, 4), nn.Linear(4, 4, bias=False))
    model[2].weight = model[0].weight
    with pytest.warns(UserWarning, match="used by several layers"):
        layers = find_layers(model)
    assert not layers.given and [layer.name for layer in layers] == ["1", "2"]


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_going_back_in_one_process_does_not_depend_on_the_order_of_loading(kind):
    def run(order):
        parts = dict(zip(("model", "optimizer", "freezeout"), controlled(kind), strict=True))
        train(*parts.values(), range(6))
        saved = copy.deepcopy({name: part.state_dict() for name, part in parts.items()})
        train(*parts.values(), range(6, 18))
        assert parts["freezeout"].num_frozen > 1
        for name in order:
            parts[name].load_state_dict(copy.deepcopy(saved[name]))
        train(*parts.values(), range(6, 12))
        return parts["model"].state_dict()

    first = run(["freezeout", "model", "optimizer"])
    assert_same(first, run(["optimizer", "model", "freezeout"]))
    assert_same(first, run(["model", "optimizer", "freezeout"]))


def test_a_freezeout_that_cannot_be_made_leaves_nothing_behind():
    class Refusing:
        detached, takes_part, rows, given = 0, False, None, None

        def attach(self, freezeout):
            raise RuntimeError(f"no room for {freezeout.num_frozen} layers")

        def detach(self):
            self.detached += 1

    model, cache = small_net(), Refusing()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    with pytest.raises(RuntimeError, match="no room for 2 layers"):
        FreezeOut(model, optimizer, total_steps=10, start_frozen=2, cache=cache)
    assert cache.detached == 1
    assert len(optimizer.param_groups) == 1 and "layer" not in optimizer.param_groups[0]
    assert all(p.requires_grad for p in model.parameters()) and all(m.training for m in model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks or "train" in vars(m) for m in model.modules())


def test_a_paused_model_has_no_hooks_and_can_be_scripted():
    model, optimizer, freezeout = controlled(prefix="folded", measure_prefix=False)
    with freezeout.paused():
        torch.jit.script(model)
    train(model, optimizer, freezeout, range(16))
    assert freezeout.num_frozen > 1
    with freezeout.paused():
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
        scripted = torch.jit.script(model)
    x = batch(3)[0]
    model.eval()
    scripted.eval()
    assert torch.allclose(model(x), scripted(x), atol=1e-5)
    report = freezeout.prefix_report()
    assert report.num_frozen == freezeout.num_frozen


HALF = [0.2] * (len(NAMES) - 1) + [1]


def assigned(layer):
    for module in layer.modules.values():
        module.load_state_dict({k: v.clone() for k, v in module.state_dict().items()}, assign=True)


@pytest.mark.parametrize("move", ["step", "freeze_to", "thaw_to"])
def test_a_transition_of_parameters_that_were_replaced_is_an_error_that_changes_nothing(move):
    model = small_net()
    freezeout = FreezeOut(model, torch.optim.SGD(model.parameters(), lr=0.1), total_steps=10, milestones=HALF)
    if move == "thaw_to":
        freezeout.freeze_to(3)
    assigned(freezeout.layers[1])
    frozen = freezeout.num_frozen
    calls = {"step": lambda: [freezeout.step() for _ in range(3)], "freeze_to": lambda: freezeout.freeze_to(2),
             "thaw_to": lambda: freezeout.thaw_to(1)}  # fmt: skip
    with pytest.raises(RuntimeError, match=rf"of layer {freezeout.layers[1].name} is another parameter than when"):
        calls[move]()
    assert freezeout.num_frozen == frozen and freezeout.step_count == (1 if move == "step" else 0)
    freezeout.close()


def test_a_group_that_is_added_right_before_a_transition_or_close_is_adopted():
    model, added = small_net(), nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    freezeout = FreezeOut(model, optimizer, total_steps=10, milestones=HALF)
    optimizer.add_param_group({"params": [added], "lr": 0.5})
    freezeout.freeze_to(3)
    assert not optimizer.param_groups[-1]["frozen"] and optimizer.param_groups[-1]["lr"] == 0.5
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], "lr": 0.25})
    freezeout.close()
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.5, 0.25]
