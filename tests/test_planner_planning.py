"""StepCosts, predict and suggest_t_0 against sums by hand; measuring on a model whose layers take known times."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional

from freezeout_ext import Schedule, find_layers
from freezeout_ext.models import build_model
from freezeout_ext.planner import (
    StepCosts,
    layer_bench,
    measure_costs,
    measure_loader,
    measuring,
    plan,
    predict,
    suggest_t_0,
)
from freezeout_ext.planner.costs import Tail, phases
from freezeout_ext.planner.marks import LayerMarks

COSTS = StepCosts(
    layers=("a", "b", "c"),
    forward=(1.0, 2.0, 4.0),
    frozen_forward=(0.5, 1.5, 3.5),
    backward=(10.0, 20.0, 40.0),
    backward_first=(10.0, 16.0, 32.0),
    optimizer=(0.3, 0.2, 0.1),
    loss=0.05,
    memory=(100, 60, 30),
    whole_step=80.0,
)


def test_a_step_costs_the_sum_of_its_parts():
    assert COSTS.step(0) == pytest.approx(1 + 2 + 4 + 0.05 + 10 + 20 + 40 + 0.3)
    assert COSTS.step(1) == pytest.approx(0.5 + 2 + 4 + 0.05 + 16 + 40 + 0.2)
    assert COSTS.step(2) == pytest.approx(0.5 + 1.5 + 4 + 0.05 + 32 + 0.1)
    assert COSTS.step(2, free_prefix=True) == pytest.approx(4 + 0.05 + 32 + 0.1)
    assert COSTS.saving(1) == pytest.approx(1 - COSTS.step(1) / COSTS.step(0))
    assert COSTS.closure_error == pytest.approx(77.35 / 80 - 1)


def test_a_loader_is_waited_for_unless_it_works_ahead():
    waits = StepCosts(**{**COSTS.to_dict(), "loader": 70.0})
    ahead = StepCosts(**{**COSTS.to_dict(), "loader": 70.0, "loader_ahead": True})
    assert waits.step(1) == pytest.approx(COSTS.step(1) + 70)
    assert ahead.step(0) == pytest.approx(COSTS.step(0))
    assert ahead.step(1) == 70


def test_a_run_costs_each_phase_its_steps():
    schedule = Schedule(3, 10, t_0=0.5, how_scale="linear")  # layers freeze at 5 and 7.5
    assert list(phases(schedule)) == [(0, 5), (1, 3), (2, 2)]
    prediction = predict(COSTS, schedule)
    cost = 5 * COSTS.step(0) + 3 * COSTS.step(1) + 2 * COSTS.step(2)
    least = 5 * COSTS.step(0) + 3 * COSTS.step(1, free_prefix=True) + 2 * COSTS.step(2, free_prefix=True)
    assert prediction.saving == pytest.approx(1 - cost / (10 * COSTS.step(0)))
    assert prediction.ceiling == pytest.approx(1 - least / (10 * COSTS.step(0)))
    assert (prediction.cost, prediction.full_cost) == pytest.approx((cost, 10 * COSTS.step(0)))
    assert prediction.memory == (100, 30, pytest.approx((5 * 100 + 3 * 60 + 2 * 30) / 10))
    assert prediction.saving_error is None
    rounds = replace(COSTS, saving_error=(0.0, 0.01, 0.03))
    assert predict(rounds, schedule).saving_error == pytest.approx((3 * 0.01 + 2 * 0.03) / 10)


def test_phases_cover_the_run_also_where_a_milestone_lies_in_its_last_step():
    for t_0 in (0.01, 0.5, 0.999, 1.0):
        spans = list(phases(Schedule(6, 7, t_0=t_0)))
        assert sum(steps for _, steps in spans) == 7 and all(steps > 0 for _, steps in spans)
        assert [k for k, _ in spans] == sorted({k for k, _ in spans})


def test_a_tail_thaws_to_the_end_of_the_run_and_costs_what_its_layers_do():
    rule = {"t_0": 0.4, "how_scale": "linear"}  # milestones 40 and 70 of 100
    schedule = Schedule(3, 100, **rule)
    assert list(phases(schedule, Tail(80, 0))) == [(0, 40), (1, 30), (2, 10), (0, 20)]
    assert list(phases(schedule, Tail(60, 0))) == [(0, 40), (1, 20), (0, 40)]  # the second layer never freezes
    assert list(phases(schedule, Tail(30, 0))) == [(0, 30), (0, 70)]
    assert predict(COSTS, schedule, Tail(80, 1)).cost == pytest.approx(
        40 * COSTS.step(0) + 30 * COSTS.step(1) + 10 * COSTS.step(2) + 20 * COSTS.step(1)
    )
    with_tail = suggest_t_0(COSTS, 0.2, how_scale="linear", total_steps=100, tail=Tail(80, 0))
    assert with_tail.t_0 < suggest_t_0(COSTS, 0.2, how_scale="linear", total_steps=100).t_0


def test_costs_and_schedule_must_be_of_equally_many_layers():
    with pytest.raises(ValueError, match="schedule must have the 3 layers of costs, got 4"):
        predict(COSTS, Schedule(4, 10))
    with pytest.raises(ValueError, match="forward must have one value a layer, got 2 for 3 layers"):
        StepCosts(**{**COSTS.to_dict(), "forward": (1.0, 2.0)})


def test_costs_go_through_json():
    assert StepCosts.from_dict(json.loads(json.dumps(COSTS.to_dict()))) == COSTS


@pytest.mark.parametrize("how_scale", ["linear", "cubic", 1.5])
def test_the_suggested_t_0_is_the_largest_that_saves_enough(how_scale):
    def saving(t_0):
        return predict(COSTS, Schedule(3, 1000, t_0=t_0, how_scale=how_scale)).saving

    suggestion = suggest_t_0(COSTS, 0.2, how_scale=how_scale, total_steps=1000)
    assert suggestion.saving == saving(suggestion.t_0) >= 0.2
    assert saving(suggestion.t_0 + 0.01) < 0.2


def test_a_saving_out_of_reach_is_not_suggested():
    suggestion = suggest_t_0(COSTS, 0.9, total_steps=1000, warmup_steps=100)
    assert suggestion.t_0 is None
    # The first layer freezes after the warm-up: 0.47 ** 3 * 1000 > 100.
    assert suggestion.saving == predict(COSTS, Schedule(3, 1000, t_0=0.47, warmup_steps=100)).saving < 0.9
    with pytest.raises(ValueError, match=r"wanted must be a saving in \(0, 1\), got 20"):
        suggest_t_0(COSTS, 20, total_steps=1000)


class Clock:
    """Stands in for `time` in the code that measures: only the layers below let it run on."""

    now = 0.0

    @classmethod
    def perf_counter(cls):
        return cls.now

    thread_time = perf_counter


class Timed(nn.Module):
    """y = w * x, which takes so long forward (half of it in eval mode), and for its weight's and input's gradient."""

    def __init__(self, forward, weight, inputs):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.times = forward, weight, inputs

    def forward(self, x):
        return TimedProduct.apply(x, self.weight, self.times, self.training)


class TimedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, times, training):
        ctx.save_for_backward(x, weight)
        ctx.times = times
        Clock.now += times[0] if training else times[0] / 2
        return x * weight

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        for needed, seconds in zip(ctx.needs_input_grad, ctx.times[:0:-1], strict=False):
            Clock.now += seconds if needed else 0
        return grad * weight, (grad * x).sum(), None, None


# Whole numbers: their sums are exact.
TIMES = [(6, 10, 40), (12, 4, 8), (2, 16, 20), (8, 6, 10)]


class TimedSGD(torch.optim.SGD):
    def step(self, closure=None):
        Clock.now += sum(p.grad is not None for group in self.param_groups for p in group["params"])
        return super().step(closure)


def timed_loss(outputs, targets):
    Clock.now += 3
    return functional.mse_loss(outputs, targets)


def measure_timed(**options):
    model = nn.Sequential(*(Timed(*times) for times in TIMES))
    return measure_costs(
        model,
        torch.randn(8, 3),
        torch.randn(8, 3),
        timed_loss,
        layers=find_layers(model, ["0", "1", "2", "3"]),
        make_optimizer=lambda groups: TimedSGD(groups, lr=0.1),
        **options,
    )


def test_measured_layers_take_their_times(monkeypatch):
    for module in (measuring, layer_bench):
        monkeypatch.setattr(module, "time", Clock)
    costs = measure_timed(rounds=2, max_seconds=1e9)
    forward, weight, inputs = zip(*TIMES, strict=True)
    assert costs.forward == forward
    assert costs.frozen_forward == (*(f / 2 for f in forward[:-1]), forward[-1])  # the last never freezes
    assert costs.backward_first == weight
    # Layer 0's input, the images, has no gradient.
    assert costs.backward == (weight[0], *(w + i for w, i in zip(weight[1:], inputs[1:], strict=True)))
    assert (costs.loss, costs.optimizer) == (3, (4, 3, 2, 1))
    assert costs.whole_step == costs.step(0) == 28 + 3 + 10 + 12 + 36 + 16 + 4
    assert costs.closure_error == 0
    assert costs.saving_error == (0, 0, 0, 0)
    assert costs.source == "measured on cpu with 1 thread, batch 8, medians of 2 rounds of CPU time"


@pytest.mark.parametrize(("max_seconds", "rounds"), [(0, 1), (1e9, 5)])
def test_no_round_begins_after_max_seconds(monkeypatch, max_seconds, rounds):
    for module in (measuring, layer_bench):
        monkeypatch.setattr(module, "time", Clock)
    told = []
    costs = measure_timed(rounds=5, max_seconds=max_seconds, on_progress=lambda done, total: told.append((done, total)))
    assert told == [(done, 20) for done in range(4 * rounds)]
    assert costs.source.endswith(f"medians of {rounds} round{'s' * (rounds > 1)} of CPU time")
    assert (costs.saving_error is None) == (rounds == 1)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_measuring_leaves_model_and_generator_as_they_are(device):
    model = build_model("wrn-10-1", 4, image_size=8).to(device)
    inputs, targets = torch.randn(4, 3, 8, 8, device=device), torch.randint(4, (4,), device=device)
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    made = []

    def make_optimizer(groups):
        made.append(torch.optim.Adam(groups, lr=0.1))
        return made[0]

    costs = measure_costs(model, inputs, targets, functional.cross_entropy, rounds=1, make_optimizer=make_optimizer)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert made[0].param_groups[0]["lr"] == 0
    assert costs.layers == tuple(layer.name for layer in find_layers(model))
    assert costs.source.endswith("of CPU time") == (device == "cpu")
    assert all(value > 0 for values in (costs.forward, costs.backward, costs.optimizer) for value in values)


def test_memory_counts_what_is_held_and_saved():
    model = nn.Sequential(nn.Linear(4, 5, bias=False), nn.ReLU(), nn.Linear(5, 2, bias=False))
    inputs, targets = torch.randn(3, 4), torch.randn(3, 2)
    costs = measure_costs(model, inputs, targets, functional.mse_loss, rounds=1)
    parameters, first, second = 20 + 10, 20, 10
    hidden, outputs = 15, 6
    # Saved by layer 0: inputs. The ReLU's output is saved by it and by layer 1, and counts there. The loss saves
    # outputs and targets. Each parameter has a gradient and a momentum_buffer.
    second_layer = hidden + 2 * outputs + 2 * second
    assert costs.memory == (4 * (parameters + 12 + 2 * first + second_layer), 4 * (parameters + second_layer))


def test_marks_see_layers_without_modules_and_of_several():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.position = nn.Parameter(torch.zeros(4))
            self.conv, self.norm, self.head = nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2)

        def forward(self, x):
            return self.head(self.norm(self.conv(x + self.position)))

    model = Net()
    layers = find_layers(model, ["position", ["conv", "norm"], "head"])
    ticks = iter(range(100))
    with LayerMarks(model, layers, lambda: next(ticks)) as marks:
        start = marks.now()
        loss = model(torch.randn(2, 4)).sum()
        end = marks.now()
        loss.backward()
        done = marks.now()
    assert marks.forward_intervals(start, end) == (1, 1, 1)
    # Backward: head until its input's gradient is there, then conv with norm, then the position.
    assert marks.backward_intervals(end, done) == (1, 1, 1)
    assert marks.backward_intervals(end, done, first=1) == (2, 1)


def test_a_loader_is_timed_alone_from_its_second_batch(monkeypatch):
    class Slow:
        num_workers = 2

        def __iter__(self):
            for seconds in (100, 2, 3, 7):
                Clock.now += seconds
                yield None

    monkeypatch.setattr(measuring, "time", Clock)
    assert measure_loader(Slow()) == (4, True)
    told = []
    assert measure_loader(Slow(), batches=2, on_progress=lambda *parts: told.append(parts)) == (2.5, True)
    assert told == [(0, 2), (1, 2), (2, 2)]
    assert measure_loader([1, 2]) == (0, False)
    with pytest.raises(ValueError, match="loader must give at least 2 batches, got 1"):
        measure_loader([1])


def test_plan_prints_and_goes_through_json():
    model = build_model("wrn-10-1", 4, image_size=8)
    inputs, targets = torch.randn(4, 3, 8, 8), torch.randint(4, (4,))
    result = plan(
        model, inputs, targets, functional.cross_entropy, total_steps=100, t_0s=[0.5, 0.8], how_scales=["linear", 2],
        rounds=1, loader=[0, 1, 2],
    )  # fmt: skip
    assert [(p.how_scale, p.t_0) for p in result.predictions] == [("linear", 0.5), ("linear", 0.8), (2, 0.5), (2, 0.8)]
    assert all(p.saving < p.ceiling for p in result.predictions)
    assert [s.how_scale for s in result.suggest(0.1)] == ["linear", 2]
    text = str(result)
    assert all(name in text for name in (*result.costs.layers, "saving", "ceiling", "add up to"))
    values = json.loads(json.dumps(result.to_dict()))
    assert values["predictions"][0]["saving"] == result.predictions[0].saving
    assert values["closure_error"] == result.costs.closure_error


def test_rounds_must_be_positive():
    with pytest.raises(ValueError, match="rounds must be >= 1, got 0"):
        measure_costs(nn.Linear(2, 2), torch.ones(1, 2), torch.ones(1, 2), functional.mse_loss, rounds=0)
