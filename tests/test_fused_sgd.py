"""FusedSGD against torch.optim.SGD's for-loop: equal bit for bit in float32 and float64."""

import copy
import itertools
import pickle
import warnings

import pytest
import torch
from torch import nn

from freezeout_ext import FusedSGD, native
from freezeout_ext.fused import compiled

needs_native = pytest.mark.skipif(native.C is None, reason=f"no compiled half: {native.import_error}")

# Around vectors of 4, 8 and 16, the unscaling block of 1024, the chunk of 8192, and two threads' least of 2 * 16384.
SIZES = [0, 1, 3, 7, 8, 9, 15, 16, 17, 1023, 1024, 1025, 8191, 8192, 8193, 40000]
OPTION_NAMES = ("momentum", "dampening", "nesterov", "weight_decay", "maximize")
GRID = [
    dict(zip(OPTION_NAMES, values, strict=True))
    for values in itertools.product((0, 0.9), (0, 0.3), (False, True), (0, 0.01), (False, True))
    # Nesterov needs momentum, and no dampening.
    if not (values[2] and (values[0] == 0 or values[1]))
]


def twins(shapes, dtype=torch.float32, one_group_each=True, **options):
    """The same parameters twice, under FusedSGD and under torch's for-loop."""
    ours = [nn.Parameter(torch.randn(shape).to(dtype)) for shape in shapes]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    options = {"lr": 0.1, "momentum": 0.9, **options}

    def groups(params):
        return [{"params": [p]} for p in params] if one_group_each else params

    return FusedSGD(groups(ours), **options), torch.optim.SGD(groups(theirs), foreach=False, **options)


def params_of(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"]]


def set_gradients(*optimizers, which=None):
    for i, params in enumerate(zip(*map(params_of, optimizers), strict=True)):
        gradient = torch.randn_like(params[0]) if which is None or which(i) else None
        for p in params:
            p.grad = None if gradient is None else gradient.clone()


def assert_equal(ours, theirs):
    for i, (p, q) in enumerate(zip(params_of(ours), params_of(theirs), strict=True)):
        assert torch.equal(p, q), f"parameter {i}"
        assert (p in ours.state) == (q in theirs.state), f"state {i}"
        if p in ours.state:
            assert ours.state[p].keys() == theirs.state[q].keys() == {"momentum_buffer"}
            a, b = ours.state[p]["momentum_buffer"], theirs.state[q]["momentum_buffer"]
            assert torch.equal(a, b) and a.stride() == b.stride(), f"momentum_buffer {i}"


def step_both(ours, theirs, steps=1, which=None):
    for _ in range(steps):
        set_gradients(ours, theirs, which=which)
        ours.step()
        theirs.step()
        assert_equal(ours, theirs)


@pytest.mark.parametrize("isa", native.C.cpu_isas() if native.C else [])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_equals_the_for_loop_over_the_option_grid(dtype, isa):
    used = native.C.cpu_isa()
    native.C.use_cpu_isa(isa)
    try:
        for options in GRID:
            sizes = SIZES[:-3] if isa == "baseline" else SIZES
            ours, theirs = twins([(n,) for n in sizes], dtype, **options)
            step_both(ours, theirs, steps=3 if isa == "baseline" else 20)
            assert ours.native_report() == {}
    finally:
        native.C.use_cpu_isa(used)


def test_threads_split_tensors_and_change_nothing():
    ours, theirs = twins([(50_000,), (3,), (0,), (70_001,)], weight_decay=0.1)
    torch.set_num_threads(3)
    try:
        step_both(ours, theirs, steps=3)
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", GRID, ids=str)
def test_half_types_are_rounded_once(dtype, options):
    ours, _ = twins([(33,), (2000,)], dtype, lr=0.1, **options)
    if options["momentum"] and options["dampening"]:  # a first step with dampening is torch's, which rounds more often
        set_gradients(ours)
        ours.step()
    for _ in range(3):
        # In double from what is stored: nothing but the stores may round (and float inside, 1e-7 of the terms).
        before = [
            (p.double(), ours.state[p].get("momentum_buffer") if p in ours.state else None) for p in params_of(ours)
        ]
        before = [(p, None if b is None else b.double()) for p, b in before]
        set_gradients(ours)
        ours.step()
        for p, (p0, b0) in zip(params_of(ours), before, strict=True):
            d = (-p.grad if options["maximize"] else p.grad).double() + options["weight_decay"] * p0
            b = d if b0 is None else options["momentum"] * b0 + (1 - options["dampening"]) * d
            u = d if options["momentum"] == 0 else d + options["momentum"] * b if options["nesterov"] else b
            assert_within_one_rounding(p, p0 - 0.1 * u)
            if options["momentum"]:
                assert_within_one_rounding(ours.state[p]["momentum_buffer"], b)
            assert not torch.equal(p.double(), p0)


def assert_within_one_rounding(found, expected):
    # Half a unit in the last place: eps / 2 relative, in the subnormals half of the smallest one; float's own
    # roundings, 2^-22 of terms below 8, may tip a tie.
    info = torch.finfo(found.dtype)
    allowed = expected.abs() * info.eps / 2 + info.smallest_normal * info.eps / 2 + 8 * 2**-22
    assert ((found.double() - expected).abs() <= allowed).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_half_pattern_survives_a_load_and_a_store(dtype):
    bits = torch.arange(-(2**15), 2**15).to(torch.int16)
    p = nn.Parameter(bits.view(dtype).clone())
    p.grad = torch.zeros_like(p)
    FusedSGD([p], lr=0.5).step()
    nan = bits.view(dtype).isnan()
    assert torch.equal(p.detach()[~nan], bits.view(dtype)[~nan])
    assert p.detach()[nan].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_stores_round_as_torch_does(dtype):
    # p = -(-2 * g): the product is float(2 g), rounded once; ties, subnormals and overflow among them.
    lr = 1 + 2**-9
    g = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    g = g[~g.isnan()]
    p = nn.Parameter(torch.zeros_like(g))
    p.grad = g.clone()
    FusedSGD([p], lr=lr).step()
    assert torch.equal(p.detach(), (-lr * g.float()).to(dtype))


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
def test_every_layout_gives_what_torch_gives(layout):
    value = LAYOUTS[layout]()
    p, q = (nn.Parameter(torch.empty_strided(value.shape, value.stride()).copy_(value)) for _ in range(2))
    if layout == "offset by 4 bytes":
        p = nn.Parameter(torch.cat([torch.zeros(1), value])[1:])
    ours = FusedSGD([p], lr=0.1, momentum=0.9, weight_decay=0.1)
    theirs = torch.optim.SGD([q], lr=0.1, momentum=0.9, weight_decay=0.1, foreach=False)
    for _ in range(4):
        gradient = gradient_for(layout, p)
        p.grad, q.grad = gradient, gradient.clone(memory_format=torch.preserve_format)
        assert (ours.native_report() != {}) == (layout in SLOW)
        ours.step()
        theirs.step()
        assert torch.equal(p, q)
        assert torch.equal(ours.state[p]["momentum_buffer"], theirs.state[q]["momentum_buffer"])


@pytest.mark.parametrize("shape", [(1,), (1, 1), (5,)], ids=str)
def test_negative_views_are_read_as_what_they_mean(shape):
    ours, theirs = twins([shape])
    for _ in range(3):
        complex_gradient = torch.randn(*shape, dtype=torch.complex64)
        params_of(ours)[0].grad = complex_gradient.conj().imag
        params_of(theirs)[0].grad = -complex_gradient.imag
        assert params_of(ours)[0].grad.is_neg()
        ours.step()
        theirs.step()
        assert torch.equal(params_of(ours)[0], params_of(theirs)[0])


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
        ours.step()
        theirs.step()
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


def test_a_swapped_storage_is_noticed():
    ours, theirs = twins([(50,), (60,)])
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
        buffer = optimizer.state[params_of(optimizer)[0]]["momentum_buffer"]
        buffer.data = buffer.data * 2
    step_both(ours, theirs)
    for optimizer in (ours, theirs):
        p = params_of(optimizer)[0]
        old.append(optimizer.state[p]["momentum_buffer"])  # alive, so that a stale address would be written
        optimizer.state[p]["momentum_buffer"] = old[-1] * 2
    step_both(ours, theirs)
    for optimizer in (ours, theirs):
        p = params_of(optimizer)[0]
        p.data = p.data.view(5, 10)
        optimizer.state[p]["momentum_buffer"] = optimizer.state[p]["momentum_buffer"].view(5, 10)
    step_both(ours, theirs)
    for optimizer in (ours, theirs):
        p = params_of(optimizer)[0]
        p.data, p.grad = p.data.double(), None
        del optimizer.state[p]
    step_both(ours, theirs, steps=2)
    assert ours.native_report() == {}


def test_gradients_come_late_and_go():
    ours, theirs = twins([(5,)] * 4, dampening=0.5)
    for step in range(8):
        step_both(ours, theirs, which=lambda i, step=step: i <= step and (i + step) % 3)


def test_frozen_groups_are_neither_read_nor_written():
    ours, theirs = twins([(50,)] * 3, weight_decay=0.1)
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


def test_popped_state_is_freed_at_once():
    ours, _ = twins([(1000,)] * 2)
    for _ in range(3):
        set_gradients(ours)
        ours.step()
    import weakref

    p = params_of(ours)[0]
    storage = weakref.ref(ours.state[p]["momentum_buffer"])
    del ours.state[p]
    assert storage() is None


def test_groups_and_hyperparameters_may_change_at_any_time():
    ours, theirs = twins([(9,)] * 3)
    step_both(ours, theirs)
    for key, value in (("lr", 0.2), ("momentum", 0.5), ("weight_decay", 0.1), ("nesterov", True), ("maximize", True)):
        for optimizer in (ours, theirs):
            optimizer.param_groups[1][key] = value
        step_both(ours, theirs)
    for momentum in (0, 0.9):
        for optimizer in (ours, theirs):
            optimizer.param_groups[2]["momentum"] = momentum
        step_both(ours, theirs)
    value = torch.randn(7)
    for optimizer in (ours, theirs):
        optimizer.add_param_group({"params": [nn.Parameter(value.clone())], "lr": 0.3})
    step_both(ours, theirs, steps=2)
    for optimizer in (ours, theirs):
        optimizer.param_groups[0]["params"].append(optimizer.param_groups.pop()["params"][0])
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


def test_several_dtypes_and_many_groups():
    shapes = [(n % 7 + 1,) for n in range(1200)]
    ours, theirs = twins(shapes)
    for optimizer in (ours, theirs):
        for i, p in enumerate(params_of(optimizer)):
            if i % 3 == 0:
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
    def test_unscales_and_writes_back(self, scale):
        ours, theirs = twins([(5,), (2000,)], weight_decay=0.1)
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
    def test_an_overflow_changes_nothing(self, after):
        ours, theirs = twins([(5,), (6,)], dampening=0.5)
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
    def test_any_found_inf_but_zero_counts(self, found):
        ours, _ = twins([(5,)])
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

    @pytest.mark.parametrize(
        "copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"]
    )
    def test_copies_support_amp(self, copied):
        ours, _ = twins([(5,)])
        assert copied(ours)._step_supports_amp_scaling


def test_state_dict_goes_both_ways():
    ours, theirs = twins([(9,), (10,)], weight_decay=0.1)
    step_both(ours, theirs, steps=2)
    a, b = ours.state_dict(), theirs.state_dict()
    assert a.keys() == b.keys() and a["state"].keys() == b["state"].keys()
    assert [g.keys() for g in a["param_groups"]] == [g.keys() for g in b["param_groups"]]
    ours.load_state_dict(copy.deepcopy(b))
    theirs.load_state_dict(copy.deepcopy(a))
    step_both(ours, theirs, steps=2)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"])
def test_copies_go_on_by_themselves(copied):
    ours, theirs = twins([(9,), (10,)])
    step_both(ours, theirs, steps=2)
    ours, theirs = copied(ours), copied(theirs)
    step_both(ours, theirs, steps=2)
    assert ours.native_report() == {}


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
    ours, _ = twins([(3,)])
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
    ours, _ = twins([(3,)])
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        ours.step()
    assert "Optimizer.step#FusedSGD.step" in {event.key for event in profile.key_averages()}


def test_tensor_learning_rates_are_read_at_each_step():
    lr, other = torch.tensor(0.1), torch.tensor(0.1)
    ours, theirs = twins([(9,), (10,)], lr=lr)
    for group in theirs.param_groups:
        group["lr"] = other
    for value in (0.1, 0.05, 0.3):
        lr.fill_(value)
        other.fill_(value)
        step_both(ours, theirs)
    lr.requires_grad_()
    other.requires_grad_()
    step_both(ours, theirs)
    assert set(ours.native_report().values()) == {"its learning rate requires grad"}


def test_a_scheduler_drives_it():
    ours, theirs = twins([(9,), (10,)])
    schedulers = [
        torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.5, total_steps=10, cycle_momentum=True) for o in (ours, theirs)
    ]
    for _ in range(9):
        step_both(ours, theirs)
        for scheduler in schedulers:
            scheduler.step()


def test_device_schedule_on_the_cpu():
    ours, theirs = twins([(9,), (10,)])
    step = torch.zeros((), dtype=torch.int64)
    ours.set_device_schedule(step, [(0.1, 4.0, 0.0), (0.2, 8.0, 2.0)])
    import math

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
            torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)
    again = copy.deepcopy(ours)
    assert again._device_schedule is not None
    ours.set_device_schedule(None)
    theirs.param_groups[0]["lr"] = ours.param_groups[0]["lr"]
    before = params_of(ours)[0].detach().clone()
    set_gradients(ours)
    ours.step()
    assert not torch.equal(params_of(ours)[0], before)


def test_device_schedule_refuses_what_does_not_fit():
    ours, _ = twins([(9,)])
    with pytest.raises(ValueError, match="step must be an int64 tensor of one element"):
        ours.set_device_schedule(torch.zeros(1), [(0.1, 1.0, 0.0)])
    with pytest.raises(ValueError, match="rates must have one entry for each of 1 groups, got 0"):
        ours.set_device_schedule(torch.zeros(1, dtype=torch.int64), [])


def test_without_the_compiled_half_it_warns_once_and_is_right(monkeypatch):
    ours, theirs = twins([(9,)])
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
