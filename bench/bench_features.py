"""A cached step beside the forward and backward of the layers that train; gathering beside a plain copy.

    python -m pytest bench/bench_features.py --benchmark-json=features.json

The paper's nets at half and three quarters of their layers frozen, 32 x 32 images; on a CPU one thread and batches of
64, on a GPU batches of 128 under bfloat16 autocast. Rivals run in one process, in turns: `cached` is all that a step
does with kept features (the guard of the weights, the gather, the forward in which frozen modules hand out rows, the
loss, backward); `suffix` is the same forward from rows that are there already, without the cache's own work; `full` and
`frozen` are the step without freezing and with the frozen forward paid. Before anything is timed the cached loss is
compared with the one computed anew. On a GPU `captured` is a whole GraphedStep on kept rows, its gather and its copies
included, and `replay` that step's graph alone.
"""

import math

import pytest
import torch
from torch import nn
from turns import in_turns

from freezeout_ext import FeatureCache, FreezeOut, FusedSGD
from freezeout_ext.features.columns import Column
from freezeout_ext.features.store import Store
from freezeout_ext.graphed import GraphedStep
from freezeout_ext.models import build_model
from freezeout_ext.training.measure import conditions

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CUDA = DEVICE.type == "cuda"
BATCH, ROUNDS = (128, 25) if CUDA else (64, 9)
# Calls between two looks at the clock: a GPU is waited for at both.
CALLS = 20 if CUDA else 1
NETS = ("vgg-16", "wrn-16-4", "densenet-40-12")
# Steps until a GraphedStep has captured.
WARM_UP_STEPS = 12


class Noise(torch.utils.data.Dataset):
    def __init__(self, count):
        self.images = torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(0))

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.images[i], i % 100


def least(steps, rounds=ROUNDS):
    """-> name -> least seconds of a call; the least of what other work on the machine only adds to."""
    times = in_turns(steps, DEVICE, rounds=rounds, repeats=CALLS, before=lambda step: None)
    return {name: min(seconds) for name, seconds in times.items()}


def net_of(name):
    return build_model(name, 100).to(DEVICE, memory_format=torch.channels_last).train()


def loss_of(model, inputs, targets):
    with torch.autocast(DEVICE.type, torch.bfloat16, enabled=CUDA):
        loss = nn.functional.cross_entropy(model(inputs), targets)
    loss.backward()
    model.zero_grad()
    return loss.detach()


@pytest.mark.parametrize("share", [0.5, 0.75])
@pytest.mark.parametrize("name", NETS)
def test_cached_step(benchmark, name, share):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = net_of(name)
    dataset = Noise(BATCH)
    inputs = dataset.images.to(DEVICE, memory_format=torch.channels_last)
    targets, keys = torch.arange(BATCH, device=DEVICE) % 100, torch.arange(BATCH)
    full = least({"full": lambda: loss_of(model, inputs, targets)}, 3)["full"]
    cache = FeatureCache(dataset, views=1, measure=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    layers = len(FreezeOut(model, optimizer, total_steps=10).layers)
    model = net_of(name)
    optimizer = FusedSGD(model.parameters(), lr=0.0)
    freezeout = FreezeOut(
        model, optimizer, total_steps=10**6, t_0=1.0, start_frozen=round(share * layers), prefix="off", cache=cache
    )

    def cached():
        with cache.samples(keys):
            return loss_of(model, inputs, targets)

    first = cached()  # watched and kept
    bounds = {"rtol": 2e-2, "atol": 1e-2} if CUDA else {"rtol": 1e-4, "atol": 1e-5}  # of bfloat16, and of float32
    torch.testing.assert_close(cached(), first, **bounds)  # gathered, and checked
    cache._forwards._checks_due._next = 10**9  # spot checks are not what is timed
    kept = cache._kept.latest
    rows = kept.store.gather(keys)

    def suffix():
        with kept.frontier.replaced(rows):
            return loss_of(model, inputs, targets)

    steps = {"cached": cached, "suffix": suffix, "frozen": lambda: loss_of(model, inputs, targets)}
    seconds = least(steps)
    if CUDA:
        seconds |= least(captured_steps(model, optimizer, freezeout, cache, inputs, targets, keys))
        benchmark.extra_info["captured_over_replay"] = seconds["captured"] / seconds["replay"]
    benchmark.extra_info.update(
        net=name, share=share, frozen=round(share * layers), layers=layers, row_bytes=kept.store.bytes // BATCH,
        milliseconds={k: 1e3 * v for k, v in (seconds | {"full": full}).items()},
        cached_over_suffix=seconds["cached"] / seconds["suffix"], cached_over_full=seconds["cached"] / full,
        frozen_over_full=seconds["frozen"] / full, conditions=conditions(DEVICE),
    )  # fmt: skip
    print(
        f"\n{name} {share}: cached / suffix {seconds['cached'] / seconds['suffix']:.3f}, / full "
        f"{seconds['cached'] / full:.3f}; frozen / full {seconds['frozen'] / full:.3f}"
    )
    benchmark.pedantic(cached, rounds=2)


def captured_steps(model, optimizer, freezeout, cache, inputs, targets, keys):
    """-> a whole GraphedStep on kept rows, and its graph alone."""
    step = GraphedStep(model, nn.functional.cross_entropy, optimizer, freezeout, amp_dtype=torch.bfloat16)

    def captured():
        with cache.samples(keys):
            return step(inputs, targets)

    for _ in range(WARM_UP_STEPS):
        captured()
    (graph,) = step._graphs.values()
    return {"captured": captured, "replay": graph._run}


@pytest.mark.parametrize("kept", [None, torch.bfloat16, torch.int8], ids=str)
@pytest.mark.parametrize("shape", [(8, 16, 16), (64, 8, 8), (197, 192)], ids=str)
def test_gather(benchmark, shape, kept):
    torch.set_num_threads(1)
    # So many bytes that no cache holds them.
    count = 2**28 // (4 * math.prod(shape)) // 64 * 64
    store = Store([Column.like(torch.zeros(1, *shape), kept)], count, count, DEVICE)
    generator = torch.Generator().manual_seed(0)
    for first in range(0, count, 64):
        store.put(torch.arange(first, first + 64), [torch.randn(64, *shape, generator=generator).to(DEVICE)])
    order = torch.randperm(count, generator=generator)
    # Both walk through all rows, so that both read from memory what no cache holds.
    plain, parts = torch.randn(count, *shape, device=DEVICE), list(order.split(64))
    at = {"gather": 0, "copy": 0}

    def gather():
        at["gather"] = (at["gather"] + 1) % len(parts)
        return store.gather(parts[at["gather"]])

    def copy():
        at["copy"] = (at["copy"] + 1) % len(parts)
        return plain[64 * at["copy"] : 64 * at["copy"] + 64].clone()

    seconds = least({"gather": gather, "copy": copy}, ROUNDS if CUDA else 400)
    benchmark.extra_info.update(
        shape=shape, kept=str(kept), rate=seconds["copy"] / seconds["gather"],
        gigabytes_per_second=plain[:64].nbytes / seconds["gather"] / 1e9, conditions=conditions(DEVICE),
    )  # fmt: skip
    print(f"\n{shape} {kept}: gather at {seconds['copy'] / seconds['gather']:.2f} of a copy's rate")
    benchmark.pedantic(gather, rounds=20)
