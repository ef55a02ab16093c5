"""Parameters, states and gradients that share memory: torch's for-loop updates them in its order, or an error."""

import pytest
import torch
from torch import nn

from freezeout_ext import FusedAdamW, FusedSGD, native

pytestmark = [
    pytest.mark.skipif(native.C is None, reason=f"no compiled half: {native.import_error}"),
    pytest.mark.usefixtures("exact_square_roots"),
]

KINDS = {
    "SGD": (FusedSGD, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}),
    "AdamW": (FusedAdamW, torch.optim.AdamW, {"lr": 0.1, "weight_decay": 0.1}),
}
SHARED = "it or a state of it shares memory with others"
SHARED_GRADIENT = "a gradient shares memory with a parameter or a state"


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def twins(kind, make_params):
    """Ours and torch's for-loop over equal parameters in two groups, after one step with equal gradients."""
    cls, judge, options = KINDS[kind]
    made = []
    for optimizer_type in (cls, judge):
        torch.manual_seed(0)
        params = make_params()
        optimizer = optimizer_type([{"params": params[:2]}, {"params": params[2:]}], foreach=False, **options)
        for p in params:
            p.grad = torch.randn_like(p)
        optimizer.step()
        made.append((params, optimizer))
    return made


def separate():
    return [nn.Parameter(torch.randn(n)) for n in (40, 40, 7, 40)]


def assert_equal(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def assert_steps_are_equal(made, steps=3):
    for _ in range(steps):
        for _, optimizer in made:
            optimizer.step()
        (ours, optimizer), (theirs, torchs) = made
        for p, q in zip(ours, theirs, strict=True):
            assert_equal(p, q)
            for name, value in torchs.state[q].items():
                assert_equal(optimizer.state[p][name], value)


def test_parameters_that_share_memory_are_updated_one_after_the_other(kind):
    def overlapping():
        memory = torch.randn(100)
        return [nn.Parameter(memory[a:b]) for a, b in ((0, 40), (30, 60), (60, 70), (70, 100))]

    made = twins(kind, overlapping)
    assert_steps_are_equal(made)
    assert made[0][1].native_report() == {f"group 0, parameter {i}": SHARED for i in range(2)}


STATES = {
    "SGD": [(("momentum_buffer", 0), ("momentum_buffer", 3))],
    "AdamW": [
        (("exp_avg", 0), ("exp_avg", 3)),
        (("exp_avg", 1), ("exp_avg_sq", 0)),
        (("exp_avg", 1), ("exp_avg_sq", 1)),
        (("step", 0), ("step", 3)),
    ],
}


@pytest.mark.parametrize(("kind", "one", "other"), [(kind, *pair) for kind in STATES for pair in STATES[kind]])
def test_states_that_are_one_tensor_are_updated_one_after_the_other(kind, one, other):
    made = twins(kind, separate)
    for params, optimizer in made:
        optimizer.state[params[one[1]]][one[0]] = optimizer.state[params[other[1]]][other[0]].abs_()
    assert_steps_are_equal(made)
    places = {f"group {i // 2}, parameter {i % 2}": SHARED for i in (one[1], other[1])}
    assert made[0][1].native_report() == places


def state_of(optimizer, p):
    return next(value for value in optimizer.state[p].values() if value.shape == p.shape)


@pytest.mark.parametrize(("of", "owner"), [(0, 0), (0, 3), (3, 0)])
@pytest.mark.parametrize("memory", ["parameter", "state"])
def test_a_gradient_in_memory_that_the_update_writes_takes_torch_s_loop(kind, memory, of, owner):
    made = twins(kind, separate)
    for params, optimizer in made:
        params[of].grad = params[owner].data if memory == "parameter" else state_of(optimizer, params[owner])
    (ours, optimizer), _ = made
    assert_steps_are_equal(made)
    assert set(optimizer.native_report().values()) == {SHARED_GRADIENT}
    assert len(optimizer.native_report()) == len(ours)
    for params, _ in made:  # of its own again
        params[of].grad = params[1].grad.clone()
    assert_steps_are_equal(made)
    assert optimizer.native_report() == {}


def test_gradients_that_share_memory_with_one_another_are_only_read(kind):
    made = twins(kind, separate)
    for params, _ in made:
        params[3].grad = params[1].grad = params[0].grad
    assert_steps_are_equal(made)
    assert made[0][1].native_report() == {}


@pytest.mark.parametrize("by_torch", [False, True])
def test_gradients_that_share_memory_are_not_unscaled_twice(kind, by_torch):
    (params, optimizer), _ = twins(kind, separate)
    if by_torch:
        for group in optimizer.param_groups:
            group["differentiable"] = True
    params[3].grad = params[0].grad
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0), torch.tensor(0.0)
    kept = [t.clone() for p in params for t in (p, p.grad)]
    with pytest.raises(ValueError, match="gradients that are unscaled must not share memory"):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(kept, (t for p in params for t in (p, p.grad)), strict=True))
