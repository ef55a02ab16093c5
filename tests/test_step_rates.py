"""The rates of a GraphedStep: where a captured step reads them, and what an optimizer must be for that."""

import copy

import pytest
import torch
from test_graphed import STEPS, batches, make, plain_loop
from torch.nn import functional

from freezeout_ext import FreezeOut, FusedSGD, Schedule
from freezeout_ext.graphed import WARM_UP_STEPS, GraphedStep
from freezeout_ext.models import build_model

native_cuda = pytest.mark.native_cuda
# One that computes its rates from a counter, one that reads them from tensors.
KINDS = [pytest.param(FusedSGD, marks=native_cuda), pytest.param(torch.optim.SGD, marks=pytest.mark.cuda)]


@native_cuda
@pytest.mark.parametrize("warmup_steps", [0, 5])
def test_fused_sgd_computes_its_rates_from_the_counter(warmup_steps):
    def train(graphed):
        torch.manual_seed(1)
        model = build_model("wrn-10-1", 4, image_size=8).cuda()
        optimizer = FusedSGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True)
        freezeout = FreezeOut(
            model, optimizer, total_steps=STEPS, t_0=0.3, how_scale="linear", warmup_steps=warmup_steps
        )  # fmt: skip
        data = batches(device="cuda")
        if not graphed:
            return model, plain_loop(model, optimizer, freezeout, data), freezeout
        step = GraphedStep(model, functional.cross_entropy, optimizer, freezeout)
        losses = []
        for batch in data:
            # What the host believes must not matter.
            for group in optimizer.param_groups:
                group["lr"] = 1e9
            losses.append(step(*batch)[0].item())
        assert step._rates.counter.item() == STEPS
        return model, losses, freezeout

    expected, losses, _ = train(graphed=False)
    model, graphed_losses, freezeout = train(graphed=True)
    assert freezeout.num_frozen > 0
    # cos^2 of half the angle instead of (1 + cos) / 2: the last bits of the rates differ, and the runs drift apart.
    torch.testing.assert_close(torch.tensor(graphed_losses), torch.tensor(losses), rtol=1e-3, atol=1e-4)
    assert_close(model, expected)


def assert_close(a, b):
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4)


@native_cuda
def test_fused_sgd_without_a_schedule_keeps_its_rate_and_refuses_another():
    model, optimizer, _ = make(FusedSGD, freeze=False, device="cuda")
    expected = copy.deepcopy(model)
    reference = torch.optim.SGD(expected.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-3)
    step = GraphedStep(model, functional.cross_entropy, optimizer)
    data = batches(device="cuda")
    for _ in range(6):
        inputs, targets = next(data)
        step(inputs, targets)
        functional.cross_entropy(expected(inputs), targets).backward()
        reference.step()
        reference.zero_grad()
    for p, q in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(p, q)
    optimizer.param_groups[0]["lr"] = 0.01
    with pytest.raises(RuntimeError, match="lr must not change"):
        step(*next(data))


@pytest.mark.parametrize("sgd", KINDS)
@pytest.mark.parametrize("freeze", [False, True])
def test_one_cosine_for_all_layers(sgd, freeze):
    cosine = Schedule(1, STEPS, t_0=1.0, warmup_steps=4)
    runs = []
    for graph in (False, True):
        model, optimizer, freezeout = make(sgd, freeze=freeze, anneal=False, device="cuda")
        step = GraphedStep(model, functional.cross_entropy, optimizer, freezeout, cosine=cosine, graph=graph)
        assert float(optimizer.param_groups[-1]["lr"]) == pytest.approx(0.05 / 5)
        for batch in batches(device="cuda"):
            step(*batch)
        assert float(optimizer.param_groups[-1]["lr"]) == 0
        runs.append(model)
    assert_close(*runs)


@native_cuda
def test_a_loaded_state_sets_the_counter():
    runs = []
    data = list(batches(device="cuda"))
    for graph in (False, True):
        model, optimizer, freezeout = make(FusedSGD, device="cuda")
        step = GraphedStep(model, functional.cross_entropy, optimizer, freezeout, graph=graph)
        for batch in data[:6]:
            step(*batch)
        state = freezeout.state_dict()
        freezeout.load_state_dict({**state, "step": 25})
        for batch in data[25:30]:
            step(*batch)
        runs.append(model)
    assert step._rates.counter.item() == 30
    assert_close(*runs)


@native_cuda
def test_a_transition_that_raises_leaves_the_devices_count_at_the_hosts():
    model, optimizer, freezeout = make(FusedSGD, device="cuda")
    step = GraphedStep(model, functional.cross_entropy, optimizer, freezeout)
    allowed = []

    def refuse(*_):
        if not allowed:
            raise RuntimeError("not now")

    freezeout.register_transition_hook(refuse)
    data = batches(device="cuda")
    with pytest.raises(RuntimeError, match="not now"):
        for batch in data:
            step(*batch)
    allowed.append(True)
    done = step.step_count
    assert done == freezeout.step_count < STEPS
    step(*next(data))
    assert step.step_count == freezeout.step_count == step._rates.counter.item() == done + 1


@pytest.mark.parametrize("sgd", KINDS)
def test_overflows_in_all_warm_up_steps(sgd):
    """The scale starts far too high: the first update that counts comes late, and as if nothing had been before."""
    large = 2.0**12  # of the loss; its inverse of the rate
    runs = []

    def criterion(outputs, targets):
        return large * functional.cross_entropy(outputs, targets)

    for graph in (False, True):
        torch.manual_seed(1)
        model = build_model("wrn-10-1", 4, image_size=8).cuda()
        # Eagerly torch's fused step would take unwritten memory for momentum here.
        options = {} if sgd is FusedSGD or not graph else {"fused": True}
        optimizer = sgd(model.parameters(), lr=0.05 / large, momentum=0.9, **options)
        scaler = torch.amp.GradScaler("cuda", init_scale=2.0**127)
        step = GraphedStep(
            model, criterion, optimizer, scaler=scaler, cosine=Schedule(1, STEPS, t_0=1.0), graph=graph
        )  # fmt: skip
        first = [p.detach().clone() for p in model.parameters()]
        skipped = 0
        losses = []
        for batch in batches(device="cuda"):
            losses.append(step(*batch)[0] / large)
            skipped += all(map(torch.equal, first, model.parameters()))
        assert WARM_UP_STEPS < skipped < STEPS // 2
        assert step.replays > STEPS // 3 or not graph
        runs.append(torch.stack(losses))
    # Captured rates are computed anew on the device.
    torch.testing.assert_close(runs[1], runs[0], rtol=1e-3, atol=1e-3)


@pytest.mark.cuda
def test_an_optimizer_that_asks_the_host_is_refused_with_a_scaler():
    model, _, _ = make(freeze=False, device="cuda")
    optimizer = torch.optim.AdamW(model.parameters(), capturable=True)
    with pytest.raises(
        ValueError, match=r"optimizer must be a FusedOptimizer, or made with fused=True, .* got AdamW without"
    ):
        GraphedStep(model, functional.cross_entropy, optimizer, scaler=torch.amp.GradScaler("cuda"))
