"""The kernels against their references: on a GPU, and in Triton's interpreter where there is none.

All values are of the order of 1. Tolerances, times the largest value: bfloat16 2^-6, since the interpreter truncates
(the prologue's result, then the sum) where the device rounds; float16 2^-10, one rounding; float32 1e-5 for sums of up
to 432 products.
"""

import os
from types import SimpleNamespace

import numpy
import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton", reason="Triton is not installed")

from freezeout_ext.models import DenseNet, WideResNet  # noqa: E402
from freezeout_ext.prefix.cuda import CudaEngine  # noqa: E402
from freezeout_ext.prefix.lower import lower_units  # noqa: E402

INTERPRETED = os.environ.get("FREEZEOUT_TESTS_CUDA") == "simulated" or not torch.cuda.is_available()
if INTERPRETED:
    old = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7)
    # Its loop bounds are arrays of one element, which NumPy 2.4 no longer turns into integers.
    if old and numpy.lib.NumpyVersion(numpy.__version__) >= "2.4.0":
        pytest.skip(f"the interpreter of Triton {triton.__version__} needs numpy < 2.4", allow_module_level=True)
    import interpreted

    kernels = interpreted.load()
else:
    from freezeout_ext import kernels
Config, configs = kernels.Config, kernels.configs

DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-6, torch.float16: 2**-10, "tf32": 3e-3}
IMAGES = [(1, 1, 1), (3, 8, 8), (1, 7, 5), (2, 1, 9)]  # N, H, W
ADDS = ["plain", "residual", "second", "residual+second"]


def slice_of(n: int, c: int, h: int, w: int, dtype: torch.dtype, before: int = 0, after: int = 0) -> Tensor:
    """Channels [before, before + c) of a buffer that is NaN elsewhere; the slice is random."""
    buffer = torch.full((n, before + c + after, h, w), torch.nan, dtype=dtype, device=DEVICE)
    image = buffer.contiguous(memory_format=torch.channels_last)[:, before : before + c]
    return image.normal_()


def poisoned(like: Tensor, before: int = 0, after: int = 0, c: int | None = None) -> Tensor:
    n, channels, h, w = like.shape
    return slice_of(n, c or channels, h, w, like.dtype, before, after).fill_(torch.nan)


def whole(image: Tensor, before: int, after: int) -> Tensor:
    n, c, h, w = image.shape
    return image.as_strided((n, before + c + after, h, w), image.stride(), 0)


def assert_slice_only(image: Tensor, before: int, after: int) -> None:
    buffer = whole(image, before, after)
    assert buffer[:, :before].isnan().all() and buffer[:, before + image.shape[1] :].isnan().all()


def vectors(*channels: int) -> list[Tensor]:
    return [torch.randn(c, device=DEVICE) for c in channels]


def assert_close(found: Tensor, wanted: Tensor, tolerance: float) -> None:
    """Borders, where taps are missing, and the interior apart."""
    error = (found.double() - wanted.double()).abs()
    assert not error.isnan().any()
    allowed = tolerance * max(1.0, wanted.abs().max().item())
    interior = error[:, :, 1:-1, 1:-1]
    assert interior.numel() == 0 or interior.max() <= allowed, f"interior off by {interior.max()}, allowed {allowed}"
    assert error.max() <= allowed, f"border off by {error.max()}, allowed {allowed}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("images", IMAGES[:3])
@pytest.mark.parametrize(("c", "before", "after"), [(1, 0, 0), (12, 24, 12), (16, 0, 0), (65, 3, 4)])
def test_affine_relu(dtype: torch.dtype, images: tuple, c: int, before: int, after: int) -> None:
    n, h, w = images
    x, residual = slice_of(n, c, h, w, dtype, before, after), slice_of(n, c, h, w, dtype, after, before)
    scale, shift = vectors(c, c)
    for relu in (True, False):
        for add in (None, residual):
            out, wanted = poisoned(x, before, after), torch.empty_like(x)
            assert kernels.affine_relu(x, scale, shift, out=out, residual=add, relu=relu) is out
            kernels.affine_relu_reference(x, scale, shift, out=wanted, residual=add, relu=relu)
            assert_close(out, wanted, TOLERANCE[dtype])
            assert_slice_only(out, before, after)
    out_sum, wanted_sum = poisoned(x, after, before), torch.empty_like(x)
    kernels.affine_relu(x, scale, shift, out=out, residual=residual, out_sum=out_sum)
    kernels.affine_relu_reference(x, scale, shift, out=wanted, residual=residual, out_sum=wanted_sum)
    assert_close(out, wanted, TOLERANCE[dtype])
    assert_close(out_sum, wanted_sum, TOLERANCE[dtype])
    assert_slice_only(out_sum, after, before)


def test_affine_relu_in_place() -> None:
    x, residual = slice_of(3, 20, 8, 8, torch.float32), slice_of(3, 20, 8, 8, torch.float32)
    scale, shift = vectors(20, 20)
    wanted, wanted_sum = torch.empty_like(x), x + residual
    kernels.affine_relu_reference(x, scale, shift, out=wanted, residual=residual)
    kernels.affine_relu(x, scale, shift, out=x, residual=residual, out_sum=residual)
    assert_close(x, wanted, 1e-5)
    assert torch.equal(residual, wanted_sum)


def test_relu_keeps_nan() -> None:
    x = slice_of(1, 16, 4, 4, torch.float32)
    x[0, 3, 2, 1] = torch.nan
    (ones,) = vectors(16)
    affine = kernels.affine_relu(x, ones, ones, out=torch.empty_like(x))
    assert affine.isnan().sum() == 1 and affine[0, 3, 2, 1].isnan()
    weight = torch.randn(16, 16, 1, 1, device=DEVICE)
    conv = kernels.conv2d(x, weight, relu=True, out=torch.empty_like(x), config=CONFIG)
    assert conv.isnan().sum() == 16 and conv[0, :, 2, 1].isnan().all()


# One block of most images here: the interpreter's time goes by blocks.
CONFIG = Config(256, 32, 32) if INTERPRETED else Config(64, 16, 16)


def weight_of(k: int, c: int, size: int, dtype: torch.dtype) -> Tensor:
    weight = torch.randn(k, c, size, size, device=DEVICE) / (c * size * size) ** 0.5
    return weight.to(dtype).contiguous(memory_format=torch.channels_last)


def check_conv(x: Tensor, weight: Tensor, config: Config | None, adds: str, *, tf32: bool = False, **given) -> None:
    """The kernel and the reference into slices of poisoned buffers, channels [before, before + k)."""
    stride, k = given.get("stride", 1), weight.shape[0]
    small = x[:, :, ::stride, ::stride]
    before, after = 24, 12
    out, wanted = poisoned(small, before, after, k), poisoned(small, 0, 0, k)
    seconds = (None, None)
    if "residual" in adds:
        given["residual"] = poisoned(small, 4, 0, k).normal_()
    if "second" in adds:
        scale, shift = vectors(k, k)
        seconds = ((scale, shift, poisoned(small, after, before, k)), (scale, shift, poisoned(small, 0, 0, k)))
    assert kernels.conv2d(x, weight, out=out, second=seconds[0], tf32=tf32, config=config, **given) is out
    kernels.conv2d_reference(x, weight, out=wanted, second=seconds[1], **given)
    tolerance = TOLERANCE["tf32" if tf32 and not INTERPRETED else x.dtype]
    assert_close(out, wanted, tolerance)
    assert_slice_only(out, before, after)
    if "second" in adds:
        assert_close(seconds[0][2], seconds[1][2], tolerance)
        assert_slice_only(seconds[0][2], after, before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("c", "k"), [(1, 1), (24, 48), (36, 12), (17, 33), (48, 16)])
def test_conv1x1(dtype: torch.dtype, c: int, k: int) -> None:
    for (n, h, w), adds in zip(IMAGES, ADDS, strict=True):
        x, weight = slice_of(n, c, h, w, dtype, 0, 12), weight_of(k, c, 1, dtype)
        check_conv(x, weight, CONFIG, adds, relu=True, prologue=vectors(c, c))
    check_conv(x, weight, CONFIG, adds, bias=vectors(k)[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("c", "k"), [(3, 16), (48, 12), (17, 5)])
@pytest.mark.parametrize("stride", [1, 2])
def test_conv3x3(dtype: torch.dtype, c: int, k: int, stride: int) -> None:
    weight = weight_of(k, c, 3, dtype)
    for (n, h, w), adds in zip(IMAGES, ADDS, strict=True):
        x = slice_of(n, c, h, w, dtype, 12, 3)
        check_conv(x, weight, CONFIG, adds, stride=stride, bias=vectors(k)[0], relu=adds != "plain")


@pytest.mark.parametrize(("h", "w"), [(8, 8), (7, 6)])
def test_conv1x1_of_stride_2(h: int, w: int) -> None:
    x = slice_of(3, 16, h, w, torch.float32)
    check_conv(x, weight_of(24, 16, 1, torch.float32), CONFIG, "plain", stride=2)


@pytest.mark.parametrize("size", [1, 3])
def test_several_blocks_each_way(size: int) -> None:
    # 112 pixels in blocks of 64, 24 channels out and 20 in in blocks of 16: each last block is partial.
    x = slice_of(2, 20, 8, 7, torch.float32)
    check_conv(x, weight_of(24, 20, size, torch.float32), Config(64, 16, 16), "residual+second")


@pytest.mark.parametrize("dtype", [*DTYPES, "tf32"])
def test_every_candidate(dtype: torch.dtype | str) -> None:
    tf32, dtype = dtype == "tf32", torch.float32 if dtype == "tf32" else dtype
    for c, k in [(40, 12)] if INTERPRETED else [(132, 140), (136, 12), (48, 72)]:
        x = slice_of(1 if INTERPRETED else 5, c, 8, 8, dtype, 8, 8)
        for size, adds in ((1, "plain"), (3, "residual+second")):
            found = configs(c, k, size, dtype, tf32)
            assert found and all(config.num_warps <= 4 for config in found)
            for config in found:
                given = {"prologue": vectors(c, c)} if size == 1 else {"relu": True}
                check_conv(x, weight_of(k, c, size, dtype), config, adds, tf32=tf32, **given)


@pytest.mark.parametrize("size", [1, 3])
def test_slices_of_one_buffer(size: int) -> None:
    """DenseNet: read the first channels of the block's buffer, write the next ones; the rest is not read."""
    buffer = slice_of(2, 24, 8, 8, torch.float32, 0, 24)
    before = buffer.clone()
    out = whole(buffer, 0, 24)[:, 24:36]
    weight = weight_of(12, 24, size, torch.float32)
    wanted = torch.empty_like(out)
    kernels.conv2d(buffer, weight, out=out, config=CONFIG)
    kernels.conv2d_reference(buffer, weight, out=wanted)
    assert_close(out, wanted, 1e-5)
    assert torch.equal(buffer, before) and whole(buffer, 0, 24)[:, 36:].isnan().all()


def test_out_may_be_the_residual() -> None:
    x, out = slice_of(2, 16, 8, 8, torch.float32), slice_of(2, 16, 8, 8, torch.float32)
    weight, wanted = weight_of(16, 16, 3, torch.float32), out.clone()
    kernels.conv2d_reference(x, weight, residual=wanted, out=wanted)
    for _ in range(2):  # the second time with a cached configuration
        found = out.clone()
        kernels.conv2d(x, weight, residual=found, out=found, config=CONFIG)
        assert_close(found, wanted, 1e-5)


def test_nothing_to_do() -> None:
    x = slice_of(0, 16, 8, 8, torch.float32)
    ones = torch.ones(16, device=DEVICE)
    assert kernels.affine_relu(x, ones, ones, out=torch.empty_like(x)).shape == x.shape
    assert (
        kernels.conv2d(x, weight_of(16, 16, 3, torch.float32), out=torch.empty_like(x), config=CONFIG).shape == x.shape
    )


def test_choose() -> None:
    out, right = torch.zeros(2, 3, device=DEVICE), torch.ones(2, 3, device=DEVICE)
    runs = []

    def writes(name: str, value: float) -> object:
        return lambda: runs.append(name) or [out.fill_(value)]

    def broken() -> None:
        raise RuntimeError("no such algorithm")

    def silent() -> list:
        """Leaves the output as it was."""
        return [out]

    candidates = {"broken": broken, "silent": silent, "wrong": writes("wrong", 1.5), "right": writes("right", 1.0)}
    given = {"outputs": [out], "expected": lambda: [right], "tolerance": 1e-3}
    assert kernels.choose("test_choose", candidates, **given) == "right"
    assert set(kernels.choices()["test_choose"].rejected) == {"broken", "silent", "wrong"}
    runs.clear()
    assert kernels.choose("test_choose", candidates, **given) == "right" and not runs
    with pytest.raises(RuntimeError, match=r"no candidate agrees with the reference.*no such algorithm"):
        kernels.choose("test_choose none", {"broken": broken}, **given)


def test_a_candidate_that_leaves_its_own_memory_unwritten(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would find there what the candidate before wrote: the right result."""
    if INTERPRETED:
        pytest.skip("only a GPU's allocator is known to hand out again what was freed last")
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    right = torch.randn(64, 1024, device=DEVICE)
    candidates = {"right": lambda: [right.clone()], "silent": lambda: [torch.empty_like(right)]}
    given = {"outputs": [], "expected": lambda: [right], "tolerance": 1e-3, "scratch": lambda: [right]}
    assert kernels.choose("test unwritten", candidates, **given) == "right"
    assert "off by nan" in kernels.choices()["test unwritten"].rejected["silent"]


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("affine_relu", {"x": (1, 8, 4)}, "x must be \\[N, C, H, W\\]"),
        ("affine_relu", {"x": (1, 8, 4, 4), "nchw": True}, "x must be channels-last"),
        ("affine_relu", {"x": (1, 8, 4, 4), "dtype": torch.float64}, "x must be .* in bfloat16"),
        ("affine_relu", {"x": (1, 8, 4, 4), "vectors": 7}, "affine scale must have shape \\(8,\\)"),
        ("affine_relu", {"x": (1, 8, 4, 4), "out": (1, 8, 4, 5)}, "out must have shape \\(1, 8, 4, 4\\)"),
    ],
)
def test_errors(name: str, given: dict, message: str) -> None:
    x = torch.randn(given["x"], dtype=given.get("dtype", torch.float32), device=DEVICE)
    out = torch.empty(given.get("out", given["x"]), dtype=x.dtype, device=DEVICE)
    if x.dim() == 4 and "nchw" not in given:
        x, out = (t.contiguous(memory_format=torch.channels_last) for t in (x, out))
    channels = given.get("vectors", given["x"][1])
    with pytest.raises(ValueError, match=message):
        getattr(kernels, name)(x, *vectors(channels, channels), out=out)


def test_errors_of_conv() -> None:
    x, weight = slice_of(1, 8, 4, 4, torch.float32), weight_of(8, 8, 3, torch.float32)
    out = torch.empty_like(x)
    with pytest.raises(ValueError, match=r"weight must have shape \(8, 8, 1, 1\)"):
        kernels.conv2d(x, weight_of(8, 8, 5, torch.float32), out=out, config=CONFIG)
    with pytest.raises(ValueError, match="prologue must be None of a 3x3 convolution"):
        kernels.conv2d(x, weight, out=out, prologue=vectors(8, 8), config=CONFIG)
    with pytest.raises(ValueError, match="weight must be contiguous in channels_last"):
        kernels.conv2d(x, weight.contiguous(), out=out, config=CONFIG)
    with pytest.raises(ValueError, match=r"out must have shape \(1, 8, 2, 2\)"):
        kernels.conv2d(x, weight, out=out, stride=2, config=CONFIG)
    with pytest.raises(ValueError, match=r"bias must have shape \(8,\), torch.float32"):
        kernels.conv2d(x, weight, out=out, bias=vectors(8)[0].half(), config=CONFIG)
    with pytest.raises(ValueError, match="second out must have shape"):
        kernels.conv2d(x, weight, out=out, second=(*vectors(8, 8), out[:, :4]), config=CONFIG)
    with pytest.raises(ValueError, match="residual must be channels-last"):
        kernels.conv2d(x, weight, out=out, residual=x.contiguous(memory_format=torch.contiguous_format), config=CONFIG)
    with pytest.raises(ValueError, match=r"config must have num_warps <= 4 .*num_warps=8"):
        kernels.conv2d(x, weight, out=out, config=Config(64, 16, 16, num_warps=8))


@pytest.mark.parametrize("net", [DenseNet(10, 12), WideResNet(10, 1)], ids=["densenet", "wrn"])
def test_a_net_by_the_kernels(net: torch.nn.Module) -> None:
    """The plan of a whole prefix, each convolution the last way: slices, prologues, second outputs."""
    units = [net.stem, *net.blocks]
    for module in net.eval().requires_grad_(False).to(DEVICE).modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.uniform_(-0.5, 0.5)
            module.running_var.uniform_(0.5, 2.0)
    names = {name: getattr(kernels, name) for name in kernels.__all__}
    ops = SimpleNamespace(**{**names, "choose": lambda key, candidates, **_: list(candidates)[-1]})
    engine = CudaEngine(
        lower_units(*units), dtype=torch.float32, output_dtype=torch.float32, channels_last=False,
        ops=ops,
    )  # fmt: skip
    engine.tf32 = False
    x = torch.randn(1, 3, 8, 8, device=DEVICE)
    with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        wanted = torch.nn.Sequential(*units)(x)
        for run in (engine.run_plain, engine.run_measured):
            assert_close(run(x)[0], wanted, 1e-5)
    assert {type(way) for way in engine.ways.values()} == {Config}


@pytest.mark.skipif(INTERPRETED, reason="a graph capture needs a GPU")
def test_a_kernel_can_be_captured() -> None:
    x, weight = slice_of(4, 32, 8, 8, torch.bfloat16), weight_of(32, 32, 3, torch.bfloat16)
    out, wanted = torch.empty_like(x), torch.empty_like(x)
    kernels.conv2d(x, weight, out=out, config=CONFIG)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kernels.conv2d(x, weight, out=out, config=CONFIG)
    x.normal_()
    graph.replay()
    kernels.conv2d_reference(x, weight, out=wanted)
    assert_close(out, wanted, TOLERANCE[torch.bfloat16])
