"""One optimizer step: torch's for-loop, foreach and fused against FusedSGD, and the time memory needs for the bytes.

pytest bench/bench_fused_sgd.py --benchmark-json=bench/results/fused_sgd.json

Rivals take turns in one process. Times are medians and minima in microseconds. `ratio` is torch fused over FusedSGD.
A step moves 20 bytes a parameter: it reads p, gradient and buffer, and writes p and buffer. Three fifths are read.
Two others move as many bytes of random numbers: a.copy_(b), which reads half of them, and a.add_(b), which reads two
thirds.
Where torch sees a GPU the benchmark runs there, and each time includes the wait for the device.
"""

import statistics

import fused_cases as cases
import pytest
import torch
from turns import in_turns

from freezeout_ext import FusedSGD
from freezeout_ext.models import build_model
from freezeout_ext.training.measure import conditions

THREADS = 2
SECONDS = 3.0  # of measuring, for each case
OPTIONS = {"lr": 1e-3, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-4}
RIVALS = {
    "FusedSGD": lambda groups: FusedSGD(groups, **OPTIONS),
    "torch for-loop": lambda groups: torch.optim.SGD(groups, **OPTIONS, foreach=False),
    "torch foreach": lambda groups: torch.optim.SGD(groups, **OPTIONS, foreach=True),
    "torch fused": lambda groups: torch.optim.SGD(groups, **OPTIONS, fused=True),
}
NETS = ("densenet-76-12", "wrn-40-4", "vgg-16", "resnet-50")


def measure(benchmark, net: str, grouping: str = "one group a layer", *, cold: bool = False, **others) -> None:
    given = {"bytes_each": 20, "cold": cold, "threads": THREADS, "seconds": SECONDS, **others}
    cases.measure(benchmark, RIVALS, net, grouping, **given)


@pytest.mark.parametrize("cache", ["warm", "cold"])
@pytest.mark.parametrize("grouping", ["one group a layer", "one group"])
@pytest.mark.parametrize("net", NETS)
def test_step(benchmark, net, grouping, cache):
    measure(benchmark, net, grouping, cold=cache == "cold")


@pytest.mark.parametrize("frozen", [0.25, 0.5, 0.75])
@pytest.mark.parametrize("net", NETS)
def test_step_with_frozen_layers(benchmark, net, frozen):
    measure(benchmark, net, frozen=frozen)


@pytest.mark.parametrize("tensors", [1, 3])
def test_overhead_alone(benchmark, tensors):
    """16-element tensors in 76 groups, one thread."""
    measure(benchmark, f"tiny-{tensors}", threads=1)


@pytest.mark.skipif(cases.DEVICE.type == "cpu", reason="the device's bandwidth at 100 M parameters: needs a GPU")
def test_bandwidth(benchmark):
    """over_copy, over_add: the step at 100 M parameters over a copy, and an addition, that move as many bytes."""
    measure(benchmark, "100m")


@pytest.mark.parametrize("net", ["densenet-76-12", "wrn-40-4"])
def test_share_of_a_training_step(benchmark, net):
    """The share of the update in forward, backward and update, at batch 32 of 32x32 images."""
    torch.set_num_threads(THREADS)
    model = build_model(net).to(cases.DEVICE)
    optimizer = FusedSGD(model.parameters(), **OPTIONS)
    inputs = torch.randn(32, 3, 32, 32, device=cases.DEVICE)

    def forward_and_backward() -> None:
        optimizer.zero_grad()
        model(inputs).square().mean().backward()

    forward_and_backward()
    times = in_turns({"all else": forward_and_backward, "update": optimizer.step}, cases.DEVICE, rounds=3)
    backward, update = (statistics.median(values) for values in times.values())
    benchmark.extra_info |= {
        "forward_and_backward_ms": round(1e3 * backward, 2),
        "update_ms": round(1e3 * update, 3),
        "share_percent": round(100 * update / (backward + update), 3),
        **conditions(cases.DEVICE),
        "threads": THREADS,
    }
    benchmark.pedantic(optimizer.step, rounds=1)
