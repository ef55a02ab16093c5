"""The fused optimizers on a GPU: against the CPU and against torch; their streams, tables and captures.

CUDA and CPU run the same formula with every fma spelled out. So FusedSGD is equal bit for bit on both.
torch's own CUDA kernels are compiled with contraction allowed. Wherever nvcc contracted another pair than we do, a sum
differs by one rounding of its larger addend, here of values of the order of 1.
"""

import copy
import itertools
import os
import weakref

import pytest
import torch
from fused_cases import ADAM_GRID, SGD_GRID
from torch import nn

from freezeout_ext import FusedAdam, FusedAdamW, FusedSGD, native
from freezeout_ext.fused import compiled

pytestmark = pytest.mark.native_cuda

CHUNK = 8192
PERIOD = 251
SIZES = [0, 1, 3, 4, 5, 7, 8, 9, 2047, 2048, 2049, CHUNK - 1, CHUNK, CHUNK + 1, 5 * CHUNK + 3]
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


def parameters(tensors, device):
    return [nn.Parameter(t.to(device, copy=True)) for t in tensors]


def groups(params):
    return [{"params": [p], "lr": 0.01 * (i + 1)} for i, p in enumerate(params)]


def set_gradients(params, gradients):
    for p, g in zip(params, gradients, strict=True):
        p.grad = None if g is None else g.to(p.device, copy=True)


def assert_as_torch(ours, theirs):
    """Parameters and momentum within two roundings of values up to 8."""
    for p, q in zip(ours.param_groups, theirs.param_groups, strict=True):
        for a, b in zip(p["params"], q["params"], strict=True):
            assert (a in ours.state) == (b in theirs.state)
            eps = torch.finfo(a.dtype).eps
            pairs = [(a, b)]
            if a in ours.state:
                pairs.append((ours.state[a]["momentum_buffer"], theirs.state[b]["momentum_buffer"]))
            for x, y in pairs:
                torch.testing.assert_close(x, y, rtol=2 * eps, atol=16 * eps)


KINDS = [
    *((FusedSGD, options) for options in SGD_GRID),
    *((cls, options) for cls in (FusedAdamW, FusedAdam) for options in ADAM_GRID[::7]),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("cls", "options"), KINDS, ids=str)
def test_equals_torch_and_the_cpu(cls, options, dtype):
    start = [torch.randn(n).to(dtype) for n in SIZES]
    gradients = [[torch.randn(n).to(dtype) for n in SIZES] for _ in range(4)]
    gradients[0][3] = gradients[2][5] = None  # one comes late, one stays away
    ours, host, theirs = (parameters(start, device) for device in ("cuda", "cpu", "cuda"))
    optimizers = [cls(groups(params), **options) for params in (ours, host)]
    if cls is FusedSGD:
        optimizers.append(torch.optim.SGD(groups(theirs), foreach=False, **options))
    for step in gradients:
        for params, optimizer in zip((ours, host, theirs), optimizers, strict=False):
            set_gradients(params, step)
            optimizer.step()
    assert optimizers[0].native_report() == {}
    for p, q in zip(ours, host, strict=True):
        if cls is FusedSGD:
            assert torch.equal(p.cpu(), q)
        else:
            # The device's pow and the host's may differ in the last place of a double.
            torch.testing.assert_close(p.cpu(), q, rtol=2 * torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps)
    if cls is FusedSGD and dtype in (torch.float32, torch.float64):
        assert_as_torch(optimizers[0], optimizers[2])


def strided(shape, kind):
    t = torch.randn(shape, device="cuda")
    if kind == "channels-last":
        return t.contiguous(memory_format=torch.channels_last)
    if kind == "8 bytes off":  # as DDP's bucket views are
        return torch.empty(t.numel() + 2, device="cuda")[2:].view(shape).copy_(t)
    return t


@pytest.mark.parametrize("of_grad", ["contiguous", "channels-last", "8 bytes off"])
@pytest.mark.parametrize("of_param", ["contiguous", "channels-last", "8 bytes off"])
def test_layouts(of_param, of_grad):
    shape = (40, 12, 5, 5)
    p = strided(shape, of_param)
    ours, theirs = nn.Parameter(p), nn.Parameter(p.clone())
    a = FusedSGD([ours], lr=0.1, momentum=0.9, nesterov=True)
    b = torch.optim.SGD([theirs], lr=0.1, momentum=0.9, nesterov=True, foreach=False)
    for _ in range(3):
        g = strided(shape, of_grad)
        ours.grad, theirs.grad = g, g.clone()
        a.step()
        b.step()
    assert_as_torch(a, b)


@pytest.mark.parametrize(
    ("size", "dtype", "momentum"),
    [(100_000_000, torch.float32, 0.9), (2**31 + CHUNK + 1, torch.bfloat16, 0.0)],
    ids=["100 million", "more than an int counts"],
)
def test_large_tensors(size, dtype, momentum):
    needed = (5 if momentum else 4) * size * torch.finfo(dtype).bits // 8
    if (free := torch.cuda.mem_get_info()[0]) < needed:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB of free GPU memory, found {free / 2**30:.0f}")
    p = nn.Parameter(torch.full((size,), 2.0, dtype=dtype, device="cuda"))
    # A period that divides no chunk: an element of the wrong place, done twice or not at all is seen.
    p.grad = torch.empty_like(p)
    p.grad.view(-1)[: size // PERIOD * PERIOD].view(-1, PERIOD).copy_(torch.arange(PERIOD, device="cuda") / PERIOD)
    p.grad[size // PERIOD * PERIOD :] = 0.5
    optimizer = FusedSGD([p], lr=0.5, momentum=momentum)
    steps = 2 if momentum else 1
    for _ in range(steps):
        optimizer.step()
    # v = g, then 0.9 g + g: 2 - 0.5 * (1 + 1.9) g.
    factor = 0.5 * (2.9 if momentum else 1.0)
    row = (2.0 - factor * (torch.arange(PERIOD, device="cuda") / PERIOD)).to(dtype)
    whole = p.detach()[: size // PERIOD * PERIOD].view(-1, PERIOD)
    tolerance = 4 * torch.finfo(dtype).eps
    for rows in whole.split(1 << 18):
        assert (rows - row).abs().max() <= tolerance
    tail = p.detach()[size // PERIOD * PERIOD :]
    assert tail.numel() == 0 or (tail.float() - (2.0 - 0.5 * factor)).abs().max() <= tolerance


def test_several_devices_and_dtypes_in_one_optimizer():
    tensors = [torch.randn(n).to(dtype) for n, dtype in itertools.product((3, CHUNK + 1), DTYPES)]
    places = itertools.cycle(["cpu", "cuda"])
    devices = [next(places) for _ in tensors]
    ours = [parameters([t], d)[0] for t, d in zip(tensors, devices, strict=True)]
    host = parameters(tensors, "cpu")
    optimizers = [FusedSGD(groups(p), momentum=0.9, weight_decay=0.1) for p in (ours, host)]
    for _ in range(3):
        gradients = [torch.randn_like(t) for t in tensors]
        for params, optimizer in zip((ours, host), optimizers, strict=True):
            set_gradients(params, gradients)
            optimizer.step()
    assert {p.device.type for p in ours} == {"cpu", "cuda"} and optimizers[0].native_report() == {}
    assert all(torch.equal(p.cpu(), q) for p, q in zip(ours, host, strict=True))


@pytest.mark.parametrize("overflows", [set(), {0}, {2}, {0, 1, 4}], ids=str)
def test_grad_scaler(overflows):
    """Losses, weights, states and the scale itself as with torch.optim.SGD; gradients are left unscaled."""
    runs = []
    for sgd in (FusedSGD, torch.optim.SGD):
        torch.manual_seed(0)
        p = nn.Parameter(torch.randn(CHUNK + 5).cuda())
        options = {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1}
        optimizer = sgd([p], **options, **({} if sgd is FusedSGD else {"foreach": False}))
        scaler = torch.amp.GradScaler("cuda", init_scale=2.0**10, growth_interval=3)
        target = torch.randn(CHUNK + 5).cuda()
        seen = []
        for step in range(6):
            optimizer.zero_grad()
            loss = ((p - target) ** 2).sum() * (torch.inf if step in overflows else 1.0)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            seen.append((p.detach().clone(), scaler.get_scale(), len(optimizer.state)))
        runs.append((seen, p.grad, optimizer))
    for (a, scale_a, states_a), (b, scale_b, states_b) in zip(runs[0][0], runs[1][0], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)  # torch unscales in another pass
        assert (scale_a, states_a) == (scale_b, states_b)
    torch.testing.assert_close(runs[0][1], runs[1][1], rtol=1e-6, atol=1e-6)


def test_a_swapped_storage_and_a_frozen_group():
    tensors = [torch.randn(CHUNK + 9) for _ in range(3)]
    ours, theirs = parameters(tensors, "cuda"), parameters(tensors, "cuda")
    a, b = FusedSGD(groups(ours), momentum=0.9), torch.optim.SGD(groups(theirs), momentum=0.9, foreach=False)
    for step in range(6):
        if step == 2:
            old = ours[1].data
            ours[1].data = ours[1].data.clone()
            old.fill_(torch.nan)
        if step == 4:
            a.param_groups[0].update(frozen=True, lr=0.0)
            kept = ours[0].detach().clone()
            a.state.pop(ours[0])
            theirs[0].requires_grad_(False)
            b.state.pop(theirs[0])
        gradients = [torch.randn_like(t) for t in tensors]
        if step >= 4:
            gradients[0] = None
        for params, optimizer in ((ours, a), (theirs, b)):
            set_gradients(params, gradients)
            optimizer.step()
    assert torch.equal(ours[0], kept)
    assert old.isnan().all()
    assert_as_torch(a, b)


@pytest.mark.parametrize("cls", [FusedAdamW, FusedAdam])
def test_counters_are_on_the_device_and_loaded_ones_are_moved_there(cls):
    params = parameters([torch.randn(n) for n in (0, 1, CHUNK + 1, 5)], "cuda")
    optimizer = cls(groups(params), amsgrad=True)
    for step in range(5):
        for i, p in enumerate(params):
            p.grad = None if i == 3 and step < 2 else torch.randn_like(p)
        if step == 4:
            loaded = copy.deepcopy(optimizer.state_dict())
            for state in loaded["state"].values():
                state["step"] = state["step"].cpu()
            optimizer.load_state_dict(loaded)
        optimizer.step()
        assert all(state["step"].is_cuda for state in optimizer.state.values())
    assert [float(optimizer.state[p]["step"]) for p in params] == [5, 5, 5, 3]
    assert optimizer.native_report() == {}


def test_a_captured_graph_follows_the_device_schedule():
    results = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        p = nn.Parameter(torch.randn(1000).to(device))
        p.grad = torch.randn(1000).to(device)
        optimizer = FusedSGD([p], lr=1.0, momentum=0.9)
        step = torch.zeros((), dtype=torch.int64, device=device)
        optimizer.set_device_schedule(step, [(0.1, 10.0, 2.0)])
        for _ in range(3):
            optimizer.step()
            step += 1
        if device == "cuda":
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                optimizer.step()
                step += 1
        for _ in range(4):
            if device == "cuda":
                graph.replay()
            else:
                optimizer.step()
                step += 1
        results.append(p.detach().cpu())
    # The device's cospi and the host's cos may differ in the last place of a double.
    torch.testing.assert_close(*results, rtol=2e-7, atol=1e-7)


def test_the_current_stream_is_used():
    """The gradient is written late on the stream that the step runs on: on another one it would be read too early."""
    p = nn.Parameter(torch.zeros(10 * CHUNK, device="cuda"))
    optimizer = FusedSGD([p], lr=1.0)
    p.grad = torch.zeros_like(p)
    optimizer.step()
    torch.cuda.synchronize()
    expected = 0.0
    streams = [torch.cuda.Stream() for _ in range(2)]
    for k in range(6):
        stream = streams[k % 2]
        stream.wait_stream(streams[(k + 1) % 2])
        with torch.cuda.stream(stream):
            torch.cuda._sleep(20_000_000)
            p.grad.fill_(k + 1)
            optimizer.step()
        expected -= k + 1
    torch.cuda.synchronize()
    assert (p == expected).all()


def one_call_or_not(monkeypatch, run):
    """Whether run() steps in one call: nothing is prepared, nothing goes through torch, no stream is new."""
    more = []
    with monkeypatch.context() as patch:
        for owner, name in ((FusedSGD, "_prepare"), (FusedSGD, "_step_by_torch"), (compiled, "use_current_stream")):
            called = getattr(owner, name)
            patch.setattr(owner, name, lambda *args, called=called: more.append(1) or called(*args))
        run()
    return not more


ONE_CALL = pytest.mark.skipif(
    not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"), reason="torch before 2.11 has no exchange table"
)


@ONE_CALL
@pytest.mark.parametrize("kind", ["plain", "scaled", "scheduled"])
def test_steps_are_one_call_once_nothing_changes(kind, monkeypatch):
    """Two dtypes; where a gradient comes late, is laid out otherwise or a scalar lies elsewhere it is more than one."""
    start = [torch.randn(n).to(dtype) for n, dtype in ((5, torch.float32), (CHUNK + 1, torch.float64))]
    start.append(torch.randn(4, 3))
    gradients = [torch.randn_like(t) for t in start]
    ours, host = (parameters(start, d) for d in ("cuda", "cpu"))
    optimizers = [FusedSGD(groups(p), momentum=0.9, weight_decay=0.1) for p in (ours, host)]
    if kind == "scheduled":
        for optimizer, device in zip(optimizers, ("cuda", "cpu"), strict=True):
            counter = torch.full((), 3, dtype=torch.int64, device=device)
            optimizer.set_device_schedule(counter, [(0.5, float("inf"), 7.0)] * 3)

    def step(change=lambda p: None, scalars_on="cuda", scale_dtype=torch.float32):
        for params, optimizer in zip((ours, host), optimizers, strict=True):
            set_gradients(params, gradients)
            change(params[2])
            if kind == "scaled":
                device = scalars_on if optimizer is optimizers[0] else "cpu"
                optimizer.grad_scale = torch.tensor(4.0, dtype=scale_dtype, device=device)
                optimizer.found_inf = torch.tensor(0.0, device=device)
        in_one = one_call_or_not(monkeypatch, optimizers[0].step)
        optimizers[1].step()
        assert all(torch.equal(p.cpu(), q) for p, q in zip(ours[:2], host[:2], strict=True))
        torch.testing.assert_close(ours[2].cpu(), host[2])  # torch's kernels may contract
        return in_one

    def lose(p):
        p.grad = None

    def turn(p):
        p.grad = p.grad.t().contiguous().t()

    assert not step(lose)
    step(lose)
    assert step(lose)
    assert not step()  # a first gradient
    step()
    assert step() and step(lose) and step()
    if kind != "scheduled":  # which refuses gradients that go through torch
        assert not step(turn) and not step(turn) and step()
    if kind == "scaled":  # scalars elsewhere are copied
        assert step(scalars_on="cpu") and step(scale_dtype=torch.float64) and step()


@ONE_CALL
def test_another_stream_is_made_known_to_the_allocator_once(monkeypatch):
    """A table freed while a stream still reads it must not be given away: one call a step on known streams only."""
    p = nn.Parameter(torch.zeros(CHUNK, device="cuda"))
    p.grad = torch.ones_like(p)
    optimizer = FusedSGD([p], lr=1.0)
    recorded = []
    record = torch.Tensor.record_stream
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda t, s: recorded.append(s.cuda_stream) or record(t, s))
    first, second = torch.cuda.Stream(), torch.cuda.Stream()
    expected = []
    for stream in (first, second, first):
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            assert not one_call_or_not(monkeypatch, optimizer.step)
            assert one_call_or_not(monkeypatch, optimizer.step)
        torch.cuda.current_stream().wait_stream(stream)
        expected.append(stream.cuda_stream)
    assert recorded == expected
    assert (p == -6).all()


@ONE_CALL
def test_a_table_lives_as_long_as_a_graph_may_read_it(monkeypatch):
    p = nn.Parameter(torch.zeros(CHUNK + 1, device="cuda"))
    p.grad = torch.ones_like(p)
    optimizer = FusedSGD([p], lr=0.5)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        optimizer.step()
    graphs = [torch.cuda.CUDAGraph() for _ in range(2)]

    def capture(graph):
        with torch.cuda.graph(graph, stream=stream):
            optimizer.step()

    assert all(one_call_or_not(monkeypatch, lambda graph=graph: capture(graph)) for graph in graphs)
    (table,) = optimizer._prepared.tables
    assert list(optimizer._captured) == [table]  # once, however often it is captured
    table = weakref.ref(table)
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1, device="cuda"))]})
    optimizer.step()
    assert table() is not None and table() is not optimizer._prepared.tables[0]
    for graph in graphs:
        graph.replay()
    assert (p == -2).all()


@pytest.mark.skipif(
    os.environ.get("FREEZEOUT_TESTS_CUDA") != "simulated", reason="a real launch does not fail to order"
)
def test_a_launch_that_fails_counts_no_change_and_holds_no_gradient(monkeypatch):
    p = nn.Parameter(torch.zeros(5, device="cuda"))
    optimizer = FusedSGD([p], lr=0.5)
    p.grad = torch.ones_like(p)
    optimizer.step()
    version, gradient = p._version, weakref.ref(p.grad)

    with monkeypatch.context() as patch:
        patch.setattr("simulated_cuda.fails_next", True)
        with pytest.raises(RuntimeError, match="no launch"):
            optimizer.step()
    p.grad = None
    assert p._version == version and gradient() is None
    p.grad = torch.ones_like(p)
    assert one_call_or_not(monkeypatch, optimizer.step)
    assert (p == -1).all()


def test_two_optimizers_on_two_streams_at_a_time():
    torch.cuda.synchronize()
    work = []
    for k in range(2):
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            p = nn.Parameter(torch.zeros(100 * CHUNK + k, device="cuda"))
            p.grad = torch.full_like(p, k + 1)
            work.append((stream, p, FusedSGD([p], lr=0.5, momentum=0.5)))
    for _ in range(20):
        for stream, _, optimizer in work:
            with torch.cuda.stream(stream):
                optimizer.step()
    torch.cuda.synchronize()
    for k, (_, p, _) in enumerate(work):
        v = x = 0.0
        for _ in range(20):
            v = 0.5 * v + k + 1
            x -= 0.5 * v
        torch.testing.assert_close(p.detach(), torch.full_like(p, x))


@pytest.fixture
def no_waiting():
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode(mode)


@pytest.mark.parametrize("scaled", [False, True])
def test_a_step_never_waits_for_the_device(scaled, request):
    params = parameters([torch.randn(n) for n in (5, CHUNK)], "cuda")
    optimizer = FusedSGD(groups(params), momentum=0.9)
    gradients = [torch.randn_like(p) for p in params]
    set_gradients(params, gradients)
    optimizer.step()  # makes the states and uploads the table
    optimizer.step()
    if scaled:
        optimizer.grad_scale, optimizer.found_inf = torch.ones((), device="cuda"), torch.zeros((), device="cuda")
    request.getfixturevalue("no_waiting")
    for _ in range(3):
        set_gradients(params, gradients)
        optimizer.step()


@pytest.mark.hardware
def test_one_kernel_a_step():
    """228 tensors in 76 groups, as DenseNet-76-12: one launch, and nothing else on the device."""
    params = parameters([torch.randn(500) for _ in range(228)], "cuda")
    optimizer = FusedSGD([{"params": params[i : i + 3], "lr": 0.1} for i in range(0, 228, 3)], lr=0.1, momentum=0.9)
    for p in params:
        p.grad = torch.randn_like(p)
    for _ in range(3):
        optimizer.step()
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(5):
            optimizer.step()
        torch.cuda.synchronize()
    on_device = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    names = [e.name for e in on_device if any(word in e.name for word in ("kernel", "Memcpy", "Memset", "void "))]
    if not names:
        pytest.skip("torch's profiler sees nothing of this device")
    assert len(names) == 5 and all("fused_update_kernel" in name for name in names), names


def test_launch_errors_become_exceptions():
    p = nn.Parameter(torch.randn(5, device="cuda"))
    optimizer = FusedSGD([p], lr=0.1)
    p.grad = torch.randn_like(p)
    optimizer.step()
    bad = native.C.TensorBatch(
        formula=0, dtype=0, device_type=2, device_index=torch.cuda.device_count(),
        work=[(64, (0, 0, 0), 128, 0, 1, 0)], groups=[(0.1, 0.0, 0.0, 0.0, (0.0, 1.0, 0.0), 0)],
    )  # fmt: skip
    with pytest.raises(RuntimeError, match=r"fused_update_cuda: cudaSetDevice failed on cuda:\d+: cudaErrorInvalidDev"):
        bad.run(num_threads=1, schedule_step=0, grad_scale=0, found_inf=0)
    optimizer.step()  # and the device is still usable
    torch.cuda.synchronize()


def test_a_first_step_is_not_captured():
    """Its graph would hold the upload of the table."""
    p = nn.Parameter(torch.zeros(5, device="cuda"))
    p.grad = torch.ones_like(p)
    optimizer = FusedSGD([p], lr=0.5)
    graph = torch.cuda.CUDAGraph()
    refused = pytest.raises(RuntimeError, match="must have made a step like this one before a graph captures it")
    with refused, torch.cuda.graph(graph):
        optimizer.step()
    optimizer.step()
    assert (p == -0.5).all()


def test_a_captured_step_keeps_overflow_on_the_device():
    """One graph, replayed with found_inf set and not: the state moves or it does not."""
    p = nn.Parameter(torch.ones(CHUNK + 3, device="cuda"))
    optimizer = FusedSGD([p], lr=0.5)
    p.grad = torch.ones_like(p)
    found, scale = torch.zeros((), device="cuda"), torch.ones((), device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        optimizer.step()
        optimizer.grad_scale, optimizer.found_inf = scale, found
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    for value, expected in ((0.0, 0.0), (1.0, 0.0), (3.0, 0.0), (0.0, -0.5)):
        found.fill_(value)
        graph.replay()
        assert (p == expected).all(), value
