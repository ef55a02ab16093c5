"""The kernels, and whole prefixes by them, on a GPU: device time against cuDNN and against the memory's bandwidth.

pytest bench/bench_kernels.py --benchmark-json=bench/results/kernels.json

Batch 128, bfloat16, images of 32x32.
A kernel is timed as a CUDA graph of REPEATS runs, data warm in L2, so that launches from Python do not count.
Whole prefixes are timed as they are called, in turns in one process.
Every rival is compared with the reference before the rival is timed.
`-k "not compiled"` leaves torch.compile out, which takes minutes.
"""

import copy
import statistics
import time

import floors
import pytest
import torch
from torch import Tensor, nn
from torch._inductor import config as inductor_config
from turns import in_turns

from freezeout_ext.training.measure import conditions

if not torch.cuda.is_available():
    pytest.skip("no GPU: there is nothing to time", allow_module_level=True)

from freezeout_ext import kernels
from freezeout_ext.cuda_graphs import capture
from freezeout_ext.prefix.cuda import CudaEngine
from freezeout_ext.prefix.cuda_conv import Constants, ConvCall
from freezeout_ext.prefix.lower import lower_units

BATCH, DTYPE, REPEATS = 128, torch.bfloat16, 20


def image(c: int, size: int, buffer: int | None = None, first: int = 0) -> Tensor:
    whole = torch.randn(BATCH, buffer or c, size, size, dtype=DTYPE, device="cuda")
    return whole.contiguous(memory_format=torch.channels_last)[:, first : first + c]


def vectors(c: int) -> tuple[Tensor, Tensor]:
    scale, shift = torch.randn(2, c, device="cuda")
    return scale, shift


def conv(name: str) -> ConvCall:
    """One convolution of DenseNet-76-12 or WRN-40-4 as the prefix runs it."""
    c, k, size, map_size, relu, slices, adds = {
        "densenet 1x1 96 -> 48": (96, 48, 1, 32, True, True, False),
        "densenet 1x1 156 -> 48": (156, 48, 1, 32, True, True, False),
        "densenet 3x3 48 -> 12": (48, 12, 3, 32, False, True, False),
        "wrn 3x3 64": (64, 64, 3, 32, True, False, False),
        "wrn 3x3 64 two outputs": (64, 64, 3, 32, False, False, True),
        "wrn 3x3 128 two outputs": (128, 128, 3, 16, False, False, True),
        "wrn 3x3 256 two outputs": (256, 256, 3, 8, False, False, True),
    }[name]
    module = nn.Conv2d(c, k, size, padding=size // 2, bias=False).cuda().requires_grad_(False)
    return ConvCall(
        ops=kernels,
        module=module,
        x=image(c, map_size, 176 if slices and size == 1 else None),
        shape=(BATCH, k, map_size, map_size),
        constants=Constants.of(module.weight, torch.randn(k, device="cuda") if relu else None, DTYPE),
        prologue=vectors(c) if size == 1 else None,
        residual=image(k, map_size) if adds else None,
        relu=relu,
        second=vectors(k) if adds else None,
        out=image(k, map_size, 176, 24) if slices and size == 3 else None,
        tf32=False,
    )


CONVS = ("densenet 1x1 96 -> 48", "densenet 1x1 156 -> 48", "densenet 3x3 48 -> 12", "wrn 3x3 64")
CONVS += ("wrn 3x3 64 two outputs", "wrn 3x3 128 two outputs", "wrn 3x3 256 two outputs")


def timed(benchmark, run, *, bytes_moved: int, flops: int = 0) -> None:
    run()
    graph, _ = capture(lambda: [run() for _ in range(REPEATS)])

    def replay() -> None:
        graph.replay()
        torch.cuda.synchronize()

    benchmark.pedantic(replay, rounds=20, warmup_rounds=3)
    seconds = benchmark.stats.stats.median / REPEATS
    benchmark.extra_info |= {
        "microseconds_a_run": 1e6 * seconds,
        "gigabytes_per_second": bytes_moved / seconds / 1e9,
        "teraflops_per_second": flops / seconds / 1e12,
        **conditions(torch.device("cuda")),
    }


def check(found: tuple[Tensor, ...], wanted: list[Tensor]) -> None:
    for result, want in zip(found, wanted, strict=True):
        assert (result.double() - want).abs().max() <= kernels.tolerance(DTYPE) * want.abs().max()


@pytest.mark.parametrize("rival", ["plain", "cudnn", "triton"])
@pytest.mark.parametrize("name", CONVS)
def test_conv(benchmark, name: str, rival: str) -> None:
    torch.manual_seed(0)
    call = conv(name)
    ways = [way for way in call.ways() if (way if isinstance(way, str) else "triton") == rival]
    if not ways:
        pytest.skip("cuDNN's fused convolutions end in a ReLU")
    call.way()
    if rival == "cudnn" and (reason := kernels.choices()[call._key(call.ways())].rejected.get("cudnn")):
        pytest.skip(f"cuDNN multiplies its unwritten result by 0: {reason}")
    for way in ways:
        check(call.run(way), call.expected(slice(None)))
    seconds = kernels.choice.device_seconds({way: lambda way=way: call.run(way) for way in ways})
    best = min(seconds, key=seconds.get)
    results = call.run(best)
    reads = [call.x, call.constants.weight] + ([] if call.residual is None else [call.residual])
    timed(
        benchmark,
        lambda: call.run(best),
        bytes_moved=sum(t.nbytes for t in [*reads, *results]),
        flops=2 * results[0].numel() * call.constants.weight[0].numel(),
    )
    benchmark.extra_info |= {"way": str(best), "candidates_us": {str(w): 1e6 * s for w, s in seconds.items()}}


@pytest.mark.parametrize("rival", ["torch", "kernel"])
@pytest.mark.parametrize("c", [64, 180])
def test_affine_relu(benchmark, c: int, rival: str) -> None:
    torch.manual_seed(0)
    x, (scale, shift) = image(c, 32), vectors(c)
    out, wanted = torch.empty_like(x), torch.empty_like(x, dtype=torch.float64)
    kernels.affine_relu_reference(x, scale, shift, out=wanted)
    eps = 1e-5
    zeros, ones = torch.zeros_like(scale), torch.full_like(scale, 1 - eps)

    def by_torch() -> Tensor:
        return torch.nn.functional.batch_norm(x, zeros, ones, scale, shift, eps=eps).relu_()

    run = by_torch if rival == "torch" else lambda: kernels.affine_relu(x, scale, shift, out=out)
    check((run(),), [wanted])
    timed(benchmark, run, bytes_moved=2 * x.nbytes)


NETS = ("densenet-76-12", "wrn-40-4", "vgg-16", "resnet-18")
SECONDS = 3.0  # of turns, for each net
# Between bfloat16 results: each rival rounds some 30 intermediate images in its own order.
TOLERANCE = 5e-2


def half_the_units(name: str) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*floors.units_of(name, 0.5)).cuda()


def error(found: Tensor, wanted: Tensor) -> float:
    return ((found.float() - wanted).abs().max() / wanted.abs().max()).item()


def prefix_rivals(net: nn.Sequential, x: Tensor) -> tuple[dict, CudaEngine]:
    """Eager in bfloat16 channels-last, launched from Python and in a CUDA graph, and the engine (which is a graph)."""
    half = copy.deepcopy(net).to(DTYPE, memory_format=torch.channels_last)
    engine = CudaEngine(lower_units(*net), dtype=DTYPE, output_dtype=DTYPE, channels_last=True)

    def eager() -> Tensor:
        return half(x.to(DTYPE, memory_format=torch.channels_last))

    return {"eager": eager, "eager in a graph": graphed(eager), "engine": lambda: engine(x)[0]}, engine


def graphed(run) -> object:
    for _ in range(3):
        run()
    graph, out = capture(run)
    return lambda: (graph.replay(), out, run)[1]  # `run` holds the weights that the graph reads


def compare(benchmark, name: str, add_rivals) -> None:
    torch.backends.cudnn.benchmark = True
    net, x = half_the_units(name), torch.randn(BATCH, 3, 32, 32, device="cuda")
    with torch.no_grad():
        wanted = net(x)
        start = time.perf_counter()
        rivals, engine = prefix_rivals(net, x)
        for _ in range(2):  # plain; then measured and captured
            rivals["engine"]()
        torch.cuda.synchronize()
        preparation = time.perf_counter() - start
        rivals |= add_rivals(net, x, benchmark)
        errors = {rival: error(run(), wanted) for rival, run in rivals.items()}
        assert all(found <= TOLERANCE for found in errors.values()), errors
        assert engine.fused()["CUDA graph"] == 1, engine.fallbacks
        times = in_turns(rivals, x.device, rounds=15, seconds=SECONDS)
        medians = {name: 1e6 * statistics.median(values) for name, values in times.items()}
        benchmark.pedantic(rivals["engine"], rounds=1)
    benchmark.extra_info |= {
        "microseconds": medians,
        "over_eager": {rival: value / medians["eager"] for rival, value in medians.items()},
        "errors": errors,
        "units": len(net),
        "preparation_seconds": preparation,
        "fused": engine.fused(),
        "fallbacks": engine.fallbacks,
        **conditions(torch.device("cuda")),
    }


@pytest.mark.parametrize("name", NETS)
def test_prefix(benchmark, name: str) -> None:
    """Half the units, images in float32 given, bfloat16 inside; with what memory and tensor cores need at least."""
    compare(benchmark, name, lambda net, x, benchmark: {})
    if name in floors.NETS:
        planned, eager = floors.planned_prefix(name), floors.eager_prefix(name)
        seconds = 1e-6 * benchmark.extra_info["microseconds"]["engine"]
        benchmark.extra_info |= {
            "floor": {"launches": planned.launches, "bytes": planned.bytes, "flops": planned.flops},
            "eager_floor": {"launches": eager.launches, "bytes": eager.bytes, "flops": eager.flops},
            "gigabytes_per_second": planned.bytes / seconds / 1e9,
            "teraflops_per_second": planned.flops / seconds / 1e12,
        }


@pytest.mark.parametrize("name", NETS)
def test_prefix_compiled(benchmark, name: str) -> None:
    """The same beside torch.compile, tuned to the utmost, in a CUDA graph too: its compiling takes minutes."""

    def compiled(net: nn.Sequential, x: Tensor, benchmark) -> dict:
        wanted, seconds, errors = net(x), {}, {}
        # torch's Triton convolutions may be wrong: https://github.com/pytorch/pytorch/issues/173068. Then they are left
        # out.
        for backends in ("ATEN,TRITON", "ATEN"):
            half = copy.deepcopy(net).to(DTYPE, memory_format=torch.channels_last)
            torch.compiler.reset()
            start = time.perf_counter()
            with inductor_config.patch(max_autotune_conv_backends=backends):
                module = torch.compile(half, mode="max-autotune-no-cudagraphs")
                run = graphed(lambda module=module: module(x.to(DTYPE, memory_format=torch.channels_last)))
            torch.cuda.synchronize()
            seconds[backends] = time.perf_counter() - start
            errors[backends] = error(run(), wanted)
            if errors[backends] <= TOLERANCE:
                break
        benchmark.extra_info |= {
            "compile_seconds": seconds[backends],
            "conv_backends": backends,
            "errors_by_conv_backends": errors,
        }
        return {"torch.compile": run}

    compare(benchmark, name, compiled)


def test_ceilings(benchmark) -> None:
    """What this device copies and multiplies at best: the roofline of the other figures."""
    source, target = torch.empty(2, 1 << 30, dtype=torch.float32, device="cuda").normal_()
    a, b = torch.randn(2, 8192, 8192, dtype=DTYPE, device="cuda")
    runs = {"copy": lambda: target.copy_(source), "product": lambda: a @ b}
    seconds = kernels.choice.device_seconds(runs)
    benchmark.pedantic(runs["copy"], rounds=1)
    benchmark.extra_info |= {
        "copy_terabytes_per_second": 2 * source.nbytes / seconds["copy"] / 1e12,
        "bf16_teraflops_per_second": 2 * 8192**3 / seconds["product"] / 1e12,
        **conditions(torch.device("cuda")),
    }
