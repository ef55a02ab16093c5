"""Mixed precision: autocast and GradScaler, also where one of two optimizers has nothing left to train."""

import pytest
import torch
import torch.nn.functional as F
from test_freezeout import batch, frozen_tensors, small_net

from freezeout_ext.freezeout import FreezeOut
from freezeout_ext.fused import FusedSGD

TOTAL_STEPS = 16


def sgd(parameters, kind=torch.optim.SGD):
    momentum = {} if kind is torch.optim.AdamW else {"momentum": 0.9}
    return kind(parameters, lr=0.01, **momentum)


def two_optimizers(model, kind=torch.optim.SGD):
    *body, head = model.children()
    return [sgd([p for part in body for p in part.parameters()], kind), torch.optim.AdamW(head.parameters(), lr=1e-3)]


def train(model, optimizers, freezeout, steps, dtype=None, scaler=None, unscale=False, spoil=()):
    for step in steps:
        inputs, targets = batch(step)
        with torch.autocast(torch.get_default_device().type, dtype=dtype, enabled=dtype is not None):
            loss = F.cross_entropy(model(inputs), targets)
        scaler.scale(loss).backward() if scaler else loss.backward()
        if step in spoil:
            next(p for p in model.parameters() if p.requires_grad).grad.fill_(float("inf"))
        for optimizer in optimizers:
            if scaler and unscale:
                scaler.unscale_(optimizer)
            scaler.step(optimizer) if scaler else optimizer.step()
            optimizer.zero_grad()
        if scaler:
            scaler.update()
        freezeout.step()
    return loss


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("unscale", [False, True])
def test_autocast_with_a_grad_scaler_freezes_and_keeps_what_is_frozen(dtype, unscale):
    model = small_net()
    optimizer = sgd(model.parameters())
    freezeout = FreezeOut(model, optimizer, total_steps=TOTAL_STEPS, t_0=0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    train(model, [optimizer], freezeout, range(9), dtype, scaler, unscale)
    assert 0 < freezeout.num_frozen < len(freezeout.layers) - 1
    frozen = frozen_tensors(freezeout)
    before = [tensor.clone() for tensor in frozen]
    head = model.head[-1].weight.clone()
    loss = train(model, [optimizer], freezeout, range(9, TOTAL_STEPS), dtype, scaler, unscale)
    assert all(map(torch.equal, before, frozen))
    assert loss.isfinite() and not torch.equal(head, model.head[-1].weight)


def test_a_scaled_run_is_the_unscaled_one_bit_for_bit():
    states = []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=2.0**8)):  # a power of two scales exactly
        model = small_net()
        optimizer = sgd(model.parameters())
        train(
            model, [optimizer], FreezeOut(model, optimizer, total_steps=TOTAL_STEPS), range(TOTAL_STEPS), None, scaler
        )
        states.append(model.state_dict())
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name


def test_an_overflow_after_a_freeze_changes_no_weight_and_counts_as_a_step():
    model = small_net()
    optimizer = sgd(model.parameters())
    freezeout = FreezeOut(model, optimizer, total_steps=TOTAL_STEPS, t_0=0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    train(model, [optimizer], freezeout, range(9), scaler=scaler)
    before = {name: p.clone() for name, p in model.named_parameters()}
    train(model, [optimizer], freezeout, [9], scaler=scaler, spoil=[9])
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert scaler.get_scale() == 2.0**7 and freezeout.step_count == 10


@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW, FusedSGD])
def test_an_optimizer_whose_parameters_are_all_frozen_steps_under_the_scaler(kind, unscale):
    model = small_net()
    body, head = two_optimizers(model, kind)
    freezeout = FreezeOut(model, [body, head], total_steps=TOTAL_STEPS, t_0=0.3)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    train(model, [body, head], freezeout, range(TOTAL_STEPS - 1), torch.bfloat16, scaler, unscale)
    assert all(group["frozen"] for group in body.param_groups) and not body.state
    before = [p.clone() for p in head.param_groups[0]["params"]]
    train(model, [body, head], freezeout, [TOTAL_STEPS - 1], torch.bfloat16, scaler, unscale)
    assert not any(map(torch.equal, before, head.param_groups[0]["params"]))


def test_the_same_optimizer_is_asked_for_inf_checks_again_once_it_thaws():
    model = small_net()
    body, head = two_optimizers(model)
    freezeout = FreezeOut(model, [body, head], total_steps=TOTAL_STEPS, t_0=0.3)
    start = freezeout.state_dict()
    train(model, [body, head], freezeout, range(TOTAL_STEPS - 1))
    assert getattr(body, "_step_supports_amp_scaling", False)
    freezeout.load_state_dict(start)
    assert not getattr(body, "_step_supports_amp_scaling", False)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    before = [p.clone() for p in model.parameters()]
    train(model, [body, head], freezeout, [0], scaler=scaler, spoil=[0])
    assert torch.equal(before[0], next(model.parameters()))  # the body's overflow was seen


def test_two_optimizers_train_as_one_with_the_same_settings():
    states = []
    for split in (False, True):
        model = small_net()
        parts = list(model.children())
        halves = [parts[:1], parts[1:]] if split else [parts]
        optimizers = [sgd([p for part in half for p in part.parameters()]) for half in halves]
        freezeout = FreezeOut(model, optimizers if split else optimizers[0], total_steps=TOTAL_STEPS)
        train(model, optimizers, freezeout, range(TOTAL_STEPS))
        freezeout.close()
        assert [len(o.param_groups) for o in optimizers] == [1] * len(optimizers)
        states.append((model.state_dict(), freezeout.transitions))
    assert all(torch.equal(value, states[1][0][name]) for name, value in states[0][0].items())
    assert [t.state_bytes_freed for t in states[0][1]] == [t.state_bytes_freed for t in states[1][1]]


def test_adamw_is_unscaled_and_warms_up_without_a_higher_peak():
    model = small_net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    freezeout = FreezeOut(model, optimizer, total_steps=40, warmup_steps=4)
    rates = []
    for step in range(40):
        rates.append(freezeout.learning_rates())
        train(model, [optimizer], freezeout, [step])
    for layer, column in enumerate(zip(*rates, strict=True)):
        assert max(column) == column[4] == 1e-3  # the base rate, once the warm-up is over
        assert column[:5] == pytest.approx([1e-3 * k / 5 for k in range(1, 6)])
        assert (column[-1] == 0) == (layer < freezeout.num_frozen)
    assert freezeout.num_frozen == len(freezeout.layers) - 1
    assert set(optimizer.state) == set(freezeout.layers[-1].parameters.values())
