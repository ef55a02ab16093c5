"""How much a run's frontiers have to compile and measure on a GPU, counted without one: python bench/preparation.py

Each net of the paper is frozen unit by unit. Two numbers are counted.
How many variants of the convolution kernel Triton compiles in all, once a machine, since Triton keeps them on disk.
How many candidates are timed at each frontier, once a process.
"""

from types import SimpleNamespace

import floors
import torch

from freezeout_ext import kernels
from freezeout_ext.kernels.layout import vector_width
from freezeout_ext.prefix.cuda import CudaEngine
from freezeout_ext.prefix.lower import lower_units


@torch.no_grad()
def prepared(net: str) -> tuple[int, list[int]]:
    """-> kernel variants of a whole run, and candidates timed at each frontier."""
    variants: set[tuple] = set()
    known: dict = {}
    timed: list[int] = []

    def conv(x, weight, *, out, second=None, tf32=False, config=None, **given):
        images = [t for t in (out, given.get("residual"), second and second[2]) if t is not None]
        vec_out = vector_width(weight.shape[0], *(kernels.Rows.of("image", t) for t in images))
        fused = tuple(given.get(name) is not None for name in ("prologue", "bias", "residual"))
        shape = (weight.shape[2], given["stride"], given["relu"], second is not None, *fused)
        vec_in = vector_width(x.shape[1], kernels.Rows.of("x", x))
        for candidate in kernels.configs(weight.shape[1], weight.shape[0], weight.shape[2], x.dtype, False):
            vec = min(candidate.max_vector, vec_in)
            variants.add((*shape, vec, vec_out, candidate._replace(max_vector=16)))
        if second is not None:
            second[2].zero_()
        return out.zero_()

    def choose(key, ways, **_):
        if key not in known:
            known[key] = list(ways)[-1]
            timed[-1] += len(ways)
        return known[key]

    ops = SimpleNamespace(
        affine_relu=lambda x, *vectors, out, **_: out.zero_(),
        affine_relu_avg_pool2x2=lambda x, *vectors, out: out.zero_(),
        conv2d=conv, configs=kernels.configs, choose=choose, chosen=lambda key: None,
        look_alike=lambda image: image, tolerance=kernels.tolerance,
    )  # fmt: skip
    units = floors.units_of(net, 1.0)
    for count in range(1, len(units) + 1):
        timed.append(0)
        engine = CudaEngine(
            lower_units(*units[:count]), dtype=torch.bfloat16, output_dtype=torch.bfloat16,
            channels_last=True, ops=ops,
        )  # fmt: skip
        engine.run_measured(torch.zeros(floors.COUNTED, 3, floors.IMAGE, floors.IMAGE))
    return len(variants), timed


def main() -> None:
    print("| net | frontiers | kernel variants | candidates timed in all | at most at one frontier |")
    print("|---|---|---|---|---|")
    for net in floors.NETS:
        variants, timed = prepared(net)
        print(f"| {net} | {len(timed)} | {variants} | {sum(timed)} | {max(timed)} |")


if __name__ == "__main__":
    main()
