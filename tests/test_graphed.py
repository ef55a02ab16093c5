"""GraphedStep: equal to the plain loop, eagerly and as CUDA graphs."""

import copy
import itertools
from dataclasses import replace

import pytest
import torch
from test_freezeout import assert_same
from torch import nn
from torch.nn import functional

from freezeout_ext import FreezeOut, FusedAdamW, FusedSGD, Schedule, graphed, native
from freezeout_ext.cuda_graphs import STREAMS, StepGraphs, own_stream
from freezeout_ext.graphed import MAX_SHAPES, MOST_UNSETTLED_STEPS, WARM_UP_STEPS, GraphedStep
from freezeout_ext.models import build_model

STEPS = 40
cuda = pytest.mark.cuda


def batches(steps=STEPS, odd=None, device="cpu"):
    generator = torch.Generator().manual_seed(3)
    for step in range(steps):
        size = 5 if odd and step % odd == odd - 1 else 8
        images, targets = (
            torch.randn(size, 3, 8, 8, generator=generator),
            torch.randint(4, (size,), generator=generator),
        )
        yield images.to(device), targets.to(device)


def make(sgd=torch.optim.SGD, *, freeze=True, anneal=True, steps=STEPS, device="cpu", **options):
    """A model, its optimizer (on a GPU one that can be captured) and FreezeOut or None."""
    torch.manual_seed(1)
    model = build_model("wrn-10-1", 4, image_size=8).train().to(device)
    if sgd is torch.optim.SGD:
        options = {"fused": device != "cpu", **options}
    optimizer = sgd(model.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-3, **options)
    freezeout = None
    if freeze:
        given = {"t_0": 0.3, "how_scale": "linear", "anneal": anneal, "measure_prefix": False}
        freezeout = FreezeOut(model, optimizer, total_steps=steps, **given)
    return model, optimizer, freezeout


def captured(*, freeze=True, steps=STEPS, **options):
    """model, optimizer, FreezeOut or None, and GraphedStep, on a GPU."""
    model, optimizer, freezeout = make(device="cuda", freeze=freeze, steps=steps)
    return model, optimizer, freezeout, GraphedStep(
        model, functional.cross_entropy, optimizer, freezeout, **options
    )  # fmt: skip


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


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=cuda)])
def test_equals_the_plain_loop(device):
    expected, *rest = make(device=device)
    losses = plain_loop(expected, *rest, batches(device=device))
    model, optimizer, freezeout = make(device=device)
    step = GraphedStep(model, functional.cross_entropy, optimizer, freezeout)
    results = [step(*batch) for batch in batches(device=device)]
    assert freezeout.num_frozen == rest[1].num_frozen == len(freezeout.layers) - 1
    if device == "cuda":
        # Rates in tensors of float32.
        found = torch.stack([loss for loss, _ in results]).cpu()
        torch.testing.assert_close(found, torch.tensor(losses), rtol=1e-4, atol=0)
    else:
        assert [loss.item() for loss, _ in results] == losses
        assert_same(model.state_dict(), expected.state_dict())
    assert not results[-1][0].requires_grad and not results[-1][1].requires_grad
    assert all(p.grad is None for p in model.parameters())
    assert (step.captures > 0, step.eager_steps + step.replays) == (device == "cuda", STEPS)


@cuda
def test_one_graph_a_shape_and_frontier_after_some_eager_steps():
    _, _, freezeout, step = captured()
    expected = watched = 0
    seen = {}
    for inputs, targets in batches(odd=4, device="cuda"):
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
    assert (step.eager_steps, step.replays) == (eager, STEPS - eager)
    assert expected > 1 and step.replays > 0


@cuda
def test_many_shapes_run_eagerly_beyond_the_first_few():
    *_, step = captured(freeze=False)
    for size in range(2, 2 + MAX_SHAPES + 2):
        for _ in range(WARM_UP_STEPS + 1):
            step(torch.randn(size, 3, 8, 8, device="cuda"), torch.randint(4, (size,), device="cuda"))
    assert (step.captures, step.replays) == (MAX_SHAPES, MAX_SHAPES)


@cuda
def test_results_outlive_the_next_replay():
    *_, step = captured(freeze=False)
    data = list(batches(WARM_UP_STEPS + 3, device="cuda"))
    results = [step(*batch) for batch in data]
    (loss, outputs), (later, _) = results[-2:]
    assert loss != later
    assert loss == functional.cross_entropy(outputs, data[-2][1])


@cuda
def test_a_transition_drops_all_graphs_at_once(monkeypatch):
    """The next capture is told that it is the first: it must not look for the memory of those before."""
    firsts = []
    capture = StepGraphs.capture
    monkeypatch.setattr(StepGraphs, "capture", lambda *args, first: firsts.append(first) or capture(*args, first=first))
    _, _, freezeout, step = captured(steps=3 * STEPS)
    captures = []
    for batch in batches(3 * STEPS, odd=3, device="cuda"):
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


@cuda
def test_a_prefix_that_never_settles_does_not_hold_the_capture_up():
    """Its trial is of a shape that does not come again; calls of others are not timed."""
    model, _, freezeout, step = captured()
    model.eval()  # the prefix waits for a forward in training mode
    data = batches(100, device="cuda")
    while freezeout.num_frozen == 0:
        step(*next(data))
    freezeout.schedule = replace(freezeout.schedule, total_steps=10**6)
    for _ in range(MOST_UNSETTLED_STEPS + WARM_UP_STEPS):
        step(*next(data))
        assert not step._graphs
    step(*next(data))
    assert len(step._graphs) == 1 and freezeout.prefix_report().route == "waiting"


@cuda
def test_a_loaded_state_is_captured_anew():
    model, optimizer, freezeout, step = captured()
    data = list(batches(device="cuda"))
    for batch in data[:20]:
        step(*batch)
    saved = copy.deepcopy([part.state_dict() for part in (model, optimizer, freezeout)])
    for batch in data[20:]:
        step(*batch)

    again, optimizer, freezeout, step = captured()
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
    assert_same(again.state_dict(), model.state_dict())


@cuda
@pytest.mark.parametrize("whole", [True, False], ids=["model", "one block"])
def test_loaded_weights_are_captured_anew(whole):
    """A prefix with folded weights of its own would go on with those from before."""
    model, _, freezeout, step = captured()
    data = batches(device="cuda")
    while not (freezeout.num_frozen and step._graphs):
        step(*next(data))
    module = model if whole else model.blocks[0]
    module.load_state_dict({name: value * 1.01 for name, value in module.state_dict().items()})
    assert not step._graphs
    copied = copy.deepcopy(model)
    captures = step.captures
    while step.captures == captures:
        step(*next(data))
    copied.load_state_dict(model.state_dict())
    assert step._graphs  # a copy's weights are not the step's
    step.close()
    assert not any(module._load_state_dict_post_hooks for module in model.modules())


@cuda
def test_step_count_resumes_where_there_is_no_freezeout():
    _, optimizer, _, step = captured(freeze=False, cosine=Schedule(1, 10, t_0=1.0))
    step.step_count = 5
    assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(0.025)
    step(*next(batches(device="cuda")))
    assert step.step_count == 6


@cuda
def test_what_cannot_be_captured_is_refused_by_name_and_leaves_the_current_stream_as_it_was():
    model, optimizer, freezeout = make(device="cuda", fused=False)
    with pytest.raises(ValueError, match=r"must be a FusedOptimizer, or made with fused=True .* got SGD with neither"):
        GraphedStep(model, functional.cross_entropy, optimizer, freezeout)
    with pytest.raises(ValueError, match="cosine must be None where freezeout anneals"):
        GraphedStep(model, functional.cross_entropy, optimizer, freezeout, cosine=Schedule(1, 10))
    model, optimizer, _ = make(device="cuda", freeze=False)
    step = GraphedStep(model, lambda outputs, targets: outputs.sum() * outputs.sum().item(), optimizer)
    before = torch.cuda.current_stream()
    # The capture's end raises another error, which only says that the capture failed.
    with pytest.raises(RuntimeError, match=r"captured as a CUDA graph; run it without: .*operation not permitted"):
        for batch in batches(device="cuda"):
            step(*batch)
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


@cuda
def test_close_leaves_all_to_others():
    model, optimizer, freezeout, step = captured()
    for batch in batches(6, device="cuda"):
        step(*batch)
    step.close()
    assert not step._graphs and not freezeout._frozen.hooks
    plain_loop(model, optimizer, freezeout, batches(STEPS - 6, device="cuda"))


@pytest.mark.native_cuda
@pytest.mark.parametrize(("kind", "prefix"), [(FusedAdamW, "off"), (FusedSGD, "exact")])
def test_replays_equal_eager_steps_bit_for_bit(kind, prefix, monkeypatch):
    """Across every transition of a run, an odd batch among the others; rates come from the counter in both."""
    runs, steps = [], 160
    for graphs in (False, True):
        monkeypatch.setattr(graphed, "MAX_SHAPES", MAX_SHAPES if graphs else 0)
        torch.manual_seed(1)
        model = build_model("wrn-10-1", 4, image_size=8).cuda()
        options = {"lr": 0.05, "momentum": 0.9, "nesterov": True} if kind is FusedSGD else {"lr": 1e-3}
        optimizer = kind(model.parameters(), weight_decay=1e-3, **options)
        freezeout = FreezeOut(model, optimizer, total_steps=steps, t_0=0.3, how_scale="linear", prefix=prefix)
        step = GraphedStep(model, functional.cross_entropy, optimizer, freezeout)
        losses = [step(*batch)[0] for batch in batches(steps, odd=7, device="cuda")]
        assert freezeout.num_frozen == len(freezeout.layers) - 1
        assert (step.captures >= len(freezeout.layers), step.replays > steps // 8) == (graphs, graphs)
        assert step.eager_steps + step.replays == steps
        runs.append((torch.stack(losses), model))
    assert torch.equal(runs[0][0], runs[1][0])
    assert_same(runs[1][1].state_dict(), runs[0][1].state_dict())


@cuda
@pytest.mark.parametrize(
    ("name", "amp_dtype"), [("sgd", None), ("sgd", torch.bfloat16), ("fused-sgd", torch.float16)], ids=str
)
def test_cuda_graphs_equal_eager_steps(name, amp_dtype):
    """The prefix is timed on the way, which a capture would not allow."""
    if name == "fused-sgd" and (reason := native.cuda_unavailable_reason()):
        pytest.skip(reason)
    runs = []
    for graph in (False, True):
        torch.manual_seed(1)
        model = build_model("wrn-10-1", 4, image_size=8).cuda()
        model.blocks[0].dropout = nn.Dropout(0.0)
        if name == "sgd":
            optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, fused=True)
        else:
            optimizer = FusedSGD(model.parameters(), lr=0.05, momentum=0.9)
        # Long enough for captures between the transitions, each with its steps in which the prefix is timed.
        freezeout = FreezeOut(model, optimizer, total_steps=4 * STEPS, t_0=0.3, how_scale="linear")
        scaler = torch.amp.GradScaler("cuda", init_scale=256.0, growth_interval=40, enabled=amp_dtype == torch.float16)
        step = GraphedStep(
            model, functional.cross_entropy, optimizer, freezeout, scaler=scaler, amp_dtype=amp_dtype, graph=graph
        )  # fmt: skip
        results = [step(*batch) for batch in batches(4 * STEPS, odd=4, device="cuda")]
        assert results[-1][1].dtype == (amp_dtype or torch.float32)
        assert scaler.get_scale() == (256.0 * 2 ** (4 * STEPS // 40) if scaler.is_enabled() else 1)
        assert (step.captures > 1, step.replays > 0) == (graph, graph)
        runs.append(torch.stack([loss for loss, _ in results]))
    # The device's cosine differs in its last bits from the host's; half precision amplifies it.
    torch.testing.assert_close(runs[1], runs[0], rtol=1e-2, atol=1e-2)


@cuda
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
