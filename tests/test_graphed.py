"""GraphedStep: equal to the plain loop, eagerly and through a stand-in for CUDA graphs that replays on the host."""

import copy
import itertools
from dataclasses import replace

import pytest
import torch
from host_graphs import HostGraphs, graphed_step
from torch import nn
from torch.nn import functional

from freezeout_ext import FreezeOut, FusedSGD, Schedule, graphed, native
from freezeout_ext.cuda_graphs import STREAMS, own_stream
from freezeout_ext.graphed import MAX_SHAPES, MOST_UNSETTLED_STEPS, WARM_UP_STEPS, GraphedStep
from freezeout_ext.models import build_model
from freezeout_ext.prefix import Prefix, judge

STEPS = 40
needs_native = pytest.mark.skipif(native.C is None, reason=f"the compiled half is missing: {native.import_error}")


def batches(steps=STEPS, odd=None):
    generator = torch.Generator().manual_seed(3)
    for step in range(steps):
        size = 5 if odd and step % odd == odd - 1 else 8
        yield torch.randn(size, 3, 8, 8, generator=generator), torch.randint(4, (size,), generator=generator)


def make(sgd=torch.optim.SGD, *, freeze=True, anneal=True, steps=STEPS, **options):
    torch.manual_seed(1)
    model = build_model("wrn-10-1", 4, image_size=8).train()
    optimizer = sgd(model.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-3, **options)
    freezeout = None
    if freeze:
        given = {"t_0": 0.3, "how_scale": "linear", "anneal": anneal, "measure_prefix": False}
        freezeout = FreezeOut(model, optimizer, total_steps=steps, **given)
    return model, optimizer, freezeout


def plain_loop(model, optimizer, freezeout, data):
    losses = []
    for inputs, targets in data:
        loss = functional.cross_entropy(model(inputs), targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        freezeout.step()
        losses.append(loss.item())
    return losses


def assert_equal_weights(a, b):
    for (name, x), y in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        assert torch.equal(x, y), name


@pytest.mark.parametrize("host", [None, HostGraphs], ids=["eager", "graphs"])
def test_equals_the_plain_loop(host):
    expected, *rest = make()
    losses = plain_loop(expected, *rest, batches())
    model, optimizer, freezeout = make(fused=True) if host else make()
    step = graphed_step(
        model, functional.cross_entropy, optimizer, freezeout, graphs=host() if host else None
    )  # fmt: skip
    results = [step(*batch) for batch in batches()]
    assert freezeout.num_frozen == rest[1].num_frozen == len(freezeout.layers) - 1
    if host:
        # torch's fused update rounds otherwise than its for-loop.
        torch.testing.assert_close(torch.stack([loss for loss, _ in results]), torch.tensor(losses), rtol=1e-4, atol=0)
    else:
        assert [loss.item() for loss, _ in results] == losses
        assert_equal_weights(model, expected)
    assert not results[-1][0].requires_grad and not results[-1][1].requires_grad
    assert all(p.grad is None for p in model.parameters())
    assert (step.captures > 0, step.eager_steps + step.replays) == (host is not None, STEPS)


def test_one_graph_a_shape_and_frontier_after_some_eager_steps():
    model, optimizer, freezeout = make(fused=True)
    host = HostGraphs()
    step = graphed_step(model, functional.cross_entropy, optimizer, freezeout, graphs=host)
    expected = watched = 0
    seen = {}
    for inputs, targets in batches(odd=4):
        key = len(inputs), freezeout.num_frozen
        settled = freezeout.prefix_is_settled  # else its forward is the prefix's, to look at: not counted
        watched += not settled
        seen[key] = seen.get(key, 0) + settled
        step(inputs, targets)
        expected += seen[key] == WARM_UP_STEPS + 1
        assert step.captures == expected
    assert len({frozen for _, frozen in seen}) == len(freezeout.layers)
    assert {size for size, _ in seen} == {8, 5}
    assert watched >= len(freezeout.layers) - 1
    eager = watched + sum(min(count, WARM_UP_STEPS) for count in seen.values())
    assert (step.eager_steps, step.replays, host.ran) == (eager, STEPS - eager, eager)
    assert expected > 1 and step.replays > 0


def test_many_shapes_run_eagerly_beyond_the_first_few():
    model, optimizer, _ = make(fused=True, freeze=False)
    step = graphed_step(model, functional.cross_entropy, optimizer, graphs=HostGraphs())
    for size in range(2, 2 + MAX_SHAPES + 2):
        for _ in range(WARM_UP_STEPS + 1):
            step(torch.randn(size, 3, 8, 8), torch.randint(4, (size,)))
    assert (step.captures, step.replays) == (MAX_SHAPES, MAX_SHAPES)


def test_results_outlive_the_next_replay():
    model, optimizer, _ = make(fused=True, freeze=False)
    step = graphed_step(model, functional.cross_entropy, optimizer, graphs=HostGraphs())
    results = [step(*batch) for batch in batches(WARM_UP_STEPS + 3)]
    (loss, outputs), (later, _) = results[-2:]
    *_, (_, targets) = batches(WARM_UP_STEPS + 2)
    assert loss != later
    assert loss == functional.cross_entropy(outputs, targets)


def test_a_transition_drops_all_graphs_at_once():
    """The next capture is told that it is the first: it must not look for the memory of those before."""
    firsts = []

    class Noting(HostGraphs):
        def capture(self, body, first):
            firsts.append(first)
            return super().capture(body, first)

    model, optimizer, freezeout = make(fused=True, steps=3 * STEPS)
    step = graphed_step(model, functional.cross_entropy, optimizer, freezeout, graphs=Noting())
    captures = []
    for batch in batches(3 * STEPS, odd=3):
        frozen = freezeout.num_frozen
        step(*batch)
        if freezeout.num_frozen > frozen:
            assert not step._graphs
            captures.append(step.captures)
    assert 2 in [later - earlier for earlier, later in itertools.pairwise(captures)], (
        "both shapes between two transitions"
    )
    assert firsts[: captures[0]] == [True, False]
    assert sum(firsts) <= len(captures) + 1 < len(firsts)


class FailsInCapture:
    """An engine that reads from the device where it is measured, and therefore must not be new in a capture."""

    fallbacks, bytes_held, calls, capturing = (), 0, 0, False

    def __init__(self, originals, tolerance=0.0):
        self.originals, self.tolerance = originals, tolerance

    def __call__(self, *inputs):
        type(self).calls += 1
        assert self.calls > 3 or not self.capturing
        return self.originals(*inputs)

    def fused(self):
        return {}


class Capturing(HostGraphs):
    """Runs the step in the capture too, where nothing may look at the clock; its updates count there."""

    def capture(self, body, first):
        FailsInCapture.capturing = True
        try:
            result = body()
        finally:
            FailsInCapture.capturing = False
        replay = super().capture(body, first)
        pending = [result]
        return lambda: pending.pop() if pending else replay()


def test_the_prefix_is_timed_before_the_capture(monkeypatch):
    """Runner waits for the device around each timed call: inside a capture CUDA would fail it."""
    clock = judge.now

    def now(inputs):
        assert not FailsInCapture.capturing, "the prefix is timed inside a capture"
        return clock(inputs)

    monkeypatch.setattr(judge, "now", now)
    monkeypatch.setattr("freezeout_ext.prefix.build.ExactEngine", FailsInCapture)
    monkeypatch.setattr(judge.Trial, "eager_wins", lambda self: False)
    monkeypatch.setattr(Prefix, "_gains_nothing", lambda self: False)
    monkeypatch.setattr(FailsInCapture, "calls", 0)
    torch.manual_seed(1)
    model = build_model("wrn-10-1", 4, image_size=8).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, fused=True)
    freezeout = FreezeOut(model, optimizer, total_steps=100, t_0=0.3, how_scale="linear", max_transitions=2)
    step = graphed_step(model, functional.cross_entropy, optimizer, freezeout, graphs=Capturing())
    data, frozen = batches(100), set()
    for batch in data:
        step(*batch)
        if freezeout.num_frozen and step._graphs:
            frozen.add(freezeout.num_frozen)
            (chain,) = freezeout._prefix._chains
            assert freezeout.prefix_is_settled and chain.trial.engine and not chain.trial.open
    assert len(frozen) == 2 and FailsInCapture.calls > 10


def test_a_prefix_that_never_settles_does_not_hold_the_capture_up():
    """Its trial is of a shape that does not come again; calls of others are not timed."""
    model, optimizer, freezeout = make(fused=True)
    step = graphed_step(model, functional.cross_entropy, optimizer, freezeout, graphs=HostGraphs())
    model.eval()  # the prefix waits for a forward in training mode
    data = batches(100)
    while freezeout.num_frozen == 0:
        step(*next(data))
    freezeout.schedule = replace(freezeout.schedule, total_steps=10**6)
    for _ in range(MOST_UNSETTLED_STEPS + WARM_UP_STEPS):
        step(*next(data))
        assert not step._graphs
    step(*next(data))
    assert len(step._graphs) == 1 and freezeout.prefix_report().route == "waiting"


def test_a_loaded_state_is_captured_anew():
    def start():
        model, optimizer, freezeout = make(fused=True)
        return model, optimizer, freezeout, graphed_step(
            model, functional.cross_entropy, optimizer, freezeout, graphs=HostGraphs()
        )  # fmt: skip

    model, optimizer, freezeout, step = start()
    data = list(batches())
    for batch in data[:20]:
        step(*batch)
    saved = copy.deepcopy([part.state_dict() for part in (model, optimizer, freezeout)])
    for batch in data[20:]:
        step(*batch)

    again, optimizer, freezeout, step = start()
    for batch in data[:6]:
        step(*batch)
    assert step._graphs
    freezeout.load_state_dict(saved[2])
    again.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    assert not step._graphs
    for group in optimizer.param_groups:
        group["lr"] = float(group["lr"])  # as a state that was saved without graphs brings it
    for batch in data[20:]:
        step(*batch)
    assert all(isinstance(group["lr"], torch.Tensor) for group in optimizer.param_groups)
    assert_equal_weights(again, model)


@pytest.mark.parametrize("whole", [True, False], ids=["model", "one block"])
def test_loaded_weights_are_captured_anew(whole):
    """A prefix with folded weights of its own would go on with those from before."""
    model, optimizer, freezeout = make(fused=True)
    step = graphed_step(model, functional.cross_entropy, optimizer, freezeout, graphs=HostGraphs())
    data = batches()
    while not (freezeout.num_frozen and step._graphs):
        step(*next(data))
    module = model if whole else model.blocks[0]
    module.load_state_dict({name: value * 1.01 for name, value in module.state_dict().items()})
    assert not step._graphs
    copied = copy.deepcopy(model)
    captured = step.captures
    while step.captures == captured:
        step(*next(data))
    copied.load_state_dict(model.state_dict())
    assert step._graphs  # a copy's weights are not the step's
    step.close()
    assert not any(module._load_state_dict_post_hooks for module in model.modules())


def test_step_count_resumes_where_there_is_no_freezeout():
    model, optimizer, _ = make(fused=True, freeze=False)
    step = graphed_step(
        model, functional.cross_entropy, optimizer, cosine=Schedule(1, 10, t_0=1.0), graphs=HostGraphs()
    )  # fmt: skip
    step.step_count = 5
    assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(0.025)
    step(*next(batches()))
    assert step.step_count == 6


def test_mixed_precision_with_a_scaler():
    runs = []
    for host in (None, HostGraphs()):
        model, optimizer, freezeout = make(fused=True)
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=5)
        step = graphed_step(
            model, functional.cross_entropy, optimizer, freezeout, scaler=scaler, amp_dtype=torch.bfloat16,
            graphs=host,
        )  # fmt: skip
        outputs = [step(*batch)[1] for batch in batches()]
        assert outputs[0].dtype == torch.bfloat16
        assert scaler.get_scale() == 256.0 * 2 ** (STEPS // 5)
        runs.append(model)
    assert_equal_weights(*runs)


def test_what_cannot_be_captured_is_refused_by_name():
    model, optimizer, freezeout = make()
    with pytest.raises(ValueError, match=r"must be a FusedOptimizer, or made with fused=True .* got SGD with neither"):
        graphed_step(model, functional.cross_entropy, optimizer, freezeout, graphs=HostGraphs())
    with pytest.raises(ValueError, match="cosine must be None where freezeout anneals"):
        graphed_step(model, functional.cross_entropy, optimizer, freezeout, cosine=Schedule(1, 10))

    class Fails(HostGraphs):
        def capture(self, body, first):
            try:
                raise RuntimeError("operation not permitted when stream is capturing")
            finally:
                raise RuntimeError("capture ended")  # as torch.cuda.graph's end does

    model, optimizer, freezeout = make(fused=True)
    step = graphed_step(model, functional.cross_entropy, optimizer, freezeout, graphs=Fails())
    with pytest.raises(RuntimeError, match="cannot be captured as a CUDA graph; run it without: operation not perm"):
        for batch in batches():
            step(*batch)


@pytest.mark.cuda
def test_a_capture_that_fails_leaves_the_current_stream_as_it_was():
    model, _, _ = make(freeze=False)
    model = model.cuda()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, fused=True)
    step = GraphedStep(model, lambda outputs, targets: outputs.sum() * outputs.sum().item(), optimizer)
    before = torch.cuda.current_stream()
    with pytest.raises(RuntimeError, match="the step cannot be captured as a CUDA graph"):
        for inputs, targets in batches():
            step(inputs.cuda(), targets.cuda())
    assert torch.cuda.current_stream() == before


def test_what_does_not_belong_together_is_refused():
    model, optimizer, freezeout = make()
    other, others, _ = make(freeze=False)
    with pytest.raises(ValueError, match="model must be freezeout's, or hold it, got another WideResNet"):
        GraphedStep(other, functional.cross_entropy, optimizer, freezeout)
    with pytest.raises(ValueError, match="optimizer must be one of freezeout's, got another SGD"):
        GraphedStep(model, functional.cross_entropy, others, freezeout)
    GraphedStep(nn.Sequential(model), functional.cross_entropy, optimizer, freezeout)
    with pytest.raises(ValueError, match="model must have parameters, got a ReLU with none"):
        GraphedStep(nn.ReLU(), functional.cross_entropy, others)


def test_there_is_one_count_of_steps():
    model, optimizer, freezeout = make()
    step = GraphedStep(model, functional.cross_entropy, optimizer, freezeout)
    for batch in batches(3):
        step(*batch)
    assert step.step_count == freezeout.step_count == 3
    with pytest.raises(ValueError, match="step_count must be FreezeOut's, 3, got 5: load FreezeOut's own state"):
        step.step_count = 5
    freezeout.load_state_dict({**freezeout.state_dict(), "step": 20})
    assert step.step_count == 20
    step.step_count = 20


def test_close_leaves_all_to_others():
    model, optimizer, freezeout = make(fused=True)
    step = graphed_step(model, functional.cross_entropy, optimizer, freezeout, graphs=HostGraphs())
    for batch in batches(6):
        step(*batch)
    step.close()
    assert not step._graphs and not freezeout._frozen.hooks
    plain_loop(model, optimizer, freezeout, batches(STEPS - 6))


@pytest.mark.parametrize(
    ("device", "steps"), [("cpu", 60), pytest.param("cuda", 300, marks=pytest.mark.native_cuda)]
)  # fmt: skip
@pytest.mark.parametrize("prefix", ["off", "exact"])
@needs_native
def test_replays_equal_eager_steps_bit_for_bit(device, steps, prefix, monkeypatch):
    """Across every transition of a run, an odd batch among the others; rates come from the counter in both."""
    runs = []
    for graphs in (False, True):
        monkeypatch.setattr(graphed, "MAX_SHAPES", MAX_SHAPES if graphs else 0)
        torch.manual_seed(1)
        model = build_model("wrn-10-1", 4, image_size=8).to(device)
        optimizer = FusedSGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-3)
        freezeout = FreezeOut(model, optimizer, total_steps=steps, t_0=0.3, how_scale="linear", prefix=prefix)
        host = HostGraphs() if device == "cpu" else None
        step = graphed_step(model, functional.cross_entropy, optimizer, freezeout, graphs=host)
        losses = []
        for inputs, targets in batches(steps, odd=7):
            losses.append(step(inputs.to(device), targets.to(device))[0])
        assert freezeout.num_frozen == len(freezeout.layers) - 1
        assert (step.captures >= len(freezeout.layers), step.replays > steps // 8) == (graphs, graphs)
        assert step.eager_steps + step.replays == steps
        runs.append((torch.stack(losses), model))
    assert torch.equal(runs[0][0], runs[1][0])
    assert_equal_weights(runs[1][1], runs[0][1])


@pytest.mark.cuda
@pytest.mark.parametrize("name", ["fused-sgd", "sgd"])
@pytest.mark.parametrize("amp_dtype", [None, torch.bfloat16, torch.float16])
def test_cuda_graphs_equal_eager_steps(name, amp_dtype):
    if name == "fused-sgd" and (reason := native.cuda_unavailable_reason()):
        pytest.skip(reason)
    runs = []
    for graphs in (False, True):
        torch.manual_seed(1)
        model = build_model("wrn-10-1", 4, image_size=8).cuda()
        model.blocks[0].dropout = nn.Dropout(0.0)
        if name == "sgd":
            optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, fused=True)
        else:
            optimizer = FusedSGD(model.parameters(), lr=0.05, momentum=0.9)
        # Long enough for captures between the transitions, each with its steps in which the prefix is timed.
        freezeout = FreezeOut(model, optimizer, total_steps=4 * STEPS, t_0=0.3, how_scale="linear")
        scaler = torch.amp.GradScaler("cuda", init_scale=256.0, enabled=amp_dtype == torch.float16)
        step = graphed_step(
            model, functional.cross_entropy, optimizer, freezeout, scaler=scaler, amp_dtype=amp_dtype, graph=graphs
        )  # fmt: skip
        losses = [step(inputs.cuda(), targets.cuda())[0].item() for inputs, targets in batches(4 * STEPS, odd=4)]
        runs.append(losses)
        if graphs:
            assert step.captures > 1 and step.replays > 0
    # The device's cosine differs in its last bits from the host's; half precision amplifies it.
    torch.testing.assert_close(torch.tensor(runs[1]), torch.tensor(runs[0]), rtol=1e-2, atol=1e-2)


@pytest.mark.cuda
def test_a_stream_belongs_to_one_owner_at_a_time():
    """Also beside owners that only the garbage collector frees, and of more owners than there are streams."""

    class Owner:
        pass

    lasting = Owner()
    stream = own_stream(lasting, 0)
    for _ in range(3 * STREAMS):
        in_a_cycle = Owner()
        in_a_cycle.itself = in_a_cycle
        assert own_stream(in_a_cycle, 0).cuda_stream != stream.cuda_stream
    owners, handles = [], []
    with pytest.raises(RuntimeError, match="no CUDA stream is left for a capture"):
        for _ in range(STREAMS):
            owners.append(Owner())
            handles.append(own_stream(owners[-1], 0).cuda_stream)
    assert len({stream.cuda_stream, *handles}) == 1 + len(handles) <= STREAMS
