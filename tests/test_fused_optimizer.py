"""What all fused optimizers share: whatever is done to parameters, gradients, states and groups, they step as torch."""

import copy
import math
import pickle
import warnings
import weakref

import pytest
import torch
from fused_cases import TORCHS, assert_equal, params_of, set_gradients, step_both, twins
from torch import nn

from freezeout_ext import FusedSGD, native
from freezeout_ext.fused import compiled

pytestmark = [
    pytest.mark.skipif(native.C is None, reason=f"no compiled half: {native.import_error}"),
    pytest.mark.usefixtures("exact_square_roots"),
]
COPIES = pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"]
)


@pytest.fixture(params=TORCHS)
def cls(request):
    return request.param


LAYOUTS = {
    "channels_last": lambda: torch.randn(8, 5, 3, 3).to(memory_format=torch.channels_last),
    "transposed": lambda: torch.randn(7, 33).t(),
    "permuted": lambda: torch.randn(2, 3, 4, 5).permute(2, 0, 3, 1),
    "1x1 with channels-last strides": lambda: torch.randn(8, 5, 1, 1).to(memory_format=torch.channels_last),
    "scalar": lambda: torch.randn(()),
    "offset by 4 bytes": lambda: torch.randn(34)[1:],
    "every second": lambda: torch.randn(66)[::2],
    "expanded gradient": lambda: torch.randn(6, 5),
    "gradient in another layout": lambda: torch.randn(6, 5),
    "gradient off by 8 bytes": lambda: torch.randn(6, 5),
}
SLOW = {"every second", "expanded gradient", "gradient in another layout"}


def gradient_for(layout, p):
    if layout == "expanded gradient":
        return torch.randn(1, 5).expand(6, 5)
    if layout == "gradient in another layout":
        return torch.randn(5, 6).t()
    if layout == "gradient off by 8 bytes":
        return torch.randn(32)[2:].view(6, 5)
    return torch.empty_like(p).copy_(torch.randn(p.shape))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_what_torch_gives(cls, layout):
    value = LAYOUTS[layout]()
    ours, theirs = twins(cls, [()], weight_decay=0.1)
    for optimizer in (ours, theirs):
        data = torch.empty_strided(value.shape, value.stride()).copy_(value)
        if layout == "offset by 4 bytes":
            data = torch.cat([torch.zeros(1), value])[1:]
        params_of(optimizer)[0].data = data
    (p,), (q,) = params_of(ours), params_of(theirs)
    for _ in range(4):
        p.grad = gradient_for(layout, p)
        q.grad = p.grad.clone(memory_format=torch.preserve_format)
        assert (ours.native_report() != {}) == (layout in SLOW)
        ours.step()
        theirs.step()
        assert_equal(ours, theirs)


@pytest.mark.parametrize("shape", [(1,), (1, 1), (5,)], ids=str)
def test_negative_views_are_read_as_what_they_mean(cls, shape):
    ours, theirs = twins(cls, [shape])
    for _ in range(3):
        complex_gradient = torch.randn(*shape, dtype=torch.complex64)
        params_of(ours)[0].grad = complex_gradient.conj().imag
        params_of(theirs)[0].grad = -complex_gradient.imag
        assert params_of(ours)[0].grad.is_neg()
        ours.step()
        theirs.step()
        assert_equal(ours, theirs)


def test_sparse_complex_and_subclasses_go_through_torch_and_are_reported():
    class Marked(torch.Tensor):
        pass

    def build(cls):
        torch.manual_seed(1)
        params = [
            nn.Parameter(torch.randn(4, 3)),
            nn.Parameter(torch.randn(3, dtype=torch.complex64)),
            nn.Parameter(torch.randn(3).as_subclass(Marked)),
            nn.Parameter(torch.randn(3)),
        ]
        return cls(params, lr=0.1, momentum=0.9, foreach=False)

    ours, theirs = build(FusedSGD), build(torch.optim.SGD)
    for _ in range(3):
        for optimizer in (ours, theirs):
            torch.manual_seed(2)
            params = optimizer.param_groups[0]["params"]
            params[0].grad = torch.randn(4, 3).relu().to_sparse()
            for p in params[1:]:
                p.grad = torch.randn_like(p)
            optimizer.step()
        for p, q in zip(params_of(ours), params_of(theirs), strict=True):
            assert torch.equal(p, q)
    assert ours.native_report() == {
        "group 0, parameter 0": "its momentum_buffer is sparse_coo",
        "group 0, parameter 1": "is complex64",
        "group 0, parameter 2": "is a Marked",
    }


def test_differentiable_is_torch_s():
    lr = torch.tensor(0.1, requires_grad=True)
    ours, theirs = (
        cls([nn.Parameter(torch.ones(3))], lr=lr, differentiable=True) for cls in (FusedSGD, torch.optim.SGD)
    )
    for optimizer in (ours, theirs):
        # As torch's own tests do: a leaf that requires grad may not be updated in place under grad mode.
        p = params_of(optimizer)[0].clone()
        optimizer.param_groups[0]["params"] = [p]
        p.grad = torch.full((3,), 2.0)
        optimizer.step()
    assert ours.native_report() == {"group 0, parameter 0": "its group is differentiable"}
    (from_ours,) = torch.autograd.grad(params_of(ours)[0].sum(), lr)
    (from_theirs,) = torch.autograd.grad(params_of(theirs)[0].sum(), lr)
    assert from_ours == from_theirs == -6


def first_state(optimizer, i):
    """The name and the value of a state that has its parameter's shape."""
    state = optimizer.state[params_of(optimizer)[i]]
    name = "momentum_buffer" if "momentum_buffer" in state else "exp_avg"
    return name, state[name]


def test_a_swapped_storage_is_noticed(cls):
    ours, theirs = twins(cls, [(50,), (60,)])
    step_both(ours, theirs, steps=2)
    old = []
    for optimizer in (ours, theirs):
        p = params_of(optimizer)[1]
        old.append(p.data)
        p.data = p.data.clone() + 1
    before = old[0].clone()
    step_both(ours, theirs, steps=2)
    assert torch.equal(old[0], before)

    for optimizer in (ours, theirs):
        p = params_of(optimizer)[0]
        name, state = first_state(optimizer, 0)
        old.append(state)  # alive, so that a stale address would be written
        optimizer.state[p][name] = state * 2
    step_both(ours, theirs)
    for optimizer in (ours, theirs):
        p = params_of(optimizer)[0]
        p.data = p.data.view(5, 10)
        for name, state in optimizer.state[p].items():
            optimizer.state[p][name] = state.view(5, 10) if state.dim() else state
    step_both(ours, theirs)
    for optimizer in (ours, theirs):
        p = params_of(optimizer)[0]
        p.data, p.grad = p.data.double(), None
        del optimizer.state[p]
    step_both(ours, theirs, steps=2)
    assert ours.native_report() == {}


@pytest.mark.parametrize("swap", ["data", "set_", "layout", "swap_tensors"])
def test_a_state_swapped_in_place_is_noticed(cls, swap):
    """The same object elsewhere in memory: the old memory is not written, the new one is."""
    ours, theirs = twins(cls, [(40, 3)])
    step_both(ours, theirs, steps=3)
    for _ in range(2):
        kept = []
        for optimizer in (ours, theirs):
            _, state = first_state(optimizer, 0)
            old, other = state.detach(), state.clone() * 2
            if swap == "data":
                state.data = other
            elif swap == "set_":
                state.set_(other)
            elif swap == "layout":
                state.data = other.t().contiguous().t()
            else:
                del old
                torch.utils.swap_tensors(state, other)
                old = other
            kept.append((state, old, old.clone()))
        set_gradients(ours, theirs)
        ours.step()
        theirs.step()
        for optimizer, (state, old, before) in zip((ours, theirs), kept, strict=True):
            assert first_state(optimizer, 0)[1] is state and torch.equal(old, before)
        assert_equal(ours, theirs)


def test_gradients_come_late_and_go(cls):
    ours, theirs = twins(cls, [(5,)] * 4, **({"dampening": 0.5} if cls is FusedSGD else {}))
    for step in range(8):
        step_both(ours, theirs, which=lambda i, step=step: i <= step and (i + step) % 3)
    assert len(ours._prepared.step.batches) == 1 and ours.native_report() == {}
    if cls is not FusedSGD:  # updated in one call all the same
        assert len({float(state["step"]) for state in ours.state.values()}) > 1


def test_frozen_groups_are_neither_read_nor_written(cls):
    ours, theirs = twins(cls, [(50,)] * 3, weight_decay=0.1)
    step_both(ours, theirs, steps=2)
    p = ours.param_groups[0]["params"][0]
    del ours.state[p], theirs.state[params_of(theirs)[0]]
    ours.param_groups[0].update(frozen=True, lr=0)
    theirs.param_groups[0]["lr"] = 0
    frozen = p.detach().clone()
    # NaN in a gradient that nobody reads.
    for _ in range(3):
        set_gradients(ours, theirs)
        p.grad = torch.full_like(p, torch.nan)
        params_of(theirs)[0].grad = None
        ours.step()
        theirs.step()
        assert_equal(ours, theirs)
    assert torch.equal(p, frozen) and p not in ours.state
    assert all(len(batch.table()) == 2 * 64 for batch in ours._prepared.step.batches)

    ours.param_groups[0].update(frozen=False, lr=0.1)
    theirs.param_groups[0]["lr"] = 0.1
    step_both(ours, theirs, steps=2)


def test_popped_state_is_freed_at_once(cls):
    ours, theirs = twins(cls, [(1000,)] * 2)
    step_both(ours, theirs, steps=3)
    states = [weakref.ref(state) for state in ours.state.pop(params_of(ours)[0]).values()]
    assert [state() for state in states] == [None] * len(states)


CHANGES = {"lr": 0.2, "weight_decay": 0.1, "maximize": True}
CHANGES_OF_ADAM = CHANGES | {"betas": (0.5, 0.6), "eps": 0.1}
CHANGES_OF_SGD = CHANGES | {"momentum": 0.5, "nesterov": True}


def test_groups_and_hyperparameters_may_change_at_any_time(cls):
    ours, theirs = twins(cls, [(9,)] * 3)
    step_both(ours, theirs)
    for key, value in (CHANGES_OF_SGD if cls is FusedSGD else CHANGES_OF_ADAM).items():
        for optimizer in (ours, theirs):
            optimizer.param_groups[1][key] = value
        step_both(ours, theirs)
    for momentum in (0, 0.9) if cls is FusedSGD else ():
        for optimizer in (ours, theirs):
            optimizer.param_groups[2]["momentum"] = momentum
        step_both(ours, theirs)
    value = torch.randn(7)
    more = {} if cls is FusedSGD else {"amsgrad": True}
    for optimizer in (ours, theirs):
        optimizer.add_param_group({"params": [nn.Parameter(value.clone())], "lr": 0.3, **more})
    step_both(ours, theirs, steps=2)
    for optimizer in (ours, theirs):
        moved = optimizer.param_groups.pop()["params"]
        optimizer.param_groups[0]["params"].extend(moved)
        optimizer.param_groups[0].update(more and {"amsgrad": False})
    step_both(ours, theirs, steps=2)
    for optimizer in (ours, theirs):
        optimizer.param_groups[0]["tag"] = "new key"
        optimizer.param_groups[1] = dict(optimizer.param_groups[1])
    step_both(ours, theirs, steps=2)
    for optimizer in (ours, theirs):
        del optimizer.param_groups[0]["params"][0]
        optimizer.param_groups.reverse()
    step_both(ours, theirs, steps=2)
    assert ours.native_report() == {}


def test_several_dtypes_and_many_groups(cls):
    ours, theirs = twins(cls, [(n % 7 + 1,) for n in range(1200)])
    for optimizer in (ours, theirs):
        for p in params_of(optimizer)[::3]:
            p.data = p.data.double()
    step_both(ours, theirs, steps=3)
    assert len(ours._prepared.step.batches) == 2


def test_several_devices_in_one_optimizer():
    """The meta device stands for one that has no compiled half: its parameters go through torch, the others do not."""

    def build(cls):
        torch.manual_seed(3)
        params = [nn.Parameter(torch.randn(5, device=device)) for device in ("cpu", "meta", "cpu")]
        return cls([{"params": params[:2]}, {"params": params[2:], "lr": 0.2}], lr=0.1, momentum=0.9, foreach=False)

    ours, theirs = build(FusedSGD), build(torch.optim.SGD)
    for seed in range(3):
        for optimizer in (ours, theirs):
            torch.manual_seed(seed)
            for p in params_of(optimizer):
                p.grad = torch.randn_like(p)
            optimizer.step()
    assert ours.native_report() == {"group 0, parameter 1": "is on meta"}
    for p, q in zip(params_of(ours), params_of(theirs), strict=True):
        buffers = ours.state[p]["momentum_buffer"], theirs.state[q]["momentum_buffer"]
        assert p.device == buffers[0].device and p.device == q.device
        if p.device.type == "cpu":
            assert torch.equal(p, q) and torch.equal(*buffers)


def test_an_empty_step_and_empty_groups():
    p = nn.Parameter(torch.ones(3))
    ours = FusedSGD([{"params": []}, {"params": [p]}], lr=0.1, momentum=0.9)
    ours.step()
    assert not ours.state and torch.equal(p, torch.ones(3))
    p.grad = torch.ones(3)
    ours.step()
    assert torch.equal(p.detach(), torch.ones(3).add(torch.ones(3), alpha=-0.1))


def test_the_update_counts_as_an_in_place_change():
    p = nn.Parameter(torch.ones(3))
    ours = FusedSGD([p], lr=0.1)
    p.grad = torch.ones(3)
    loss = (p * p).sum()
    ours.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


class TestGradScaler:
    @pytest.mark.parametrize("scale", [2.0**10, 3.0])
    def test_unscales_and_writes_back(self, cls, scale):
        ours, theirs = twins(cls, [(5,), (2000,)], weight_decay=0.1)
        scalers = [torch.amp.GradScaler("cpu", init_scale=scale) for _ in range(2)]
        for _ in range(3):
            coefficients = [torch.randn(5), torch.randn(2000)]
            for optimizer, scaler in zip((ours, theirs), scalers, strict=True):
                optimizer.zero_grad()
                terms = zip(params_of(optimizer), coefficients, strict=True)
                scaler.scale(sum((p * c).sum() for p, c in terms)).backward()
                scaler.step(optimizer)
                scaler.update()
            for p, q in zip(params_of(ours), params_of(theirs), strict=True):
                assert torch.equal(p.grad, q.grad)
            assert_equal(ours, theirs)

    @pytest.mark.parametrize("after", [0, 2])
    def test_an_overflow_changes_nothing(self, cls, after):
        ours, theirs = twins(cls, [(5,), (6,)], **({"dampening": 0.5} if cls is FusedSGD else {}))
        step_both(ours, theirs, steps=after)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        before, state = [p.detach().clone() for p in params_of(ours)], copy.deepcopy(ours.state_dict()["state"])
        scaler.scale(sum((p * torch.inf).sum() for p in params_of(ours))).backward()
        scaler.step(ours)
        scaler.update()
        assert scaler.get_scale() == 4.0
        assert all(torch.equal(p, q) for p, q in zip(params_of(ours), before, strict=True))
        assert str(ours.state_dict()["state"]) == str(state)
        step_both(ours, theirs, steps=2)

    @pytest.mark.parametrize("found", [1.0, 2.0, 0.5])
    def test_any_found_inf_but_zero_counts(self, cls, found):
        ours, _ = twins(cls, [(5,)])
        before = params_of(ours)[0].detach().clone()
        set_gradients(ours)
        ours.grad_scale, ours.found_inf = torch.tensor(2.0), torch.tensor(found)
        ours.step()
        assert torch.equal(params_of(ours)[0], before) and not ours.state

    def test_unscaled_in_torch_s_for_loop_too(self):
        p = nn.Parameter(torch.ones(4, 3))
        p.grad = torch.full((4, 3), 6.0).to_sparse()
        ours = FusedSGD([p], lr=1.0)
        ours.grad_scale, ours.found_inf = torch.tensor(2.0), torch.tensor(0.0)
        ours.step()
        assert torch.equal(p.detach(), torch.full((4, 3), -2.0))


@COPIES
def test_copies_go_on_by_themselves(cls, copied):
    ours, theirs = twins(cls, [(9,), (10,)])
    step_both(ours, theirs, steps=2)
    ours, theirs = copied(ours), copied(theirs)
    step_both(ours, theirs, steps=2)
    assert ours._step_supports_amp_scaling and ours.native_report() == {}


def test_hooks_and_closures_run_in_torch_s_order():
    def record(cls):
        events = []
        p = nn.Parameter(torch.ones(3))
        optimizer = cls([p], lr=0.1)

        def closure():
            events.append("closure")
            p.grad = torch.ones(3)
            assert torch.is_grad_enabled()
            return 7

        optimizer.register_step_pre_hook(lambda o, args, kwargs: events.append(("pre", len(args), sorted(kwargs))))
        optimizer.register_step_post_hook(lambda o, args, kwargs: events.append(("post", float(p[0].detach()))))
        events.append(optimizer.step(closure))
        p.grad = torch.ones(3)
        events.append(optimizer.step())
        return events

    assert record(FusedSGD) == record(torch.optim.SGD)


def test_a_pre_hook_may_replace_the_arguments():
    ours, _ = twins(FusedSGD, [(3,)])
    ours.register_step_pre_hook(lambda o, args, kwargs: ((o, lambda: 5), {}))
    assert ours.step() == 5


def test_a_subclass_s_step_runs_hooks_once():
    class Sub(FusedSGD):
        def step(self, closure=None):
            return super().step(closure)

    calls = []
    sub = Sub([nn.Parameter(torch.ones(3))], lr=0.1)
    sub.register_step_post_hook(lambda *_: calls.append(1))
    sub.step()
    assert calls == [1]


def test_profilers_see_the_step():
    ours, _ = twins(FusedSGD, [(3,)])
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        ours.step()
    assert "Optimizer.step#FusedSGD.step" in {event.key for event in profile.key_averages()}


def test_tensor_learning_rates_are_read_at_each_step(cls):
    ours, theirs = twins(cls, [(9,), (10,)])
    rates = torch.tensor(0.1), torch.tensor(0.1, dtype=torch.float64)  # with the first torch computes in float
    for optimizer in (ours, theirs):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate.clone()
    for value in (0.1, 0.05, 0.3):
        for optimizer in (ours, theirs):
            for group in optimizer.param_groups:
                group["lr"].fill_(value)
        step_both(ours, theirs)
    for optimizer in (ours, theirs):
        for group in optimizer.param_groups:
            group["lr"].requires_grad_()
    step_both(ours, theirs)
    assert set(ours.native_report().values()) == {"its learning rate requires grad"}


def test_a_scheduler_drives_it(cls):
    ours, theirs = twins(cls, [(9,), (10,)])
    schedulers = [
        torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.5, total_steps=10, cycle_momentum=True) for o in (ours, theirs)
    ]
    for _ in range(9):
        step_both(ours, theirs)
        for scheduler in schedulers:
            scheduler.step()


def test_device_schedule_on_the_cpu(cls):
    ours, theirs = twins(cls, [(9,), (10,)])
    step = torch.zeros((), dtype=torch.int64)
    ours.set_device_schedule(step, [(0.1, 4.0, 0.0), (0.2, 8.0, 2.0)])
    for i in range(8):
        theirs.param_groups[0]["lr"] = 0.1 * 0.5 * (1 + math.cos(math.pi * i / 4)) if i < 4 else 0.0
        warm = (i + 1) / 3 if i < 2 else 0.5 * (1 + math.cos(math.pi * (i - 2) / 6))
        theirs.param_groups[1]["lr"] = 0.2 * warm
        set_gradients(ours, theirs)
        ours.step()
        theirs.step()
        step += 1
        for p, q in zip(params_of(ours), params_of(theirs), strict=True):
            # cos^2 of half the angle rounds otherwise than (1 + cos) / 2: 1e-15 of the rate, an ulp of p a step.
            torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)
    assert copy.deepcopy(ours)._device_schedule is not None
    ours.set_device_schedule(None)
    theirs.param_groups[0]["lr"] = ours.param_groups[0]["lr"]
    before = params_of(ours)[0].detach().clone()
    set_gradients(ours)
    ours.step()
    assert not torch.equal(params_of(ours)[0], before)


def test_device_schedule_refuses_what_does_not_fit():
    ours, _ = twins(FusedSGD, [(9,)])
    with pytest.raises(ValueError, match="step must be an int64 tensor of one element"):
        ours.set_device_schedule(torch.zeros(1), [(0.1, 1.0, 0.0)])
    with pytest.raises(ValueError, match="rates must have one entry for each of 1 groups, got 0"):
        ours.set_device_schedule(torch.zeros(1, dtype=torch.int64), [])


def test_without_the_compiled_half_it_warns_once_and_is_right(cls, monkeypatch):
    ours, theirs = twins(cls, [(9,)])
    monkeypatch.setattr(native, "C", None)
    monkeypatch.setattr(native, "import_error", "taken away by the test")
    compiled.missing_half.cache_clear()
    try:
        with pytest.warns(RuntimeWarning, match="taken away by the test"):
            step_both(ours, theirs)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            step_both(ours, theirs, steps=2)
        assert "taken away" in ours.native_report()["group 0, parameter 0"]
    finally:
        compiled.missing_half.cache_clear()
