"""Folding, the CPU engine and the C++ affine+ReLU against eager, and random small nets at random frontiers."""

import math

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, reject, settings
from prefix_cases import NETS, freeze, trained
from torch import nn

from freezeout_ext import native
from freezeout_ext.layers import find_layers
from freezeout_ext.prefix import Prefix, cpu
from freezeout_ext.prefix.cpu import CpuEngine
from freezeout_ext.prefix.lower import lower_units
from freezeout_ext.prefix.program import Add, Affine, Call, Cat, Conv, Program, Ref, batch_norm_affine

needs_kernel = pytest.mark.skipif(
    not hasattr(native.C, "affine_relu"), reason=f"the compiled half has no affine_relu: {native.import_error}"
)


def randomized(module: nn.Module) -> nn.Module:
    for inner in module.modules():
        if isinstance(inner, nn.modules.batchnorm._BatchNorm):
            inner.running_mean.normal_(0, 0.5)
            inner.running_var.uniform_(0.3, 2)
            if inner.affine:
                nn.init.normal_(inner.weight)
                nn.init.normal_(inner.bias)
    return module.eval()


def engine(program: Program, dtype: torch.dtype = torch.float32, last: bool = False) -> CpuEngine:
    return CpuEngine(program, dtype=dtype, output_dtype=torch.float32, channels_last=last)


def kinds(program: Program) -> list[type]:
    return [type(op) for op in program.ops]


def assert_folded(units: nn.Module, *inputs: torch.Tensor, tolerance: float = 1e-5) -> CpuEngine:
    run = engine(lower_units(randomized(units)))
    with torch.no_grad():
        for x in inputs:
            expected, (found,) = units(x), run(x)
            assert found.shape == expected.shape
            assert (found - expected).abs().max() <= tolerance * expected.abs().max()  # float32 rounds each weight anew
    return run


@pytest.mark.parametrize("affine", [True, False])
def test_a_norm_is_its_scale_and_shift_to_the_last_bit_of_float64(affine):
    norm = randomized(nn.BatchNorm2d(5, affine=affine)).double()
    scale, shift = batch_norm_affine(norm)
    x = torch.randn(2, 5, 3, 3, dtype=torch.float64)
    torch.testing.assert_close(scale[:, None, None] * x + shift[:, None, None], norm(x), rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "conv",
    [
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": 3, "stride": 2, "padding": 1},
        {"kernel_size": 1},
        {"kernel_size": 5, "padding": 4, "dilation": 2},
        {"kernel_size": 3, "padding": 1, "groups": 6},
        {"kernel_size": (1, 3), "padding": (0, 1), "groups": 2},
    ],
)
def test_convolution_and_norm_become_one_convolution(conv, bias):
    units = nn.Sequential(nn.Conv2d(6, 12, **conv, bias=bias), nn.BatchNorm2d(12), nn.ReLU())
    run = assert_folded(units, torch.randn(3, 6, 9, 8), torch.randn(1, 6, 9, 8), torch.randn(2, 6, 7, 7))
    assert kinds(run.program) == [Conv] and run.fused() == {"conv+bn+relu": 1}


def test_a_linear_runs_as_it_is_before_its_norm():
    units = nn.Sequential(nn.Linear(7, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Dropout(0.5))
    run = assert_folded(units, torch.randn(6, 7))
    assert run.fused() == {"call": 1, "affine+relu": 1}


@pytest.mark.parametrize("mode", ["reflect", "circular"])
def test_padding_that_is_not_zero_runs_as_it_is(mode):
    run = assert_folded(
        nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, padding_mode=mode), nn.BatchNorm2d(4)), torch.randn(2, 3, 6, 6)
    )
    assert kinds(run.program) == [Call, Affine]


def test_a_norm_in_front_of_a_padded_convolution_stays_at_the_operand():
    run = assert_folded(
        nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 4, 3, padding=1)), torch.randn(2, 3, 6, 6)
    )
    assert kinds(run.program) == [Affine, Conv] and run.program.ops[0].relu


def test_a_value_used_twice_is_not_folded_away():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

        def forward(self, x):
            y = self.conv(x)
            return self.norm(y) - y

    assert_folded(Twice(), torch.randn(2, 3, 6, 6))


def test_pooling_goes_in_front_of_the_1x1_convolution_of_a_dense_transition():
    units = nn.Sequential(nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 1, bias=False), nn.AvgPool2d(2))
    run = assert_folded(units, torch.randn(2, 6, 8, 8))
    assert kinds(run.program) == [Affine, Call, Conv]
    padded = nn.Sequential(nn.Conv2d(6, 4, 1), nn.AvgPool2d(3, 2, padding=1))
    assert kinds(assert_folded(padded, torch.randn(2, 6, 8, 8)).program) == [Conv, Call]


class Residual(nn.Module):
    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        self.a = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4))
        self.b = nn.Conv2d(4, 4, 1)
        self.relu = nn.ReLU(inplace=True)
        self.scale = nn.Parameter(torch.randn(1, 4, 1, 1))

    def forward(self, x):
        if self.form == "x + a":
            return self.relu(x + self.a(x))
        if self.form == "a + b":
            return F.relu(self.a(x) + self.b(x))
        if self.form == "a += x":
            y = self.a(x)
            y += x
            return self.relu(y)
        if self.form == "relu_ on the way":
            y = self.a(x)
            z = y * 1
            self.relu(y)
            return z + y
        if self.form == "same twice":
            y = self.a(x)
            return y + y
        if self.form == "broadcast":
            return self.relu(self.a(x) + self.scale)
        if self.form == "wide":
            return self.relu(self.a(x) + self.b(x).mean((2, 3), keepdim=True))
        if self.form == "view":
            y = self.b(x)
            z = y.flatten(1)
            return self.a(x) + y + z.view(y.shape)
        raise AssertionError(self.form)


FORMS = ["x + a", "a + b", "a += x", "relu_ on the way", "same twice", "broadcast", "wide", "view"]


@pytest.mark.parametrize("form", FORMS)
def test_sums_and_writing_in_place(form):
    assert_folded(
        nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), Residual(form)), torch.randn(3, 3, 6, 6), torch.randn(2, 3, 6, 6)
    )


def test_the_inputs_are_left_alone():
    x = torch.randn(2, 4, 6, 6)
    kept = x.clone()
    run = engine(lower_units(randomized(Residual("x + a"))))
    with torch.no_grad():
        run(x), run(x)
    assert torch.equal(x, kept)


def test_a_dense_block_grows_in_one_buffer_and_outputs_are_fresh():
    model = randomized(trained("densenet"))
    run = engine(lower_units(model.stem, *model.blocks[:2]))
    assert run.fused()["cat in a block buffer"] == 2
    assert len({block for block, _, _ in run.places.values()}) == 1
    with torch.no_grad():
        first = run(torch.randn(4, 3, 16, 16))[0]
        kept = first.clone()
        run(torch.randn(4, 3, 16, 16))
        assert torch.equal(first, kept)
        x = torch.randn(9, 3, 16, 16)
        torch.testing.assert_close(run(x)[0], model.blocks[:2](model.stem(x)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("batch", [15, 16, 17, 40])
def test_a_dense_block_runs_in_parts_of_the_batch(batch, last, monkeypatch):
    model = randomized(trained("densenet"))
    units = [model.stem, *model.blocks[:4]]
    run, sizes = engine(lower_units(*units), last=last), []
    whole = run.whole
    monkeypatch.setattr(run, "whole", lambda x: sizes.append(len(x)) or whole(x))
    x = torch.randn(batch, 3, 16, 16)
    with torch.no_grad():
        expected, (found,) = nn.Sequential(*units)(x), run(x)
    assert sizes == {15: [15], 16: [16], 17: [16, 1], 40: [16, 16, 8]}[batch]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)  # folding
    assert found.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def test_what_mixes_images_runs_whole():
    class Mixing(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = (nn.Conv2d(n, 4, 1) for n in (3, 7, 11))
            self.first = nn.Conv2d(3, 3, 1)

        def forward(self, x):
            x = self.first(x)
            x = torch.cat((x, self.a(x)), 1)
            x = torch.cat((x, self.b(x)), 1)
            return self.c(x - x.mean(0, keepdim=True))

    run = assert_folded(Mixing(), torch.randn(40, 3, 5, 5))
    assert run.joined and not run._in_parts


@pytest.mark.parametrize("last", [True, False])
def test_the_output_has_the_memory_format_that_eager_gave(last):
    model = randomized(trained("wrn"))
    run = engine(lower_units(model.stem, model.blocks[0]), last=last)
    with torch.no_grad():
        (y,) = run(torch.randn(2, 3, 16, 16))
    assert y.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


@pytest.mark.parametrize("name", ["densenet", "resnet-18", "mobilenet"])
@pytest.mark.parametrize("missing", ["fused convolutions", "kernel"])
def test_without_a_private_op_the_plain_one_runs_and_the_report_says_so(name, missing, monkeypatch):
    if missing == "kernel":
        monkeypatch.setattr(cpu.native, "C", None)
    else:
        monkeypatch.setattr(cpu, "fused_convolutions", lambda: "torch.ops.mkldnn.x is not in torch y")
    model = trained(name)
    layers = freeze(model, 4)
    prefix = Prefix(model, layers, mode="folded", measure=False)
    prefix.freeze(4)
    model(torch.randn(2, 3, 16, 16))
    report = prefix.report()
    assert report.route == "chain" and report.error <= 1e-5
    expected = "convolutions run unfused" if missing == "fused convolutions" else "affines run in torch"
    assert (expected in str(report)) == (missing != "kernel" or any(k.startswith("affine") for k in report.fused))


def test_what_does_not_trace_runs_as_it_is_inside_the_program():
    class Stubborn(nn.Module):
        def forward(self, x):
            return x if float(x.sum()) > 1e9 else x * 2

    run = assert_folded(nn.Sequential(nn.Conv2d(3, 4, 1), Stubborn(), nn.ReLU()), torch.randn(2, 3, 4, 4))
    assert any("Stubborn" in note for note in run.fallbacks)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_module_that_is_not_written_as_ops_computes_in_half_precision_too(dtype):
    """Its weights stay float32: it runs under autocast."""
    torch.manual_seed(0)
    unit = nn.Sequential(nn.ConvTranspose2d(3, 6, 2, 2), nn.ReLU(), nn.GroupNorm(2, 6)).eval()
    for p in unit.parameters():
        p.requires_grad_(False)
    x = torch.randn(4, 3, 8, 8)
    with torch.no_grad():
        engine = CpuEngine(lower_units(unit), dtype=dtype, output_dtype=torch.float32, channels_last=False)
        (found,), expected = engine(x), unit(x)
    error = (found - expected).abs().max() / expected.abs().max()
    assert 0 < error < 2e-2


def test_double_precision_stays_double():
    units = randomized(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())).double()
    run = CpuEngine(lower_units(units), dtype=torch.float64, output_dtype=torch.float64, channels_last=False)
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(run(x)[0], units(x), rtol=1e-12, atol=1e-12)


def test_bfloat16_arithmetic_is_within_two_percent():
    # On plain operations where the processor has none of its own: right, if slow.
    model = randomized(trained("resnet-18"))
    run = engine(lower_units(model.stem, *model.blocks[:3]), dtype=torch.bfloat16)
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        expected, (found,) = model.blocks[:3](model.stem(x)), run(x)
    assert found.dtype == torch.float32
    error = (found - expected).abs().max() / expected.abs().max()
    assert 1e-5 < error < 2e-2  # 8 bits of mantissa through 7 layers


# The C++ kernel


@needs_kernel
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels", [0, 1, 3, 7, 8, 9, 15, 16, 17, 33])
@pytest.mark.parametrize("rows", [0, 1, 5])
def test_affine_relu_reads_and_writes_slices(rows, channels, dtype, relu):
    x = torch.full((rows, channels + 5), math.nan).to(dtype)
    y = torch.full((rows, channels + 3), 7.0).to(dtype)
    x[:, 2 : 2 + channels] = torch.randn(rows, channels).to(dtype)
    scale, shift = torch.randn(channels), torch.randn(channels)
    x_slice, y_slice = x[:, 2 : 2 + channels], y[:, 1 : 1 + channels]
    call_kernel(x_slice, y_slice, scale, shift, relu=relu)
    expected = x_slice.float() * scale + shift
    assert torch.equal(y_slice, (expected.relu() if relu else expected).to(dtype))
    assert (y[:, :1] == 7).all() and (y[:, 1 + channels :] == 7).all()


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_affine_relu_over_several_threads(dtype, threads):
    x = torch.randn(2049, 49).to(dtype)
    y = torch.full_like(x, math.nan)
    scale, shift = torch.randn(49), torch.randn(49)
    call_kernel(x, y, scale, shift, relu=True, threads=threads)
    assert torch.equal(y, (x.float() * scale + shift).relu().to(dtype))


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_affine_relu_of_special_values_is_torchs(dtype):
    values = [0.0, -0.0, math.inf, -math.inf, math.nan, 3.3e38, -3.3e38, 1e-40]
    x = torch.tensor([values]).to(dtype)
    y = torch.empty_like(x)
    one, zero = torch.ones(len(values)), torch.zeros(len(values))
    for relu in (True, False):
        call_kernel(x, y, one, zero, relu=relu)
        expected = x.float() * one + zero
        expected = (expected.relu() if relu else expected).to(dtype)
        assert torch.equal(torch.nan_to_num(y, nan=123.0), torch.nan_to_num(expected, nan=123.0))


@needs_kernel
def test_affine_relu_says_what_is_wrong():
    t = torch.zeros(4)
    arguments = {"rows": 1, "channels": 4, "x_stride": 4, "y_stride": 4, "relu": True, "dtype": "float32", "threads": 1}
    for change, message in [
        ({"rows": -1}, "rows and channels must be >= 0, got -1 and 4"),
        ({"x_stride": 3}, "x_stride and y_stride must be >= channels=4, got 3 and 4"),
        ({"dtype": "float16"}, "dtype must be float32 or bfloat16, got float16"),
    ]:
        with pytest.raises(ValueError, match=message):
            native.C.affine_relu(*[t.data_ptr()] * 4, **(arguments | change))


def call_kernel(x, y, scale, shift, *, relu, threads=1):
    native.C.affine_relu(
        x.data_ptr(), y.data_ptr(), scale.data_ptr(), shift.data_ptr(), rows=x.shape[0], channels=x.shape[1],
        x_stride=x.stride(0), y_stride=y.stride(0), relu=relu, dtype=str(x.dtype).split(".")[1], threads=threads,
    )  # fmt: skip


# Random nets


class Grown(nn.Module):
    """A net written down as operations on the values so far: (kind, *numbers)."""

    def __init__(self, operations: list[tuple], in_place: bool) -> None:
        super().__init__()
        self.operations, self.in_place = operations, in_place
        self.parts = nn.ModuleList()
        widths = [3]
        for kind, a, b, n in operations:
            a, b = a % len(widths), b % len(widths)
            part: nn.Module = nn.Identity()
            if kind == "conv":
                part, width = nn.Conv2d(widths[a], n, 3, padding=1, bias=n % 2 == 0), n
            elif kind == "conv1":
                part, width = nn.Conv2d(widths[a], n, 1), n
            elif kind == "norm":
                part, width = nn.BatchNorm2d(widths[a]), widths[a]
            elif kind == "add":
                # A projection where the widths differ.
                part = nn.Conv2d(widths[b], widths[a], 1) if widths[a] != widths[b] else nn.Identity()
                width = widths[a]
            elif kind == "cat":
                width = widths[a] + widths[b]
            else:
                width = widths[a]
            self.parts.append(part)
            widths.append(width)
        self.head = nn.Linear(widths[-1], 4)

    def forward(self, x):
        values = [x]
        for part, (kind, a, b, _) in zip(self.parts, self.operations, strict=True):
            u, v = values[a % len(values)], values[b % len(values)]
            if kind == "add":
                y = u + part(v)
            elif kind == "cat":
                y = torch.cat((u, v), 1)
            elif kind == "relu":
                y = F.relu(u, inplace=self.in_place and a % len(values) > 0)
            elif kind == "pool":
                y = F.avg_pool2d(u, 3, 1, 1)
            elif kind == "max":
                y = F.max_pool2d(u, 3, 1, 1)
            else:
                y = part(u)
            values.append(y)
        return self.head(values[-1].mean((2, 3)))


index = st.integers(0, 7)
operations = st.lists(
    st.tuples(
        st.sampled_from(["conv", "conv1", "norm", "relu", "add", "cat", "pool", "max"]), index, index, st.integers(1, 9)
    ),
    min_size=3,
    max_size=9,
)
DENSE = [("conv", 0, 0, 6), ("norm", 1, 0, 1), ("relu", 2, 0, 1), ("conv", 3, 0, 4), ("cat", 1, 4, 1),
         ("norm", 5, 0, 1), ("relu", 6, 0, 1), ("conv1", 7, 0, 4)]  # fmt: skip
CHAIN = [("conv", 0, 0, 6), ("norm", 1, 0, 1), ("conv", 2, 0, 4), ("norm", 3, 0, 1), ("conv1", 4, 0, 4)]


@settings(max_examples=40)
@given(operations, st.booleans(), st.integers(0, 8), st.sampled_from(["exact", "folded"]))
@example(DENSE, False, 3, "folded")
@example(DENSE, True, 2, "exact")
def test_random_nets_at_random_frontiers(operations, in_place, frontier, mode):
    torch.manual_seed(0)
    model = randomized(Grown(operations, in_place)).train()
    layers = find_layers(model)
    num_frozen = min(frontier, len(layers) - 1)
    freeze(model, num_frozen, layers)
    prefix = Prefix(model, layers, mode=mode, measure=False)
    prefix.freeze(num_frozen)
    for seed in range(4):
        results = []
        x = torch.randn(3, 3, 6, 6)
        # Of the active norms: writing into a frozen one is a change that the prefix must see.
        kept = [(b, b.clone()) for m in model.modules() if m.training for b in m.buffers(recurse=False)]
        for run in (type(model).forward, lambda net, x: net(x)):
            # The class's own forward on the same modules, taken down and put up again: plain eager.
            for b, value in kept:
                b.copy_(value)
            if run is type(model).forward:
                installed = [(m, m.__dict__.pop("forward")) for m in model.modules() if "forward" in m.__dict__]
            model.zero_grad()
            output = run(model, x)
            try:
                output.square().sum().backward()
            except RuntimeError as error:
                # Nets that write into what they need for their gradients do not train, with or without a prefix.
                reject() if run is type(model).forward and "inplace operation" in str(error) else pytest.fail(
                    str(error)
                )
            results.append([output.detach()] + [p.grad for p in model.parameters() if p.grad is not None])
            if run is type(model).forward:
                for module, forward in installed:
                    module.forward = forward
        assert len(results[0]) == len(results[1])
        for i, (expected, found) in enumerate(zip(*results, strict=True)):
            if mode == "exact":
                assert torch.equal(expected, found), seed
            elif i == 0:
                # 1e-6 at the frontier through norms of batch statistics over 108 values.
                assert (expected - found).abs().max() <= 1e-3 * expected.abs().max() + 1e-6, seed
    report = prefix.report()
    assert report.route != "waiting" or not num_frozen
    assert "capture not used" not in str(report), report


@pytest.mark.parametrize("operations, route", [(DENSE, "split"), (CHAIN, "chain")])
def test_the_grammar_reaches_fused_convolutions_and_several_routes(operations, route):
    for frontier in range(1, 4):
        model = randomized(Grown(operations, False)).train()
        layers = find_layers(model)
        freeze(model, frontier, layers)
        prefix = Prefix(model, layers, mode="folded", measure=False)
        prefix.freeze(frontier)
        for _ in range(5):
            model(torch.randn(3, 3, 6, 6))
        assert prefix.report().route == route
        assert prefix.report().fused


def test_every_net_of_the_judges_is_fused_somewhere():
    assert len(NETS) == 10
    assert {Conv, Affine, Add, Cat, Call} == {
        kind
        for name in ("densenet", "vit", "resnet-18")
        for kind in kinds(
            lower_units(
                *(list(randomized(trained(name)).children())[:2] if name != "vit" else trained(name).eval().blocks)
            )
        )
    }
    assert Ref(1) == Ref(1)
