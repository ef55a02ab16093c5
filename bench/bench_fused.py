"""One optimizer step: torch's for-loop, foreach and fused against FusedSGD and FusedAdamW, and the time of the bytes.

pytest bench/bench_fused.py -k "not adamw" --benchmark-json=bench/results/fused_sgd.json
pytest bench/bench_fused.py -k adamw --benchmark-json=bench/results/fused_adamw.json

Rivals take turns in one process. Times are medians and minima in microseconds. `ratio` is torch fused over ours.
SGD moves 20 bytes a parameter: it reads p, gradient and buffer, and writes p and buffer. AdamW moves 28: it reads p,
the gradient and both moments, and writes p and both moments.
Two others move as many bytes of random numbers: a.copy_(b), which reads half of them, and a.add_(b), which reads two
thirds.
On one CPU thread times are that thread's CPU time, which other processes hardly change.
Where torch sees a GPU the benchmark runs there, and each time includes the wait for the device.
"""

import statistics
from collections.abc import Callable

import pytest
import torch
from torch import nn
from turns import in_turns

from freezeout_ext import FusedAdamW, FusedSGD
from freezeout_ext.models import build_model
from freezeout_ext.training.measure import conditions

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
Rivals = dict[str, Callable[[list], torch.optim.Optimizer]]
GROUPINGS = ("one group", "one group a layer", "one group a tensor")
THREADS = 2
SECONDS = {"sgd": 3.0, "adamw": 2.0}  # of measuring, for each case
BYTES = {"sgd": 20, "adamw": 28}
SGD = {"lr": 1e-3, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-4}
ADAMW = {"lr": 1e-3, "weight_decay": 0.05}


def rivals_of(ours: type, theirs: type, options: dict) -> Rivals:
    return {
        ours.__name__: lambda groups: ours(groups, **options),
        "torch for-loop": lambda groups: theirs(groups, **options, foreach=False),
        "torch foreach": lambda groups: theirs(groups, **options, foreach=True),
        "torch fused": lambda groups: theirs(groups, **options, fused=True),
    }


RIVALS = {
    "sgd": rivals_of(FusedSGD, torch.optim.SGD, SGD),
    "adamw": rivals_of(FusedAdamW, torch.optim.AdamW, ADAMW),
}
NETS = {
    "sgd": ("densenet-76-12", "wrn-40-4", "vgg-16", "resnet-50"),
    "adamw": ("densenet-76-12", "wrn-40-4", "resnet-50", "vit-s", "465 tensors"),
}


def resnet50_shapes() -> list[list[tuple[int, ...]]]:
    """For each convolution of ResNet-50 (ImageNet) its weight and its norm's two vectors, then the classifier."""

    def conv(inputs: int, outputs: int, kernel: int) -> list[tuple[int, ...]]:
        return [(outputs, inputs, kernel, kernel), (outputs,), (outputs,)]

    layers, inputs = [conv(3, 64, 7)], 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            layers += [conv(inputs, width, 1), conv(width, width, 3), conv(width, 4 * width, 1)]
            if block == 0:
                layers.append(conv(inputs, 4 * width, 1))
            inputs = 4 * width
    return [*layers, [(1000, 2048), (1000,)]]


def vit_shapes(width: int, depth: int) -> list[list[tuple[int, ...]]]:
    """A layer for each block of a ViT with patches of 16 x 16."""
    block = [(width,), (width,), (3 * width, width), (3 * width,), (width, width), (width,), (width,), (width,)]
    block += [(4 * width, width), (4 * width,), (width, 4 * width), (width,)]
    stem = [(1, 1, width), (1, 197, width), (width, 3, 16, 16), (width,)]
    return [stem, *[block] * depth, [(width,), (width,), (1000, width), (1000,)]]


def layer_shapes(net: str) -> list[list[tuple[int, ...]]]:
    """One layer for each convolution or linear, with the norms before it."""
    if net == "resnet-50":
        return resnet50_shapes()
    if net == "vit-s":
        return vit_shapes(384, 12)
    if net == "465 tensors":  # rf-detr's fine-tuning has as many groups, https://github.com/roboflow/rf-detr/pull/1409
        return [[(384, 384), (384,), (384,)]] * 155
    if net.startswith("tiny"):
        return [[(16,)] * int(net.removeprefix("tiny-"))] * 76
    if net == "100m":
        return [[(1000, 10_000)]] * 10
    layers, pending = [], []
    for module in build_model(net).modules():
        pending += [tuple(p.shape) for p in module.parameters(recurse=False)]
        if isinstance(module, nn.Conv2d | nn.Linear):
            layers.append(pending)
            pending = []
    layers[-1] += pending
    return layers


def params_of(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def build(rivals: Rivals, net: str, grouping: str, frozen: float) -> dict[str, torch.optim.Optimizer]:
    """Every rival over equal parameters and gradients, after two steps; the first layers frozen as FreezeOut does."""
    shapes = layer_shapes(net)
    num_frozen = int(frozen * len(shapes))
    optimizers = {}
    for name, make in rivals.items():
        torch.manual_seed(0)
        layers = [[nn.Parameter(torch.randn(shape, device=DEVICE)) for shape in layer] for layer in shapes]
        params = [p for layer in layers for p in layer]
        groups = dict(zip(GROUPINGS, ([params], layers, [[p] for p in params]), strict=True))[grouping]
        optimizers[name] = optimizer = make([{"params": group} for group in groups])
        for p in params:
            p.grad = torch.randn_like(p)
        optimizer.step()
        for group in optimizer.param_groups[:num_frozen]:
            group.update(lr=0.0, frozen=True)
            for p in group["params"]:
                p.requires_grad_(False)
                p.grad = None
                del optimizer.state[p]
        optimizer.step()
    judge = params_of(optimizers["torch for-loop"])
    for optimizer in optimizers.values():
        for p, q in zip(params_of(optimizer), judge, strict=True):
            torch.testing.assert_close(p, q)
    return optimizers


def moves(elements: int, bytes_each: int) -> dict[str, Callable[[], object]]:
    """Calls that move as many bytes as a step: a.copy_(b), which reads half, and a.add_(b), which reads two thirds."""
    a, b = torch.randn(2, elements * bytes_each // 8, device=DEVICE)
    sums, addends = (t[: elements * bytes_each // 12] for t in (a, b))
    return {"copy": lambda: a.copy_(b), "add": lambda: sums.add_(addends)}


def measure(
    benchmark,
    rule: str,
    net: str,
    grouping: str = "one group a layer",
    *,
    frozen: float = 0.0,
    cold: bool = False,
    threads: int = THREADS,
) -> None:
    """Builds and times the rivals of a rule, the first of which is ours, beside moves of as many bytes.

    Caches are warm from a call of the same, or cold from other memory.
    `ratio` is torch fused over ours. "over_copy" and "over_add" are ours over the moves.
    Each is given of medians and of minima.
    """
    torch.set_num_threads(threads)
    optimizers = build(RIVALS[rule], net, grouping, frozen)
    ours = next(iter(optimizers))
    params = [p for p in params_of(optimizers[ours]) if p.grad is not None]
    elements = sum(p.numel() for p in params)
    calls = {name: optimizer.step for name, optimizer in optimizers.items()} | moves(elements, BYTES[rule])
    other = torch.zeros(1 << 25, device=DEVICE)  # 128 MB
    before = {"before": lambda call: other.add_(1)} if cold else {}
    times = in_turns(calls, DEVICE, rounds=12, seconds=SECONDS[rule], **before)
    for suffix, key, summary in (("", "median_us", statistics.median), ("_of_minima", "min_us", min)):
        us = {name: round(1e6 * summary(values), 1) for name, values in times.items()}
        benchmark.extra_info |= {
            key: us,
            f"ratio{suffix}": round(us["torch fused"] / us[ours], 2),
            f"over_copy{suffix}": round(us[ours] / us["copy"], 3),
            f"over_add{suffix}": round(us[ours] / us["add"], 3),
        }
    benchmark.extra_info |= {
        "elements": elements,
        "tensors": len(params),
        "groups": len(optimizers[ours].param_groups),
        "samples": len(times[ours]),
        **conditions(DEVICE),
        "threads": threads,
    }
    benchmark.pedantic(optimizers[ours].step, rounds=3)


@pytest.mark.parametrize("cache", ["warm", "cold"])
@pytest.mark.parametrize("grouping", ["one group a layer", "one group"])
@pytest.mark.parametrize("net", NETS["sgd"])
def test_step(benchmark, net, grouping, cache):
    measure(benchmark, "sgd", net, grouping, cold=cache == "cold")


@pytest.mark.parametrize("frozen", [0.25, 0.5, 0.75])
@pytest.mark.parametrize("net", NETS["sgd"])
def test_step_with_frozen_layers(benchmark, net, frozen):
    measure(benchmark, "sgd", net, frozen=frozen)


@pytest.mark.parametrize("tensors", [1, 3])
def test_overhead_alone(benchmark, tensors):
    """16-element tensors in 76 groups, one thread."""
    measure(benchmark, "sgd", f"tiny-{tensors}", threads=1)


@pytest.mark.skipif(DEVICE.type == "cpu", reason="the device's bandwidth at 100 M parameters: needs a GPU")
def test_bandwidth(benchmark):
    """over_copy, over_add: the step at 100 M parameters over a copy, and an addition, that move as many bytes."""
    measure(benchmark, "sgd", "100m")


@pytest.mark.parametrize("net", ["densenet-76-12", "wrn-40-4"])
def test_share_of_a_training_step(benchmark, net):
    """The share of the update in forward, backward and update, at batch 32 of 32x32 images."""
    torch.set_num_threads(THREADS)
    model = build_model(net).to(DEVICE)
    optimizer = FusedSGD(model.parameters(), **SGD)
    inputs = torch.randn(32, 3, 32, 32, device=DEVICE)

    def forward_and_backward() -> None:
        optimizer.zero_grad()
        model(inputs).square().mean().backward()

    forward_and_backward()
    times = in_turns({"all else": forward_and_backward, "update": optimizer.step}, DEVICE, rounds=3)
    backward, update = (statistics.median(values) for values in times.values())
    benchmark.extra_info |= {
        "forward_and_backward_ms": round(1e3 * backward, 2),
        "update_ms": round(1e3 * update, 3),
        "share_percent": round(100 * update / (backward + update), 3),
        **conditions(DEVICE),
        "threads": THREADS,
    }
    benchmark.pedantic(optimizer.step, rounds=1)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("grouping", GROUPINGS)
@pytest.mark.parametrize("net", NETS["adamw"])
def test_adamw_step(benchmark, net, grouping, threads):
    measure(benchmark, "adamw", net, grouping, threads=threads)


@pytest.mark.parametrize("net", NETS["adamw"])
def test_adamw_step_with_cold_caches(benchmark, net):
    measure(benchmark, "adamw", net, cold=True, threads=1)
