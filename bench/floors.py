"""Bytes, FLOPs and launches that each measured figure cannot do without, counted by running it: python bench/floors.py

    python bench/floors.py --bandwidth 3.0 --teraflops 790        the ceilings of the device, TB/s and bf16 TFLOP/s

Eager code is counted op by op, as torch dispatches it. Each input is read once, each output is written once, and views
are free. A prefix is counted by its own plan, kernel by kernel, with the references in the place of the kernels.
Batch 128, bfloat16, channels-last, images of 32x32. Nothing is timed and no GPU is needed.

The floor of a figure is the larger of bytes / bandwidth and FLOPs / rate.
A launch inside a CUDA graph costs 1 to 2 microseconds more wherever the kernel is shorter than that.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from freezeout_ext import kernels
from freezeout_ext.attach import pin
from freezeout_ext.layers import find_layers
from freezeout_ext.models import build_model
from freezeout_ext.prefix.cuda import CudaEngine
from freezeout_ext.prefix.lower import lower_units

BATCH, IMAGE, CLASSES = 128, 32, 100
# Counted with this batch: no other dimension of these nets is 2.
COUNTED = 2
NETS = ("densenet-76-12", "wrn-40-4", "vgg-16")
DTYPE = torch.bfloat16
BYTES_A_PARAMETER = 20  # FusedSGD in float32: read p, gradient, buffer; write p, buffer


@dataclass
class Cost:
    launches: int = 0
    bytes: float = 0.0
    flops: float = 0.0

    def add(self, tensors: list[Tensor], flops: float, batch: int) -> None:
        """One launch that reads or writes each of the tensors once; FLOPs are of COUNTED images."""
        self.launches += 1
        self.flops += flops * batch / COUNTED
        self.bytes += sum(t.nbytes * (batch / COUNTED if t.dim() and t.shape[0] == COUNTED else 1) for t in tensors)

    def seconds(self, bandwidth: float, teraflops: float) -> float:
        return max(self.bytes / bandwidth / 1e12, self.flops / teraflops / 1e12)


class _Counting(TorchDispatchMode):
    def __init__(self, cost: Cost, batch: int) -> None:
        super().__init__()
        self.cost, self.batch = cost, batch

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        views = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        made = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        if views or not made or "empty" in func.__name__:
            return out
        read = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        flop = flop_registry.get(func.overloadpacket)
        self.cost.add(read + made, flop(*args, **(kwargs or {}), out_val=out) if flop else 0, self.batch)
        return out


def eager_cost(run: Callable[[], object], batch: int = BATCH) -> Cost:
    """What `run`, on COUNTED images, costs with `batch` of them."""
    cost = Cost()
    with _Counting(cost, batch):
        run()
    return cost


def units_of(name: str, fraction: float) -> list[nn.Module]:
    """The first units of a net, frozen, in bfloat16."""
    net = build_model(name, CLASSES).eval().requires_grad_(False)
    children = [net.features] if hasattr(net, "features") else [net.stem, net.blocks]
    units = [unit for child in children for unit in (child if isinstance(child, nn.Sequential) else [child])]
    return units[: int(fraction * len(units))]


def images(dtype: torch.dtype) -> Tensor:
    return torch.randn(COUNTED, 3, IMAGE, IMAGE).to(dtype, memory_format=torch.channels_last)


@torch.no_grad()
def eager_prefix(name: str, fraction: float = 0.5) -> Cost:
    """Eager bfloat16 channels-last under no_grad, images in bfloat16."""
    net = nn.Sequential(*units_of(name, fraction)).to(DTYPE, memory_format=torch.channels_last)
    return eager_cost(lambda: net(images(DTYPE)))


@torch.no_grad()
def planned_prefix(name: str, fraction: float = 0.5, batch: int = BATCH) -> Cost:
    """What the plan of prefix/cuda.py launches, images in float32 to begin with, its copies counted too."""
    cost = Cost()

    def count(tensors: list, flops: float) -> None:
        cost.add([t for t in tensors if t is not None], flops, batch)

    def affine_relu(x, scale, shift, *, out, residual=None, out_sum=None, relu=True):
        count([x, residual, out, out_sum], 2 * x.numel())
        return kernels.affine_relu_reference(x, scale, shift, out=out, residual=residual, out_sum=out_sum, relu=relu)

    def conv(x, weight, *, out, second=None, tf32=False, config=None, **given):
        count([x, weight, given.get("residual"), out, second and second[2]], 2 * out.numel() * weight[0].numel())
        return kernels.conv2d_reference(x, weight, out=out, second=second, **given)

    ops = SimpleNamespace(
        affine_relu=affine_relu, conv2d=conv, configs=kernels.configs, conv2d_reference=kernels.conv2d_reference,
        choose=lambda key, ways, **_: list(ways)[-1], tolerance=kernels.tolerance,
    )  # fmt: skip
    engine = CudaEngine(
        lower_units(*units_of(name, fraction)), dtype=DTYPE, output_dtype=DTYPE, channels_last=True,
        ops=ops,
    )  # fmt: skip

    def call(op, state, run=engine.call):
        (y,) = run(op, state)
        count([*(state.values[value] for value in op.inputs()), y], 0)
        return (y,)

    engine.call = call
    x = torch.randn(COUNTED, 3, IMAGE, IMAGE)
    (raw,) = engine.run_measured(x)
    half = x.to(DTYPE)
    # To the graph's input; to bfloat16; to channels-last; and out of the graph.
    for pair in ([x, x], [x, half], [half, half], [raw, raw]):
        count(pair, 0)
    return cost


def training_step(name: str, fraction: float, batch: int = BATCH) -> tuple[Cost, Cost]:
    """-> the eager step's forward and backward, autocast left out (all in bfloat16), and the optimizer's update."""
    model = build_model(name, CLASSES).to(DTYPE, memory_format=torch.channels_last).train()
    layers = find_layers(model)
    for layer in list(layers)[: int(fraction * len(layers))]:
        for p in layer.parameters.values():
            p.requires_grad_(False)
        for module in layer.submodules:
            pin(module)
    x, y = images(DTYPE), torch.zeros(COUNTED, dtype=torch.int64)
    step = eager_cost(lambda: functional.cross_entropy(model(x), y).backward(), batch)
    return step, Cost(1, BYTES_A_PARAMETER * sum(p.numel() for p in model.parameters() if p.requires_grad))


def rows(bandwidth: float, teraflops: float) -> list[tuple[str, Cost, float]]:
    """(figure, cost, floor in microseconds)."""
    found: list[tuple[str, Cost]] = []
    for net in NETS:
        found.append((f"{net}: optimizer step, nothing frozen", training_step(net, 0.0)[1]))
    found.append(("100 M parameters: optimizer step", Cost(1, BYTES_A_PARAMETER * 1e8)))
    for net in NETS:
        for fraction, of in ((0.5, "half the units"), (1.0, "all units")):
            found.append((f"{net}: prefix of {of}, eager", eager_prefix(net, fraction)))
            found.append((f"{net}: prefix of {of}, planned", planned_prefix(net, fraction)))
    for net in NETS:
        for fraction in (0.0, 0.25, 0.5, 0.75):
            found.append((f"{net}: step at {100 * fraction:.0f} % frozen, eager", training_step(net, fraction)[0]))
    return [(name, cost, 1e6 * cost.seconds(bandwidth, teraflops)) for name, cost in found]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bandwidth", type=float, default=3.0, help="TB/s of a copy, read and write counted (3.0)")
    parser.add_argument("--teraflops", type=float, default=790.0, help="of a large bfloat16 matrix product (790)")
    args = parser.parse_args()
    print(f"floors at {args.bandwidth} TB/s and {args.teraflops} TFLOP/s, batch {BATCH}\n")
    print("| figure | launches | MB | GFLOP | by bytes, us | by FLOPs, us | floor, us |\n|---|---|---|---|---|---|---|")
    for name, cost, floor in rows(args.bandwidth, args.teraflops):
        by_bytes, by_flops = 1e6 * cost.bytes / args.bandwidth / 1e12, 1e6 * cost.flops / args.teraflops / 1e12
        print(
            f"| {name} | {cost.launches} | {cost.bytes / 1e6:.1f} | {cost.flops / 1e9:.1f} |"
            f" {by_bytes:.1f} | {by_flops:.1f} | {floor:.1f} |"
        )


if __name__ == "__main__":
    main()
