"""Parameters, states and gradients that share memory: torch's for-loop updates them in its order, or an error."""

import pytest
import torch
from fused_cases import assert_equal, params_of, set_gradients, twins

from freezeout_ext import FusedAdamW, FusedSGD, native

pytestmark = [
    pytest.mark.skipif(native.C is None, reason=f"no compiled half: {native.import_error}"),
    pytest.mark.usefixtures("exact_square_roots"),
]

SHARED = "it or a state of it shares memory with others"
SHARED_GRADIENT = "a gradient shares memory with a parameter or a state"


@pytest.fixture(params=[FusedSGD, FusedAdamW])
def cls(request):
    return request.param


def stepped(cls, shapes=((40,), (40,), (7,), (40,)), memory=None):
    """Ours and torch's for-loop after one step with equal gradients; the parameters may lie in one memory."""
    made = twins(cls, shapes, weight_decay=0.1)
    for optimizer in made:
        of_all = None if memory is None else memory.clone()
        for p, start in zip(params_of(optimizer), (0, 30, 60, 70), strict=True):
            if of_all is not None:
                p.data = of_all[start : start + p.numel()]
    set_gradients(*made)
    for optimizer in made:
        optimizer.step()
    return made


def assert_steps_are_equal(made, steps=3):
    for _ in range(steps):
        for optimizer in made:
            optimizer.step()
        assert_equal(*made)


def test_parameters_that_share_memory_are_updated_one_after_the_other(cls):
    made = stepped(cls, [(40,), (30,), (10,), (30,)], torch.randn(100))
    assert_steps_are_equal(made)
    assert made[0].native_report() == {f"group {i}, parameter 0": SHARED for i in range(2)}


STATES = {
    FusedSGD: [(("momentum_buffer", 0), ("momentum_buffer", 3))],
    FusedAdamW: [
        (("exp_avg", 0), ("exp_avg", 3)),
        (("exp_avg", 1), ("exp_avg_sq", 0)),
        (("exp_avg", 1), ("exp_avg_sq", 1)),
        (("step", 0), ("step", 3)),
    ],
}


@pytest.mark.parametrize(("cls", "one", "other"), [(cls, *pair) for cls in STATES for pair in STATES[cls]])
def test_states_that_are_one_tensor_are_updated_one_after_the_other(cls, one, other):
    made = stepped(cls)
    for optimizer in made:
        params = params_of(optimizer)
        optimizer.state[params[one[1]]][one[0]] = optimizer.state[params[other[1]]][other[0]].abs_()
    assert_steps_are_equal(made)
    assert made[0].native_report() == {f"group {i}, parameter 0": SHARED for i in (one[1], other[1])}


def state_of(optimizer, p):
    return next(value for value in optimizer.state[p].values() if value.shape == p.shape)


@pytest.mark.parametrize(("of", "owner"), [(0, 0), (0, 3), (3, 0)])
@pytest.mark.parametrize("memory", ["parameter", "state"])
def test_a_gradient_in_memory_that_the_update_writes_takes_torch_s_loop(cls, memory, of, owner):
    made = stepped(cls)
    for optimizer in made:
        params = params_of(optimizer)
        params[of].grad = params[owner].data if memory == "parameter" else state_of(optimizer, params[owner])
    assert_steps_are_equal(made)
    report = made[0].native_report()
    assert set(report.values()) == {SHARED_GRADIENT} and len(report) == 4
    for optimizer in made:  # of its own again
        params = params_of(optimizer)
        params[of].grad = params[1].grad.clone()
    assert_steps_are_equal(made)
    assert made[0].native_report() == {}


def test_gradients_that_share_memory_with_one_another_are_only_read(cls):
    made = stepped(cls)
    for optimizer in made:
        params = params_of(optimizer)
        params[3].grad = params[1].grad = params[0].grad
    assert_steps_are_equal(made)
    assert made[0].native_report() == {}


@pytest.mark.parametrize("by_torch", [False, True])
def test_gradients_that_share_memory_are_not_unscaled_twice(cls, by_torch):
    optimizer, _ = stepped(cls)
    params = params_of(optimizer)
    for group in optimizer.param_groups:
        group["differentiable"] = by_torch
    params[3].grad = params[0].grad
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0), torch.tensor(0.0)
    kept = [t.clone() for p in params for t in (p, p.grad)]
    with pytest.raises(ValueError, match="gradients that are unscaled must not share memory"):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(kept, (t for p in params for t in (p, p.grad)), strict=True))
