"""The figures that a GPU is asked for, each found in what bench/gpu.sh measured."""

from collections.abc import Callable
from dataclasses import dataclass

Tests = dict[str, dict]  # test name, parameters included -> {"params", "median_seconds", **extra_info}


@dataclass(frozen=True)
class Target:
    """A figure that was asked for: reached where `sense` holds between what was measured and `wanted`."""

    figure: str
    sense: str  # ">=" or "<="; "" for a figure that is only stated
    wanted: float
    unit: str
    find: Callable[[Tests], float | None]


def value(tests: Tests, test: str, *keys: str) -> float | None:
    """tests[test][keys[0]][keys[1]]..., or None."""
    at: object = tests.get(test)
    for key in keys:
        at = at.get(key) if isinstance(at, dict) else None
    return float(at) if isinstance(at, int | float) else None


def of(test: str, *keys: str) -> Callable[[Tests], float | None]:
    return lambda tests: value(tests, test, *keys)


def over_compiled(net: str) -> Callable[[Tests], float | None]:
    def find(tests: Tests) -> float | None:
        test = f"test_prefix_compiled[{net}]"
        ours, theirs = (value(tests, test, "microseconds", rival) for rival in ("engine", "torch.compile"))
        return ours / theirs if ours and theirs else None

    return find


def roofline(net: str) -> Callable[[Tests], float | None]:
    """The larger of bytes over the copy bandwidth and FLOPs over the product's rate, as a share of the time."""

    def find(tests: Tests) -> float | None:
        gigabytes = value(tests, f"test_prefix[{net}]", "gigabytes_per_second")
        flops = value(tests, f"test_prefix[{net}]", "teraflops_per_second")
        terabytes = value(tests, "test_ceilings", "copy_terabytes_per_second")
        most_flops = value(tests, "test_ceilings", "bf16_teraflops_per_second")
        if None in (gigabytes, terabytes, flops, most_flops):
            return None
        return 100 * max(gigabytes / 1e3 / terabytes, flops / most_flops)

    return find


def bandwidth(tests: Tests) -> float | None:
    """The copy reads and writes as many bytes as the update does."""
    over_copy = value(tests, "test_bandwidth", "over_copy")
    return 100 / over_copy if over_copy else None


DENSE, WIDE = "densenet-76-12", "wrn-40-4"


def step(net: str, frozen: float, key: str = "over_authors") -> Callable[[Tests], float | None]:
    return of(f"test_training_step[{net}-{frozen}]", key, "graph, bf16")


# Of rows kept as they were computed, the largest ones: launches are least of it.
GATHER = "test_gather[(197, 192)-None]"
TARGETS = [
    Target(
        "optimizer, DenseNet-76-12, one group a layer: torch fused over ours", ">=", 20, "x",
        of(f"test_step[{DENSE}-one group a layer-warm]", "ratio"),
    ),
    Target("optimizer, 100 M parameters: share of the copy bandwidth", ">=", 92, "%", bandwidth),
    Target(
        "prefix bf16, half of DenseNet-76-12: over eager", "<=", 0.25, "",
        of(f"test_prefix[{DENSE}]", "over_eager", "engine"),
    ),
    Target("the same, second goal", "<=", 0.15, "", of(f"test_prefix[{DENSE}]", "over_eager", "engine")),
    Target("prefix bf16, half of DenseNet-76-12, over torch.compile", "<=", 1, "", over_compiled(DENSE)),
    Target(
        "prefix bf16, half of WRN-40-4: over eager", "<=", 0.6, "", of(f"test_prefix[{WIDE}]", "over_eager", "engine")
    ),
    Target("prefix bf16, half of WRN-40-4, over torch.compile", "<=", 1, "", over_compiled(WIDE)),
    *(
        Target(
            f"step, DenseNet-76-12, {100 * frozen:.0f} % frozen: authors' over GraphedStep with prefix", ">=", 3, "x",
            step(DENSE, frozen),
        )
        for frozen in (0.25, 0.5, 0.75)
    ),
    Target("prefix bf16, half of DenseNet-76-12: share of the roofline", "", 0, "%", roofline(DENSE)),
    Target("prefix bf16, half of WRN-40-4: share of the roofline", "", 0, "%", roofline(WIDE)),
    Target("step, WRN-40-4, half frozen: over authors' style", "", 0, "x", step(WIDE, 0.5)),
    Target("step, VGG-16, half frozen: over authors' style", "", 0, "x", step("vgg-16", 0.5)),
    Target(
        "epoch, DenseNet-76-12, half frozen: the same", ">=", 3, "x",
        step(DENSE, 0.5, "epoch_over_authors"),
    ),
    *(
        Target(
            f"kept features, {net}, half frozen: captured step over its graph", "<=", 1.05, "",
            of(f"test_cached_step[{net}-0.5]", "captured_over_replay"),
        )
        for net in ("densenet-40-12", "wrn-16-4", "vgg-16")
    ),
    Target("gather of kept rows: rate over a plain copy's", ">=", 0.8, "", of(GATHER, "rate")),
]  # fmt: skip
