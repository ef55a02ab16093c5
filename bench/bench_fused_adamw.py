"""One AdamW step: torch's for-loop, foreach and fused against FusedAdamW, and the time memory needs for the bytes.

pytest bench/bench_fused_adamw.py --benchmark-json=bench/results/fused_adamw.json

Rivals take turns in one process; medians and minima in microseconds, `ratio` is torch fused over FusedAdamW. "add"
moves a step's 28 bytes a parameter (read p, gradient and both moments; write p and both moments) by a.add_(b), two
thirds of them read. On one CPU thread times are of its CPU clock, which other processes hardly touch. Runs on the GPU
where torch sees one: then each time includes the wait for the device.
"""

import statistics
import time

import bench_fused_sgd as sgd
import pytest
import torch
from torch import nn

from freezeout_ext import FusedAdamW
from freezeout_ext.training.measure import conditions

SECONDS = 2.0  # of measuring, for each case
OPTIONS = {"lr": 1e-3, "weight_decay": 0.05}
RIVALS = {
    "FusedAdamW": lambda groups: FusedAdamW(groups, **OPTIONS),
    "torch for-loop": lambda groups: torch.optim.AdamW(groups, **OPTIONS, foreach=False),
    "torch foreach": lambda groups: torch.optim.AdamW(groups, **OPTIONS, foreach=True),
    "torch fused": lambda groups: torch.optim.AdamW(groups, **OPTIONS, fused=True),
}
GROUPINGS = ("one group", "one group a layer", "one group a tensor")
NETS = ("densenet-76-12", "wrn-40-4", "resnet-50", "vit-s", "465 tensors")


def vit_shapes(width: int, depth: int) -> list[list[tuple[int, ...]]]:
    """A layer for each block of a ViT with patches of 16 x 16."""
    block = [(width,), (width,), (3 * width, width), (3 * width,), (width, width), (width,), (width,), (width,)]
    block += [(4 * width, width), (4 * width,), (width, 4 * width), (width,)]
    stem = [(1, 1, width), (1, 197, width), (width, 3, 16, 16), (width,)]
    return [stem, *[block] * depth, [(width,), (width,), (1000, width), (1000,)]]


def layer_shapes(net: str) -> list[list[tuple[int, ...]]]:
    if net == "vit-s":
        return vit_shapes(384, 12)
    if (
        net == "465 tensors"
    ):  # as many as rf-detr's fine-tuning has groups, https://github.com/roboflow/rf-detr/pull/1409
        return [[(384, 384), (384,), (384,)]] * 155
    return sgd.layer_shapes(net)


def build(net: str, grouping: str) -> dict[str, torch.optim.Optimizer]:
    """Every rival over equal parameters and gradients, after two steps."""
    optimizers = {}
    for name, make in RIVALS.items():
        torch.manual_seed(0)
        layers = [[nn.Parameter(torch.randn(s, device=sgd.DEVICE)) for s in layer] for layer in layer_shapes(net)]
        params = [p for layer in layers for p in layer]
        groups = {"one group": [params], "one group a layer": layers}.get(grouping) or [[p] for p in params]
        optimizers[name] = optimizer = make([{"params": group} for group in groups])
        for _ in range(2):
            for p in params:
                p.grad = torch.randn_like(p)
            optimizer.step()
    judge = [p for group in optimizers["torch for-loop"].param_groups for p in group["params"]]
    for optimizer in optimizers.values():
        params = [p for group in optimizer.param_groups for p in group["params"]]
        for p, q in zip(params, judge, strict=True):
            torch.testing.assert_close(p, q)
    return optimizers


def interleave(calls: dict, *, cold: bool) -> dict[str, list[float]]:
    """Microseconds of each call. Warm: after one call of the same; cold: after 128 MB of other memory."""
    other = torch.zeros(1 << 25, device=sgd.DEVICE)
    times = {name: [] for name in calls}
    alone = sgd.DEVICE.type == "cpu" and torch.get_num_threads() == 1
    clock = time.thread_time_ns if alone else time.perf_counter_ns
    end = time.perf_counter() + SECONDS
    while time.perf_counter() < end or len(times["FusedAdamW"]) < 10:
        for name, call in calls.items():
            other.add_(1) if cold else call()
            for _ in range(1 if cold else 3):
                sgd.wait()
                start = clock()
                call()
                sgd.wait()
                times[name].append((clock() - start) / 1e3)
    return times


def measure(benchmark, optimizers: dict[str, torch.optim.Optimizer], *, cold: bool, threads: int) -> None:
    torch.set_num_threads(threads)
    params = [p for group in optimizers["FusedAdamW"].param_groups for p in group["params"]]
    elements = sum(p.numel() for p in params)
    sums, addends = torch.randn(2, elements * 7 // 3, device=sgd.DEVICE)
    calls = {name: optimizer.step for name, optimizer in optimizers.items()}
    times = interleave(calls | {"add": lambda: sums.add_(addends)}, cold=cold)
    medians = {name: round(statistics.median(values), 1) for name, values in times.items()}
    minima = {name: round(min(values), 1) for name, values in times.items()}
    benchmark.extra_info |= {
        "median_us": medians,
        "min_us": minima,
        "ratio": round(medians["torch fused"] / medians["FusedAdamW"], 2),
        "ratio_of_minima": round(minima["torch fused"] / minima["FusedAdamW"], 2),
        "over_add": round(medians["FusedAdamW"] / medians["add"], 3),
        "over_add_of_minima": round(minima["FusedAdamW"] / minima["add"], 3),
        "elements": elements,
        "tensors": len(params),
        "groups": len(optimizers["FusedAdamW"].param_groups),
        "samples": len(times["FusedAdamW"]),
        **conditions(sgd.DEVICE),
        "threads": threads,
    }
    benchmark.pedantic(optimizers["FusedAdamW"].step, rounds=3)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("grouping", GROUPINGS)
@pytest.mark.parametrize("net", NETS)
def test_step(benchmark, net, grouping, threads):
    measure(benchmark, build(net, grouping), cold=False, threads=threads)


@pytest.mark.parametrize("net", NETS)
def test_step_with_cold_caches(benchmark, net):
    measure(benchmark, build(net, "one group a layer"), cold=True, threads=1)
