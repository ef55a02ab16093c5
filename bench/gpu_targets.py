"""The figures that a GPU is asked for, each found in what bench/gpu.sh measured."""

from collections.abc import Callable
from dataclasses import dataclass

Tests = dict[str, dict]  # test name -> {"params", "median_seconds", **extra_info}


@dataclass(frozen=True)
class Target:
    """A figure that was asked for: reached where `sense` holds between what was measured and `wanted`."""

    figure: str
    sense: str  # ">=" or "<="; "" for a figure that is only stated
    wanted: float
    unit: str
    find: Callable[[Tests], float | None]


def found(tests: Tests, function: str, /, **params: object) -> dict | None:
    """The one benchmark of this function and these parameters."""
    for test, values in tests.items():
        same = all(values["params"].get(key) == value for key, value in params.items())
        if test.partition("[")[0] == function and same:
            return values
    return None


def value(tests: Tests, function: str, /, *keys: str, **params: object) -> float | None:
    """found(...)[keys[0]][keys[1]]..., or None."""
    at: object = found(tests, function, **params)
    for key in keys:
        at = at.get(key) if isinstance(at, dict) else None
    return float(at) if isinstance(at, int | float) else None


def over_eager(net: str) -> Callable[[Tests], float | None]:
    return lambda tests: value(tests, "test_prefix", "over_eager", "engine", name=net)


def over_compiled(net: str) -> Callable[[Tests], float | None]:
    def find(tests: Tests) -> float | None:
        ours, theirs = (
            value(tests, "test_prefix_compiled", "microseconds", rival, name=net)
            for rival in ("engine", "torch.compile")
        )
        return ours / theirs if ours and theirs else None

    return find


def roofline(net: str) -> Callable[[Tests], float | None]:
    """The larger of bytes over the copy bandwidth and FLOPs over the product's rate, as a share of the time."""

    def find(tests: Tests) -> float | None:
        rates = (
            (
                value(tests, "test_prefix", achieved, name=net),
                value(tests, "test_ceilings", ceiling),
            )
            for achieved, ceiling in (
                ("gigabytes_per_second", "copy_terabytes_per_second"),
                ("teraflops_per_second", "bf16_teraflops_per_second"),
            )
        )
        (gigabytes, terabytes), (flops, most_flops) = rates
        if None in (gigabytes, terabytes, flops, most_flops):
            return None
        return 100 * max(gigabytes / 1e3 / terabytes, flops / most_flops)

    return find


def step_ratio(net: str, frozen: float, arm: str, *, of: str = "over_authors") -> Callable[[Tests], float | None]:
    return lambda tests: value(tests, "test_training_step", of, arm, net=net, frozen=frozen)


def bandwidth(tests: Tests) -> float | None:
    """The copy reads and writes as many bytes as the update does."""
    over_copy = value(tests, "test_bandwidth", "over_copy")
    return 100 / over_copy if over_copy else None


def optimizer_ratio(tests: Tests) -> float | None:
    one_a_layer = {"net": "densenet-76-12", "grouping": "one group a layer", "cache": "warm"}
    return value(tests, "test_step", "ratio", **one_a_layer)


def cached_over_replay(net: str) -> Callable[[Tests], float | None]:
    return lambda tests: value(tests, "test_cached_step", "captured_over_replay", name=net, share=0.5)


def gather_rate(tests: Tests) -> float | None:
    """Of rows kept as they were computed, the largest ones: launches are least of it."""
    return value(tests, "test_gather", "rate", shape=[197, 192], kept=None)


TARGETS = [
    Target("optimizer, DenseNet-76-12, one group a layer: torch fused over ours", ">=", 20, "x", optimizer_ratio),
    Target("optimizer, 100 M parameters: share of the copy bandwidth", ">=", 92, "%", bandwidth),
    Target("prefix bf16, half of DenseNet-76-12: over eager", "<=", 0.25, "", over_eager("densenet-76-12")),
    Target("the same, second goal", "<=", 0.15, "", over_eager("densenet-76-12")),
    Target("prefix bf16, half of DenseNet-76-12, over torch.compile", "<=", 1, "", over_compiled("densenet-76-12")),
    Target("prefix bf16, half of WRN-40-4: over eager", "<=", 0.6, "", over_eager("wrn-40-4")),
    Target("prefix bf16, half of WRN-40-4, over torch.compile", "<=", 1, "", over_compiled("wrn-40-4")),
    *(
        Target(
            f"step, DenseNet-76-12, {100 * frozen:.0f} % frozen: authors' over GraphedStep with prefix",
            ">=",
            3,
            "x",
            step_ratio("densenet-76-12", frozen, "graph, bf16"),
        )
        for frozen in (0.25, 0.5, 0.75)
    ),
    Target("prefix bf16, half of DenseNet-76-12: share of the roofline", "", 0, "%", roofline("densenet-76-12")),
    Target("prefix bf16, half of WRN-40-4: share of the roofline", "", 0, "%", roofline("wrn-40-4")),
    Target("step, WRN-40-4, half frozen: over authors' style", "", 0, "x", step_ratio("wrn-40-4", 0.5, "graph, bf16")),
    Target("step, VGG-16, half frozen: over authors' style", "", 0, "x", step_ratio("vgg-16", 0.5, "graph, bf16")),
    Target(
        "epoch, DenseNet-76-12, half frozen: the same",
        ">=",
        3,
        "x",
        step_ratio("densenet-76-12", 0.5, "graph, bf16", of="epoch_over_authors"),
    ),
    *(
        Target(
            f"kept features, {net}, half frozen: captured step over its graph", "<=", 1.05, "", cached_over_replay(net)
        )
        for net in ("densenet-40-12", "wrn-16-4", "vgg-16")
    ),
    Target("gather of kept rows: rate over a plain copy's", ">=", 0.8, "", gather_rate),
]
