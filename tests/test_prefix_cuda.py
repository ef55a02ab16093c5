"""The ops of the prefix on a GPU: what is fused and placed, the kernels' references on the CPU, the rest there."""

import copy
import gc
import weakref
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("triton", reason="Triton is not installed")

import prefix_cases as cases

from freezeout_ext import FreezeOut, kernels
from freezeout_ext.models import VGG, DenseNet, ResNet, WideResNet, build_model
from freezeout_ext.prefix import Prefix, cuda, graphs
from freezeout_ext.prefix.cuda import fuse
from freezeout_ext.prefix.cuda_conv import CUDNN, PLAIN, Constants, ConvCall
from freezeout_ext.prefix.engine import last_uses, place
from freezeout_ext.prefix.judge import Refused
from freezeout_ext.prefix.lower import lower_units
from freezeout_ext.prefix.program import Affine, Call, Cat, Conv

# Folding rounds each weight anew, float32 sums in another order; bfloat16 rounds each of some 30 images.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 5e-2}


def ignore_config(function):
    return lambda *tensors, tf32=False, config=None, **given: function(*tensors, **given)


def references(choose) -> SimpleNamespace:
    """The kernels' names, computed by their references."""
    return SimpleNamespace(
        affine_relu=kernels.affine_relu_reference,
        conv2d=ignore_config(kernels.conv2d_reference),
        conv2d_reference=kernels.conv2d_reference,
        configs=kernels.configs,
        choose=choose,
        tolerance=kernels.tolerance,
    )


def first_way(key, candidates, **_):
    return next(iter(candidates))


def last_way(key, candidates, **_):
    return list(candidates)[-1]


def checked_last_way(key, candidates, *, outputs, expected, tolerance, scratch):
    """As `kernels.choose` compares, the last candidate taken. The other ones have written where it writes."""
    wanted = expected()
    for run in candidates.values():
        for out in outputs:
            out.fill_(torch.nan)
        for found, want in zip(run(), wanted, strict=True):
            assert (found.double() - want).abs().max() <= tolerance * want.abs().max()
    return last_way(key, candidates)


def trained(model: nn.Module) -> nn.Module:
    """BatchNorms that do something, in eval mode, frozen."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low, high in (
                (module.weight, 0.5, 1.5), (module.bias, -0.5, 0.5),
                (module.running_mean, -0.5, 0.5), (module.running_var, 0.5, 2.0),
            ):  # fmt: skip
                tensor.data.uniform_(low, high, generator=generator)
    return model.eval().requires_grad_(False)


class Units(nn.Module):
    """The first units of a net, one after the other."""

    def __init__(self, units: list[nn.Module]) -> None:
        super().__init__()
        self.units = nn.ModuleList(units)

    def forward(self, x: Tensor) -> Tensor:
        for unit in self.units:
            x = unit(x)
        return x


def prefix_of(name: str, count: int | None = None) -> Units:
    torch.manual_seed(0)
    nets = {
        "densenet": lambda: DenseNet(16, 12),
        "wrn": lambda: WideResNet(16, 1),
        "vgg": lambda: VGG(11, 0.25, image_size=8),
        "resnet": lambda: ResNet(18, 0.25),
    }
    net = nets[name]()
    children = [net.features] if name == "vgg" else [net.stem, net.blocks] if hasattr(net, "blocks") else [net]
    units = [unit for child in children for unit in (child if isinstance(child, nn.Sequential) else [child])]
    return trained(Units(units[:count]))


def engine_of(net: Units, *, dtype: torch.dtype = torch.float32, ops: SimpleNamespace = kernels) -> cuda.CudaEngine:
    return cuda.CudaEngine(
        lower_units(*net.units), dtype=dtype, output_dtype=torch.float32, channels_last=False,
        ops=ops,
    )  # fmt: skip


def error(found: Tensor, wanted: Tensor) -> float:
    assert found.shape == wanted.shape
    return ((found.double() - wanted.double()).abs().max() / wanted.double().abs().max()).item()


def images(n: int = 3, size: int = 8, device: str = "cpu") -> Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(1)).to(device)


# What is fused, and where it lies


def test_launches_of_the_paper_nets() -> None:
    """DenseNet-76-12: 79, WRN-40-4: 40, a Cat being none: convolutions, and two norms with their poolings."""
    dense = {Cat: 36, Affine: 2, Call: 2}
    for net, launches, also in ((DenseNet(76, 12), 79, dense), (WideResNet(40, 4), 40, {})):
        steps = fuse(lower_units(*trained(Units([net.stem, *net.blocks])).units))
        kinds = Counter(type(step) for step in steps)
        assert sum(kinds.values()) - kinds[Cat] == launches
        assert {kind: n for kind, n in kinds.items() if kind is not Conv} == also


def test_ops_of_densenet() -> None:
    net = prefix_of("densenet")
    program = lower_units(*net.units)
    ops = fuse(program)
    places, _ = place(program, ops, cuda.CudaEngine.padding)
    convs = [op for op in ops if isinstance(op, Conv)]
    ones = [step for step in convs if step.module.kernel_size == (1, 1)]
    # Two bottlenecks a stage read the block through bn1 and ReLU; a transition's conv reads what was pooled.
    assert [op.before is not None for op in ones] == [True, True, False, True, True, False, True, True]
    assert not any(step.after for step in convs)
    blocks = {id(block): block for block, _, _ in places.values()}
    assert [(len(b.pieces), b.channels) for b in blocks.values()] == [(3, 48), (3, 48), (3, 48)]
    # The stem and each bottleneck's second conv, or the transition, write their slice themselves.
    pieces = [piece for block in blocks.values() for piece in block.pieces]
    assert set(pieces) <= {step.out for step in convs}
    assert [places[piece][1:] for piece in next(iter(blocks.values())).pieces] == [(0, 24), (24, 12), (36, 12)]


def test_ops_of_wide_resnet() -> None:
    program = lower_units(*prefix_of("wrn").units)
    ops = fuse(program)
    convs = [op for op in ops if isinstance(op, Conv)]
    assert len(convs) == len(ops)
    # Each block's last conv gives the sum and relu(bn(sum)) of the next block; there is none behind the last.
    assert [step.after is not None for step in convs if step.add is not None] == [True] * 5 + [False]
    assert place(program, ops, 16) == ({}, set())


def test_only_one_affine_runs_behind_a_convolution() -> None:
    class Fork(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.BatchNorm2d(8)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return torch.relu(self.a(y)) + torch.sigmoid(torch.relu(self.b(y))) * y

    net = trained(Units([Fork()]))
    for way in (first_way, last_way):
        engine = engine_of(net, ops=references(way))
        assert error(engine.run_measured(images())[0], net(images())) < 1e-5
    fused = engine.fused()
    assert fused["conv and affine+relu"] == 1 and fused["affine+relu"] == 1


def test_affines_without_a_relu_run_by_themselves() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.conv, self.last = nn.BatchNorm2d(3), nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)
            self.pool, self.second = nn.AvgPool2d(2), nn.BatchNorm2d(8)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(self.first(x))
            return self.pool(self.second(y + y)) + self.pool(y - self.last(y))

    net = trained(Units([Plain()]))
    engine = engine_of(net, ops=references(last_way))
    assert error(engine.run_measured(images())[0], net(images())) < 1e-5
    assert engine.fused()["affine"] == 3 and engine.fused()["conv"] == 1


@pytest.mark.cuda
def test_a_capture_measures_nothing() -> None:
    module = nn.Conv2d(8, 8, 3, padding=1).requires_grad_(False).cuda()
    x = torch.randn(2, 8, 4, 4, device="cuda").contiguous(memory_format=torch.channels_last)
    constants = Constants.of(module.weight, module.bias, torch.float32)
    # No batch of the other tests: what was measured for one of them is known.
    call = ConvCall(kernels, module, x, (2, 8, 4, 4), constants, None, None, True, None, None, False)
    with (
        pytest.raises(RuntimeError, match="must be run once before a CUDA graph is captured"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        call.way()


def test_a_longer_block_is_not_measured_anew() -> None:
    """At the next frontier its buffer is wider, and every convolution in it reads and writes with another stride."""
    keys: list[set] = []

    def choose(key, candidates, **_):
        keys[-1].add(key)
        return list(candidates)[-1]

    torch.manual_seed(0)
    net = DenseNet(22, 12)
    units = list(trained(Units([net.stem, *net.blocks])).units)
    widths = []
    for count in (3, 4):  # 48 channels; 60, padded to 64
        keys.append(set())
        engine = engine_of(Units(units[:count]), ops=references(choose))
        engine.run_measured(images())
        widths.append({block.channels for block, _, _ in engine.places.values()})
    assert widths == [{48}, {64}]
    assert len(keys[0]) == 5 and keys[0] < keys[1] and len(keys[1] - keys[0]) <= 2  # the new bottleneck's


def test_a_value_is_placed_once() -> None:
    class Twice(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            a = self.conv(x)
            return torch.cat([torch.cat([a, self.other(a)], 1), torch.cat([self.other(a), a], 1)], 1)

        def __init__(self) -> None:
            super().__init__()
            self.conv, self.other = nn.Conv2d(3, 5, 1), nn.Conv2d(5, 4, 3, padding=1)

    net = trained(Units([Twice()]))
    for way in (first_way, last_way):
        engine = engine_of(net, ops=references(way))
        assert error(engine.run_measured(images())[0], net(images())) < 1e-5
    places = {v: place for v, place in engine.places.items() if v not in engine.joined}
    ranges = [(id(block), i) for block, first, n in places.values() for i in range(first, first + n)]
    assert ranges and len(set(ranges)) == len(ranges)
    assert {block.channels for block, _, _ in places.values()} == {32}  # 18 channels used: 16 bytes a step
    assert engine.fused()["cat"] == 1 and engine.fused()["cat in a block buffer"] == 2


# The steps, on the CPU with the references


@pytest.mark.parametrize("name", ["densenet", "wrn", "vgg", "resnet"])
@pytest.mark.parametrize("way", [first_way, checked_last_way], ids=["plain", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_engine_against_eager(name: str, way, dtype: torch.dtype) -> None:
    net, x = prefix_of(name), images()
    engine = engine_of(net, dtype=dtype, ops=references(way))
    (wanted,) = (net(x),)
    found = engine.finish(*engine.run_measured(x))
    assert found.dtype == torch.float32 and found.is_contiguous()
    assert error(found, wanted) <= TOLERANCE[dtype]
    (called,) = engine(x)  # off the GPU the plain way, and no graph
    assert error(called, wanted) <= TOLERANCE[dtype]
    assert set(engine.ways.values()) == {PLAIN} and engine.fused()["CUDA graph"] == 0


@pytest.mark.parametrize("name", ["densenet", "wrn"])
def test_every_frontier(name: str) -> None:
    whole, x = prefix_of(name), images(2)
    for count in range(1, len(whole.units) + 1):
        net = Units(list(whole.units)[:count])
        engine = cuda.CudaEngine(
            lower_units(*net.units), dtype=torch.float32, output_dtype=torch.float32, channels_last=True,
            ops=references(last_way),
        )  # fmt: skip
        found = engine.finish(*engine.run_measured(x))
        assert found.is_contiguous(memory_format=torch.channels_last)
        assert error(found, net(x)) <= 1e-5, count


@pytest.mark.parametrize("way", [first_way, last_way], ids=["plain", "triton"])
def test_nothing_is_copied_into_a_block(way, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each piece is written where the concatenation has it, and no channel outside [0, channels) of it is written."""
    net, x = prefix_of("densenet", 4), images()  # the stem, a stage of two bottlenecks, a transition
    engine = engine_of(net, ops=references(way))
    buffers = []

    def place_of(value, shape, state, original=engine.place_of):
        known = set(state.blocks)
        found = original(value, shape, state)
        for block in set(state.blocks) - known:
            buffers.append(state.blocks[block].fill_(torch.nan))
        return found

    def no_cat(*_):
        raise AssertionError("the pieces were concatenated by a copy")

    monkeypatch.setattr(engine, "place_of", place_of)
    monkeypatch.setattr(torch, "cat", no_cat)
    results = engine.run_measured(x)
    monkeypatch.undo()
    assert error(results[0], net(x)) < 1e-5
    (buffer,) = buffers
    assert buffer.shape[1] == 48 and not buffer.isnan().any()
    assert error(buffer, Units(list(net.units)[:3])(x)) < 1e-5


def test_values_are_dropped_after_their_last_use() -> None:
    program = lower_units(*prefix_of("wrn").units)
    ops = fuse(program)
    dead_after = last_uses(program, ops)
    made = [value for op in ops for value in op.outs()]
    dropped = [value for dead in dead_after for value in dead]
    assert len(dropped) == len(set(dropped)) and set(made) - set(dropped) == {made[-1]}
    for i, dead in enumerate(dead_after):
        for op in ops[i + 1 :]:
            assert not set(dead) & set(op.inputs())


@pytest.mark.parametrize("padding", [0, 1])
def test_odd_convolutions_run_plain(padding: int) -> None:
    """Groups, dilation, other sizes and paddings, an add that broadcasts, an affine behind a ReLU."""

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide = nn.Conv2d(3, 8, 5, padding=2)
            self.grouped = nn.Conv2d(8, 8, 3, padding=padding, groups=4)
            self.dilated = nn.Conv2d(8, 8, 3, padding=2 + padding, dilation=2 + padding, bias=False)
            self.pooled = nn.AdaptiveAvgPool2d(1)
            self.bn, self.last = nn.BatchNorm2d(8), nn.BatchNorm2d(8)

        def forward(self, x: Tensor) -> Tensor:
            a = self.grouped(torch.relu(self.wide(x)))
            b = torch.relu(self.dilated(a) + self.pooled(a))
            return self.last(torch.relu(self.bn(b)) + b)

    net, x = trained(Units([Odd()])), images()
    engine = engine_of(net, ops=references(last_way))
    assert error(engine.run_measured(x)[0], net(x)) < 1e-5
    assert set(engine.ways.values()) == {PLAIN}


def test_an_add_that_broadcasts() -> None:
    class Gate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.pool = nn.Conv2d(3, 3, 3, padding=1), nn.AdaptiveAvgPool2d(1)

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.conv(x) + self.pool(x))

    net, x = trained(Units([Gate()])), images()
    engine = engine_of(net, ops=references(last_way))
    assert error(engine.run_measured(x)[0], net(x)) < 1e-5
    assert engine.fused()["conv+add+relu"] == 1


def test_what_is_expected_of_the_first_and_the_last_image() -> None:
    module = nn.Conv2d(8, 8, 3, padding=1).requires_grad_(False)
    x, add = (torch.randn(4, 8, 6, 6).contiguous(memory_format=torch.channels_last) for _ in range(2))
    constants = Constants.of(module.weight, module.bias, torch.float32)
    call = ConvCall(references(first_way), module, x, (4, 8, 6, 6), constants, None, add, True, None, None, False)
    (found,) = call.expected(slice(None, None, 3))
    assert error(found, torch.relu(module(x) + add)[[0, 3]]) < 1e-6
    (plain,) = call.run(PLAIN)
    assert error(plain[::3], found) < 1e-6


def test_linear_and_vectors() -> None:
    head = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 6),
                         nn.BatchNorm1d(6), nn.ReLU(), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 4))  # fmt: skip
    net, x = trained(Units([head])), images()
    engine = engine_of(net, ops=references(last_way))
    assert error(engine.finish(*engine.run_measured(x)), net(x)) < 1e-5


def test_a_stranger_sees_the_layout_that_eager_has() -> None:
    class Flat(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.view(x.shape[0], -1)  # an error on a channels-last image

    net, x = trained(Units([nn.Sequential(nn.Conv2d(3, 4, 3), Flat())])), images()
    engine = engine_of(net, ops=references(last_way))
    assert error(engine.finish(*engine.run_measured(x)), net(x)) < 1e-5


def test_a_double_net_is_refused() -> None:
    with pytest.raises(Refused, match=r"not in torch\.float64"):
        engine_of(prefix_of("wrn", 2), dtype=torch.float64)


def test_outputs_are_copies() -> None:
    """The same value twice, an input handed through, and a value of a kept buffer."""
    net = trained(Units([nn.Conv2d(3, 4, 1)]))
    engine = engine_of(net, ops=references(last_way))
    x = images()
    (raw,) = engine.run_plain(x)
    found = engine.finish(raw)
    assert found.data_ptr() != raw.data_ptr() and torch.equal(found, raw)


def test_an_engine_is_freed_without_the_garbage_collector() -> None:
    gc.disable()
    try:
        engines = engine_of(prefix_of("wrn", 2), ops=references(last_way)), graphs.ExactEngine(lambda x: (x,))
        for engine in engines:
            engine(images())
        gone = [weakref.ref(engine) for engine in engines]
        del engine, engines
        assert [ref() for ref in gone] == [None, None]
    finally:
        gc.enable()


@pytest.mark.cuda
def test_when_a_graph_is_captured() -> None:
    """The second call in a row of one shape; four shapes at most; never again a shape that was refused."""
    captured = []

    def function(x: Tensor) -> tuple:
        return (x + (x.sum().item() if len(x) == 9 else 1),)

    held = graphs.Graphs()

    def call(n: int) -> bool:
        x = torch.full((n, 2), float(n), device="cuda")
        found = held(function, (x,), prepare=lambda: captured.append(n))
        assert found is None or torch.equal(found[0], x + 1)
        return found is not None

    assert [call(n) for n in (8, 8, 8, 3, 8, 3, 8)] == [False, True, True, False, True, False, True]
    assert captured == [8]
    assert not call(9) and not call(9) and not call(9) and captured == [8, 9]
    assert list(held.refused.values()) == ["RuntimeError: the prefix waits for the device (.item(), a copy to the CPU)"]
    for n in (20, 21, 22, 23):
        call(n), call(n)
    assert held.count == graphs.MOST_GRAPHS


def test_another_layout_or_dtype_of_the_same_shape_is_another_graph() -> None:
    mine = torch.zeros(2, 3)
    assert graphs.shape_key((mine,)) != graphs.shape_key((mine.t().contiguous().t(),))
    assert graphs.shape_key((mine,)) != graphs.shape_key((mine.half(),))


def test_exact_engine_off_the_gpu_is_the_originals() -> None:
    net, x = prefix_of("wrn", 3), images()
    engine = graphs.ExactEngine(lambda x: (net(x),))
    for _ in range(3):
        assert torch.equal(engine(x)[0], net(x))
    assert engine.fallbacks == [] and engine.bytes_held == 0


# On a GPU


@pytest.mark.cuda
@pytest.mark.parametrize("name", ["densenet", "wrn", "vgg", "resnet"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_engine_on_gpu(name: str, dtype: torch.dtype) -> None:
    net, x = prefix_of(name).cuda(), images(8, 16 if name != "vgg" else 8, "cuda")
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        wanted = net(x)
        engine = engine_of(net, dtype=dtype)
        limit = TOLERANCE[torch.float32 if dtype == torch.float32 else torch.bfloat16]
        for i in range(4):  # plain, measured and captured, replayed twice
            assert error(engine(x)[0], wanted) <= limit, i
        assert engine.fused()["CUDA graph"] == 1 and not engine.fallbacks
        held = engine(x)[0]
        kept = held.clone()
        other = engine(x * 0.5)[0]
        assert torch.equal(held, kept) and error(other, net(x * 0.5)) <= limit
        odd = x[:5]
        assert error(engine(odd)[0], wanted[:5]) <= limit and engine.fused()["CUDA graph"] == 1


@pytest.mark.cuda
@pytest.mark.parametrize("name", ["densenet", "wrn"])
def test_exact_engine_on_gpu_is_bit_equal(name: str) -> None:
    net, x = prefix_of(name).cuda(), images(8, 16, "cuda")
    engine = graphs.ExactEngine(lambda x: (net(x),))
    with torch.no_grad():
        found = [engine(x * i)[0] for i in range(4)]  # in memory of their own
        assert all(torch.equal(y, net(x * i)) for i, y in enumerate(found))
    assert engine.fused()["CUDA graph"] == 1 and not engine.fallbacks


@pytest.mark.cuda
def test_a_prefix_that_waits_is_not_captured() -> None:
    engine = graphs.ExactEngine(lambda x: (x * x.sum().item(),))
    x = torch.randn(4, 3, device="cuda")
    for _ in range(4):
        assert torch.equal(engine(x)[0], x * x.sum().item())
    assert "waits for the device" in engine.fallbacks[0]
    torch.randn(4, device="cuda")  # the generator is not left inside a capture


@pytest.mark.cuda
def test_inside_a_graph_of_the_whole_step() -> None:
    net, x = prefix_of("densenet").cuda(), images(8, 16, "cuda")
    engine = engine_of(net, dtype=torch.bfloat16)
    for _ in range(3):
        engine(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        (out,) = engine(x)
    x.mul_(0.5)
    graph.replay()
    assert error(out, net(x)) <= TOLERANCE[torch.bfloat16]


@pytest.mark.cuda
@pytest.mark.hardware
def test_ways_agree_on_gpu() -> None:
    """Every way of a few fused convolutions against the reference, cuDNN's fused forms among them."""
    torch.manual_seed(0)
    seen = set()
    for k, size, relu, residual, second in [
        (40, 1, True, False, False), (24, 3, True, False, False),
        (40, 3, True, True, False), (40, 3, False, True, True),
    ]:  # fmt: skip
        module = nn.Conv2d(24, k, size, padding=size // 2, bias=False).cuda()
        like = {"device": "cuda", "dtype": torch.bfloat16}
        x, add = torch.randn(6, 24, 9, 7, **like), torch.randn(6, k, 9, 7, **like)
        x, add = (t.contiguous(memory_format=torch.channels_last) for t in (x, add))
        constants = Constants.of(module.weight.detach(), torch.randn(k, device="cuda"), torch.bfloat16)
        affine = tuple(torch.randn(2, k, device="cuda"))
        call = ConvCall(kernels, module, x, tuple(add.shape), constants, None, add if residual else None, relu,
                        affine if second else None, None, False)  # fmt: skip
        call.way()
        rejected = kernels.choices()[call._key(call.ways())].rejected
        # The one that multiplies what nobody wrote by 0.
        assert not rejected or (list(rejected) == [CUDNN] and not residual), rejected
        for way in set(call.ways()) - set(rejected):
            seen.add(way if isinstance(way, str) else "triton")
            for found, want in zip(call.run(way), call.expected(slice(None)), strict=True):
                assert error(found, want) <= kernels.tolerance(torch.bfloat16), way
    assert seen == {PLAIN, CUDNN, "triton"}


# Whole models with a prefix. The logic runs on the CPU as well.

CUDA = pytest.param("cuda", marks=pytest.mark.cuda)


def on(device: str):
    """Runs a model of `device` on batches of the CPU, gradients included."""
    return lambda model, x: model(x.to(device)).cpu()


# What returns several new tensors, or runs several times in a forward.
AS_THEY_ARE = {"branches": {"fork"}, "shared": {"twice.0", "twice.1", "twice.2"}}


def assert_engines(prefix: Prefix, name: str) -> None:
    """Every frozen unit is in an engine, but those of AS_THEY_ARE, of which the report speaks."""
    report, covered = prefix.report(), {unit.name for chain in prefix._chains for unit in chain.units}
    left_out = set(prefix._names().values()) - covered
    assert left_out <= AS_THEY_ARE.get(name, set()), str(report)
    assert all(any(line.startswith(f"{unit} runs as it is") for line in report.fallbacks) for unit in left_out)
    whole = "chain" if len(prefix._chains) == 1 and not left_out else "split"
    assert report.route == (whole if covered else "eager"), str(report)


@pytest.fixture
def without_tf32():
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
        yield


@pytest.mark.parametrize(
    ("device", "name"), [("cpu", "densenet"), *((pytest.param("cuda", n, marks=pytest.mark.cuda)) for n in cases.NETS)]
)
@pytest.mark.usefixtures("without_tf32")
def test_every_frontier_of_every_net_is_bit_equal(device: str, name: str) -> None:
    """exact: losses, gradients and buffers of plain freezing; so many steps that the prefix's own graph is replayed."""
    model = cases.trained(name)
    for num_frozen in range(1, len(cases.find_layers(model))):
        plain, ours, prefix = cases.pair(copy.deepcopy(model).to(device), num_frozen, "exact")
        cases.assert_same_steps(plain, ours, batches=(6, 6, 6, 5, 6, 6), run=on(device))
        assert_engines(prefix, name)
        graphs_held = [chain.trial.engine.fused().get("CUDA graph", 0) for chain in prefix._chains]
        assert device == "cpu" or graphs_held == [1] * len(prefix._chains), str(prefix.report())


@pytest.mark.parametrize(
    ("device", "name"), [("cpu", "wrn"), *((pytest.param("cuda", n, marks=pytest.mark.cuda)) for n in cases.NETS)]
)
@pytest.mark.parametrize(("mode", "limit"), [("folded", 1e-5), ("bf16", 5e-2), ("fp16", 2e-2)])
@pytest.mark.usefixtures("without_tf32")
def test_every_frontier_of_every_net_in_the_fused_modes(device: str, name: str, mode: str, limit: float) -> None:
    if device == "cpu" and mode == "fp16":
        pytest.skip("no float16 convolutions on this CPU")
    model = cases.trained(name)
    for num_frozen in range(1, len(cases.find_layers(model))):
        plain, ours, prefix = cases.pair(copy.deepcopy(model).to(device), num_frozen, mode)
        plain.eval()
        for seed, batch in enumerate((6, 6, 6, 5, 6)):
            # Frontier errors only: active norms and dropouts as in evaluation.
            torch.manual_seed(seed)
            x = cases.images(batch).to(device)
            ours.train()
            ours(x)
            ours.eval()
            for mine, theirs in zip(ours.state_dict().values(), plain.state_dict().values(), strict=True):
                theirs.copy_(mine)
            found, wanted = ours(x), plain(x)
            # The active layers may amplify what the frontier is off by.
            assert error(found, wanted) <= 10 * limit, (num_frozen, seed, str(prefix.report()))
        assert_engines(prefix, name)
        assert all(chain.trial.engine.fused() for chain in prefix._chains), str(prefix.report())


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("name", ["densenet-10-4", "wrn-10-1", "vgg-11-x0.0625"])
@pytest.mark.usefixtures("without_tf32")
def test_a_whole_run_with_the_exact_prefix_is_bit_equal(device: str, name: str) -> None:
    steps = 40 if device == "cpu" else 100
    weights = []
    for mode in ("off", "exact"):
        torch.manual_seed(0)
        size = 32 if name.startswith("vgg") else 8
        model = build_model(name, 4, image_size=size).to(device).train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3, foreach=False)
        # Measured, "exact" might install nothing: never on a CPU, and not where a trial finds no gain.
        options = {"prefix": mode, "measure_prefix": False}
        freezeout = FreezeOut(model, optimizer, total_steps=steps, t_0=0.3, how_scale="linear", **options)
        generator = torch.Generator().manual_seed(2)
        for step in range(steps):
            n = 5 if step % 7 == 6 else 8
            x = torch.randn(n, 3, size, size, generator=generator)
            y = torch.randint(4, (n,), generator=generator)
            nn.functional.cross_entropy(model(x.to(device)), y.to(device)).backward()
            optimizer.step()
            optimizer.zero_grad()
            freezeout.step()
        assert freezeout.num_frozen == len(freezeout.layers) - 1
        assert mode == "off" or freezeout.prefix_report().route == "chain"
        weights.append(model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(weights[0].values(), weights[1].values(), strict=True))


@pytest.mark.parametrize(
    ("device", "name"),
    [
        *(("cpu", name) for name in ("densenet-10-4", "wrn-10-1", "vgg-16-x0.0625", "resnet-18-x0.125")),
        *(
            pytest.param("cuda", name, marks=[pytest.mark.cuda, pytest.mark.hardware])
            for name in ("densenet-76-12", "wrn-40-4", "vgg-16", "resnet-18")
        ),
    ],
)
@pytest.mark.usefixtures("without_tf32")
def test_a_model_that_freezes_on(device: str, name: str) -> None:
    """One model that freezes on, against one without a prefix: exact at every frontier, bfloat16 at each quarter."""
    torch.manual_seed(0)
    start = build_model(name, 100).to(device).train()
    x = torch.randn(4 if device == "cpu" else 16, 3, 32, 32, device=device)
    y = torch.randint(100, x.shape[:1], device=device)
    for mode in ("exact", "bf16"):
        plain, ours = copy.deepcopy(start), copy.deepcopy(start)
        layers = cases.freeze(ours, 0)
        theirs = cases.freeze(plain, 0)
        prefix = Prefix(ours, layers, mode=mode, measure=False)
        quarters = [len(layers) // 4, len(layers) // 2, 3 * len(layers) // 4]
        for num_frozen in range(1, len(layers)) if mode == "exact" else quarters:
            cases.freeze(plain, num_frozen, theirs)
            cases.freeze(ours, num_frozen, layers)
            prefix.freeze(num_frozen)
            for step in range(4):
                outputs = []
                for model in (plain, ours):
                    model.zero_grad()
                    loss = nn.functional.cross_entropy(output := model(x), y)
                    loss.backward()
                    outputs.append(output.detach())
                if mode == "exact":
                    assert torch.equal(*outputs), (num_frozen, step, str(prefix.report()))
                    for (n, p), q in zip(ours.named_parameters(), plain.parameters(), strict=True):
                        assert (p.grad is None) == (q.grad is None), n
                        assert p.grad is None or torch.equal(p.grad, q.grad), (num_frozen, n)
                else:
                    assert error(outputs[1], outputs[0]) <= 0.3, (num_frozen, step, str(prefix.report()))
            report = prefix.report()
            assert report.route == "chain" and report.units == report.of_units, str(report)
            assert device == "cpu" or report.fused["CUDA graph"] == 1, str(report)
