"""The frozen prefix against its rivals, interleaved in one process: medians and the ratio to eager under no_grad.

pytest bench/bench_prefix.py --benchmark-json=bench/results/prefix.json

FREEZEOUT_BENCH_COMPILE=0 leaves out torch.compile with freezing, which compiles for minutes.
FREEZEOUT_BENCH_BATCH sets another batch size than 64.
Page faults are much of eager's time on a CPU, so the allocator's settings are stored with the numbers.
"""

import copy
import os
import time
from collections.abc import Callable
from statistics import fmean

import pytest
import torch
import torch._dynamo
import torch._inductor.config
import torch.nn.functional as F
from torch._inductor.utils import fresh_cache
from turns import in_turns

from freezeout_ext.attach import pin
from freezeout_ext.layers import Layers, find_layers
from freezeout_ext.models import build_model
from freezeout_ext.prefix import Prefix
from freezeout_ext.prefix.cpu import CpuEngine, unsupported_dtype
from freezeout_ext.prefix.judge import TOLERANCE, median
from freezeout_ext.prefix.lower import lower_units
from freezeout_ext.training.measure import conditions

NETS = ("densenet-76-12", "wrn-40-4", "vgg-16", "resnet-18")
BATCH = int(os.environ.get("FREEZEOUT_BENCH_BATCH", "64"))
THREADS = 2
ROUNDS = 7
HALF = {"folded": torch.float32, "bf16": torch.bfloat16}


def settings() -> dict:
    return {"batch": BATCH, "threads": THREADS} | conditions(torch.device("cpu"))


def medians(rivals: dict[str, Callable[[], object]], rounds: int = ROUNDS) -> dict[str, float]:
    """Milliseconds of a call, one of each in turn."""
    times = in_turns(rivals, torch.device("cpu"), rounds=rounds, before=lambda run: None)
    return {name: 1e3 * median(values) for name, values in times.items()}


def net(name: str) -> torch.nn.Module:
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    model = build_model(name).train()
    with torch.no_grad():
        model(torch.randn(16, 3, 32, 32))
    return model


def freeze(model: torch.nn.Module, fraction: float) -> tuple[Layers, int]:
    layers = find_layers(model)
    num_frozen = int(fraction * len(layers))
    for layer in layers[:num_frozen]:
        for p in layer.parameters.values():
            p.requires_grad_(False)
        for module in layer.submodules:
            pin(module)
    return layers, num_frozen


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("mode", HALF)
def test_half_the_units(benchmark, name, mode):
    if missing := unsupported_dtype(HALF[mode]):
        pytest.skip(missing)
    layers, num_frozen = freeze(model := net(name), 0.5)
    units = [module for layer in layers[:num_frozen] for module in layer.modules.values()]
    eager, last = (
        torch.nn.Sequential(*units),
        copy.deepcopy(torch.nn.Sequential(*units)).to(memory_format=torch.channels_last),
    )
    x = torch.randn(BATCH, 3, 32, 32)
    x_last = x.to(memory_format=torch.channels_last)
    with torch.no_grad():
        expected = eager(x)
        start = time.perf_counter()
        engine = CpuEngine(lower_units(*units), dtype=HALF[mode], output_dtype=torch.float32, channels_last=False)
        (found,) = engine(x)
        preparation = 1e3 * (time.perf_counter() - start)
        error = ((found - expected).abs().max() / expected.abs().max()).item()
        assert error <= TOLERANCE[mode]
        rivals = {"eager": lambda: eager(x), "eager channels-last": lambda: last(x_last), mode: lambda: engine(x)}
        if mode == "folded" and os.environ.get("FREEZEOUT_BENCH_COMPILE") != "0":
            torch._dynamo.reset()
            compiled = torch.compile(eager)
            # In a cache of its own, so that what an earlier process compiled does not shorten the compiling.
            with torch._inductor.config.patch(freezing=True), fresh_cache():
                start = time.perf_counter()
                outcome = compiled(x)
                benchmark.extra_info["compile_seconds"] = time.perf_counter() - start
            assert (outcome - expected).abs().max() <= TOLERANCE[mode] * expected.abs().max()
            rivals["torch.compile, freezing"] = lambda: compiled(x)
        times = medians(rivals)
        benchmark.pedantic(engine, args=(x,), rounds=1)
    del model
    benchmark.extra_info |= {
        "milliseconds": times,
        "over_eager": {k: v / times["eager"] for k, v in times.items()},
        "first_call_with_preparation_ms": preparation,
        "error": error,
        "fused": engine.fused(),
        "buffer_MiB": engine.bytes_held / 2**20,
        "frozen": f"{num_frozen} of {len(layers)}",
    } | settings()


@pytest.mark.parametrize("name, fraction", [*((n, f) for n in NETS[:3] for f in (0.25, 0.5, 0.75)), (NETS[3], 0.5)])
def test_whole_iteration(benchmark, name, fraction):
    """Forward and backward of the user's own code: plain freezing, and the same with a prefix.

    With half the layers frozen both layouts are measured.
    The active layers always compute in float32, in the layout that the row names. So "bf16" is a bfloat16 prefix in
    front of a float32 suffix.
    """
    x, y = torch.randn(BATCH, 3, 32, 32), torch.randint(10, (BATCH,))
    base, prefixes, rivals = net(name), {}, {}

    def iteration(model: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        model.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss.detach()

    modes = ["off", "exact", *(mode for mode, dtype in HALF.items() if not unsupported_dtype(dtype))]
    for layout in (torch.contiguous_format, torch.channels_last)[: 2 if fraction == 0.5 else 1]:
        for mode in modes:
            if layout == torch.channels_last and mode == "exact":
                continue  # the same modules as plain freezing, which the other layout shows
            model = copy.deepcopy(base).to(memory_format=layout)
            layers, num_frozen = freeze(model, fraction)
            row = ("plain freezing" if mode == "off" else mode) + ", channels-last" * (layout == torch.channels_last)
            prefixes[row] = Prefix(model, layers, mode=mode, measure=False)
            prefixes[row].freeze(num_frozen)
            image = x.contiguous(memory_format=layout)
            iteration(model, image)
            rivals[row] = lambda model=model, image=image: iteration(model, image)
    assert all(prefix.report().route == ("off" if prefix.mode == "off" else "chain") for prefix in prefixes.values())
    times = medians(rivals, 3)
    benchmark.pedantic(rivals["folded"], rounds=1)
    plain = {row: "plain freezing" + ", channels-last" * row.endswith("last") for row in times}
    benchmark.extra_info |= {
        "milliseconds": times,
        "over_plain_in_the_same_layout": {row: t / times[plain[row]] for row, t in times.items()},
        "frozen": f"{num_frozen} of {len(layers)}",
        "report": {row: str(prefix.report()) for row, prefix in prefixes.items()},
    } | settings()


@pytest.mark.parametrize("name", NETS[:3])
@pytest.mark.parametrize("mode", HALF)
def test_transition_of_one_layer(benchmark, name, mode):
    """Milliseconds of wall time that a transition adds to the calls of the model, the mean of two in a row.

    The forward that is watched and the trial of the engine count. In mode "exact" a transition adds nothing on a CPU,
    since that mode installs nothing there.
    """
    if missing := unsupported_dtype(HALF[mode]):
        pytest.skip(missing)
    layers, num_frozen = freeze(model := net(name), 0.5)
    x = torch.randn(BATCH, 3, 32, 32)
    prefix = Prefix(model, layers, mode=mode)

    def settled() -> tuple[float, int]:
        """Milliseconds until the trial is over, and in how many calls."""
        start, calls = time.perf_counter(), 0
        while not calls or prefix._chains[0].trial.open:
            model(x)
            calls += 1
        return 1e3 * (time.perf_counter() - start), calls

    prefix.freeze(num_frozen - 2)
    settled()
    added = []
    for k in (num_frozen - 1, num_frozen):
        start = time.perf_counter()
        prefix.freeze(k)
        freezing = 1e3 * (time.perf_counter() - start)
        milliseconds, calls = settled()
        added.append(freezing + milliseconds - calls * median([settled()[0] for _ in range(5)]))
    benchmark.pedantic(prefix.report, rounds=1)
    assert prefix.report().route == "chain"
    benchmark.extra_info |= {"added_ms": fmean(added), "frozen": num_frozen} | settings()
