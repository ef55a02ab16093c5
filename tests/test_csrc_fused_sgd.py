"""The compiled update below Python: the table, the CUDA blocks on the host, the CUDA source, the process's OpenMP."""

import math
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from freezeout_ext import FusedSGD, native
from freezeout_ext.fused import compiled, fused_sgd_reference_

pytestmark = pytest.mark.skipif(native.C is None, reason=f"no compiled half: {native.import_error}")

CSRC = Path(__file__).parent.parent / "csrc"
CHUNK = 8192
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
# Around the vectors of 2, 4 and 8, the block's 256 threads times two vectors in flight, and the chunk.
SIZES = [0, 1, 3, 7, 8, 9, 2047, 2048, 2049, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 5, 0]


def aligned_to(elements, offset, dtype):
    """Random values whose address is `offset` elements off a 64-byte boundary, within NaN."""
    room = torch.full((elements + 64,), math.nan, dtype=dtype)
    start = offset + -(room.data_ptr() // room.element_size()) % (64 // room.element_size())
    room[start : start + elements] = torch.randn(elements).to(dtype)
    return room, room[start : start + elements]


class Case:
    """Tensors, their update, and a copy for the reference."""

    def __init__(self, sizes, dtype, *, groups=None, offsets=(0, 0, 0), without_grad=(), first=(), **options):
        self.momentum = options.get("momentum", 0.0)
        kinds = [[aligned_to(n, offset, dtype) for n in sizes] for offset in offsets]
        self.rooms = [room for kind in kinds for room, _ in kind]
        self.params, self.buffers, self.grads = ([tensor for _, tensor in kind] for kind in kinds)
        self.groups = groups or list(range(len(sizes)))
        self.lrs = [0.01 * (i + 1) for i in range(self.groups[-1] + 1)]
        self.options = options
        self.first = [i in first for i in range(len(sizes))]
        self.without_grad = without_grad
        flags = {"weight_decay": options.get("weight_decay"), "momentum": self.momentum}
        flags |= {"maximize": options.get("maximize"), "nesterov": options.get("nesterov")}
        bits = sum(compiled.OPTIONS[name] for name, on in flags.items() if on)
        undamped = 1 - options.get("dampening", 0.0)
        self.update = native.C.Update(
            dtype=compiled.DTYPES[dtype],
            device_type=1,
            device_index=0,
            work=[
                (
                    p.data_ptr(),
                    b.data_ptr() if self.momentum else 0,
                    0 if i in without_grad else g.data_ptr(),
                    p.numel(),
                    self.groups[i],
                    self.first[i],
                )
                for i, (p, b, g) in enumerate(zip(self.params, self.buffers, self.grads, strict=True))
            ],
            groups=[(lr, 0.0, 0.0, self.momentum, undamped, options.get("weight_decay", 0.0), bits) for lr in self.lrs],
        )
        self.expected = [[t.clone() for t in kind] for kind in (self.params, self.buffers, self.grads)]

    def reference(self, scale=None):
        params, buffers, grads = self.expected
        used = [i for i in range(len(params)) if i not in self.without_grad]
        fused_sgd_reference_(
            [params[i] for i in used],
            [grads[i] for i in used],
            [buffers[i] for i in used],
            [self.groups[i] for i in used],
            self.lrs,
            scale,
            first_step=[self.first[i] for i in used],
            **self.options,
        )

    def assert_as_expected(self):
        found = [*self.params, *self.buffers, *self.grads]
        for a, b in zip(found, [t for kind in self.expected for t in kind], strict=True):
            if a.dtype in (torch.float32, torch.float64):
                assert torch.equal(a, b)
            else:
                # The reference rounds four times to 8 or 11 bits, the update once.
                torch.testing.assert_close(a, b, rtol=4 * torch.finfo(a.dtype).eps, atol=8 * torch.finfo(a.dtype).eps)
        for room, tensor in zip(self.rooms, found, strict=True):
            assert room.isnan().sum() == room.numel() - tensor.numel(), "written outside of the tensor"


def address(tensor):
    return 0 if tensor is None else tensor.data_ptr()


RUNS = {
    "cpu": lambda case, scale=None: case.update.run_cpu(2, -1.0, 1.0 if scale is None else 1 / scale.item()),
    "emulated": lambda case, scale=None: case.update.run_emulated(0, 0, address(scale), 0),
}
OPTIONS = [
    {},
    {"weight_decay": 0.1, "maximize": True},
    {"momentum": 0.9, "dampening": 0.3},
    {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
]


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_edge_equals_the_reference(dtype, options, run):
    case = Case(SIZES, dtype, first={2, 10}, without_grad={5, 9}, **options)
    RUNS[run](case)
    case.reference()
    case.assert_as_expected()


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("offsets", [(0, 0, 2), (0, 0, 1), (1, 0, 0), (0, 3, 0), (1, 1, 1)], ids=str)
def test_every_alignment_equals_the_reference(offsets, run):
    case = Case([5, 2049, CHUNK + 3], torch.float32, offsets=offsets, momentum=0.9, nesterov=True)
    scale = torch.tensor(4.0)
    RUNS[run](case, scale)
    case.reference(scale)
    case.assert_as_expected()


@pytest.mark.parametrize("count", [400, 600, 2500])
def test_thousands_of_groups_take_several_launches(count):
    case = Case([3] * count, torch.float32, momentum=0.9, without_grad={0, 1, count - 1})
    launches = case.update.run_emulated(0, 0, 0, 0)
    case.reference()
    case.assert_as_expected()
    # 8 words a tensor with its own group, 4064 words a launch.
    assert launches == math.ceil((count - 2) / (4064 // 8))


def test_one_launch_for_a_densenet_in_76_groups():
    case = Case([16] * 228, torch.float32, groups=[i // 3 for i in range(228)], momentum=0.9)
    assert case.update.run_emulated(0, 0, 0, 0) == 1


@pytest.mark.parametrize("which", [range(4), range(2), ()], ids=str)
def test_no_launch_without_gradients(which):
    case = Case([16, 0, 3, 0], torch.float32, without_grad=set(which))
    assert case.update.run_emulated(0, 0, 0, 0) == (0 if len(which) == 4 else 1)


def test_the_table():
    case = Case([1, 0, CHUNK, CHUNK + 1], torch.float32, groups=[0, 0, 1, 2], momentum=0.9)
    rows = list(struct.iter_unpack("<QQqII", case.update.table()))
    assert [row[2:] for row in rows] == [(1, 1, 0), (0, 1, 0), (CHUNK, 2, 1), (CHUNK + 1, 4, 2)]
    assert [row[0] for row in rows] == [p.data_ptr() for p in case.params]
    assert [row[1] for row in rows] == [b.data_ptr() for b in case.buffers]


def test_found_inf_stops_every_block():
    case = Case([5, CHUNK], torch.float32, momentum=0.9)
    found = torch.tensor(2.0)
    case.update.run_emulated(0, 0, 0, found.data_ptr())
    case.assert_as_expected()


@pytest.mark.parametrize("step", [0, 1, 2, 3, 7, 8, 9])
def test_the_device_schedule(step):
    peak, milestone, warmup = 0.4, 8.0, 2.0
    p, g = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    update = native.C.Update(
        dtype=1,
        device_type=1,
        device_index=0,
        work=[(p.data_ptr(), 0, g.data_ptr(), 3, 0, False)],
        groups=[(peak, milestone, warmup, 0.0, 1.0, 0.0, 0)],
    )
    counter = torch.tensor(step)
    update.run_emulated(0, counter.data_ptr(), 0, 0)
    emulated = p.clone()
    p.zero_()
    update.run_cpu(1, float(step), 1.0)
    assert torch.equal(p, emulated)
    if step < warmup:
        expected = peak * (step + 1) / (warmup + 1)
    elif step < milestone:
        expected = peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (milestone - warmup)))
    else:
        expected = 0.0
    # cos^2 of half the angle against (1 + cos) / 2, both in double.
    torch.testing.assert_close(-p, torch.full_like(p, expected), rtol=1e-14, atol=1e-16)


def test_bad_arguments_are_errors():
    arguments = {"device_type": 1, "device_index": 0, "groups": [(0.1, 0.0, 0.0, 0.9, 1.0, 0.0, 4)]}
    with pytest.raises(ValueError, match="dtype must be 0 to 3, got 9"):
        native.C.Update(dtype=9, work=[], **arguments)
    with pytest.raises(ValueError, match="group must be below 1, got 1"):
        native.C.Update(dtype=0, work=[(64, 64, 64, 1, 1, False)], **arguments)
    with pytest.raises(ValueError, match="momentum_buffer must not be null with momentum"):
        native.C.Update(dtype=0, work=[(64, 0, 64, 1, 0, False)], **arguments)
    with pytest.raises(ValueError, match="isa must be one of"):
        native.C.use_cpu_isa("z80")


def test_a_launch_that_fails_says_so():
    # A device that is nowhere: on one that is there the kernel would run, over null.
    update = native.C.Update(
        dtype=0, device_type=2, device_index=torch.cuda.device_count(), work=[(64, 0, 64, 1, 0, False)],
        groups=[(0.1, 0.0, 0.0, 0.0, 1.0, 0.0, 0)],
    )  # fmt: skip
    with pytest.raises(RuntimeError, match="fused_sgd_cuda: "):
        update.run_cuda(0, 0, 0, 0, 0)


@pytest.mark.parametrize("exchange", [True, False])
def test_plans_read_tensors_with_and_without_the_exchange(exchange, monkeypatch):
    reader = native.C.TensorReader(torch.Tensor, nn.Parameter, compiled.DLPACK_DTYPES, exchange=exchange)
    assert reader.exchanges == (exchange and hasattr(torch.Tensor, "__dlpack_c_exchange_api__"))
    monkeypatch.setattr(compiled, "tensor_reader", lambda: reader)
    shapes = [(), (0,), (1, 1), (4, 3)]
    ours, theirs = ([nn.Parameter(torch.ones(s)) for s in shapes] for _ in range(2))
    a = FusedSGD(ours, lr=0.1, momentum=0.9)
    b = torch.optim.SGD(theirs, lr=0.1, momentum=0.9, foreach=False)
    for step in range(5):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn_like(p)
            if step == 3 and p.dim() == 2:
                p.grad = torch.randn(p.shape[::-1]).t()
            q.grad = p.grad.clone()
        if step == 4:
            ours[3].data = ours[3].data.clone()
        a.step()
        b.step()
        assert all(torch.equal(p, q) for p, q in zip(ours, theirs, strict=True))


def test_one_openmp_runtime_is_loaded():
    # In a fresh process: other tests may load other libraries.
    code = "import torch, freezeout_ext.native as n; assert n.C; print(open('/proc/self/maps').read())"
    maps = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    loaded = set(re.findall(r"\S*lib(?:[gi]omp|omp)\S*\.so\S*", maps))
    assert len(loaded) == 1, loaded


NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
# Registers a thread of 256: 64 leave room for four blocks on an SM, 128 for two. Vectors of 8 halves need more.
REGISTERS = {"f": 64, "d": 80, "Half": 112, "BFloat16": 112}


@pytest.mark.skipif(NVCC is None, reason="no nvcc on PATH or in /usr/local/cuda")
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_the_cuda_source_compiles_without_spills(architecture, tmp_path):
    command = [NVCC, "-O3", "-std=c++17", "-fmad=false", "-Xptxas", "-v", f"-arch={architecture}"]
    command += ["-DFREEZEOUT_WITH_CUDA", "-cubin", str(CSRC / "fused_sgd_cuda.cu"), "-o", str(tmp_path / "out.cubin")]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    kernels = re.findall(
        r"Function properties for \S*fused_sgd_kernelI(?:NS_\d+)?(f|d|Half|BFloat16)E?\S*\s+"
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads\s+.*Used (\d+) registers",
        report,
    )
    assert len(kernels) == 12 and {kernel[0] for kernel in kernels} == REGISTERS.keys(), report
    for dtype, stack, stores, loads, registers in kernels:
        assert stack == stores == loads == "0", report
        assert int(registers) <= REGISTERS[dtype], report


@pytest.mark.native_cuda
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_cuda_equals_the_host_blocks(dtype, options):
    sizes = [n for n in SIZES if n]
    params = [torch.randn(n).to(dtype) for n in sizes]
    grads = [[torch.randn(n).to(dtype) for n in sizes] for _ in range(3)]
    results = []
    for device in ("cpu", "cuda"):
        ours = [nn.Parameter(p.to(device, copy=True)) for p in params]
        optimizer = FusedSGD([{"params": [p], "lr": 0.01 * i} for i, p in enumerate(ours)], **options)
        for step_grads in grads:
            for p, g in zip(ours, step_grads, strict=True):
                p.grad = g.to(device)
            optimizer.step()
        assert optimizer.native_report() == {}
        results.append([p.detach().cpu() for p in ours])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.native_cuda
def test_a_captured_graph_follows_the_device_schedule():
    results = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        p = nn.Parameter(torch.randn(1000).to(device))
        p.grad = torch.randn(1000).to(device)
        optimizer = FusedSGD([p], lr=1.0, momentum=0.9)
        step = torch.zeros((), dtype=torch.int64, device=device)
        optimizer.set_device_schedule(step, [(0.1, 10.0, 2.0)])
        for _ in range(3):
            optimizer.step()
            step += 1
        if device == "cuda":
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                optimizer.step()
                step += 1
        for _ in range(4):
            if device == "cuda":
                graph.replay()
            else:
                optimizer.step()
                step += 1
        results.append(p.detach().cpu())
    # The device's cospi and the host's cos may differ in the last place of a double.
    torch.testing.assert_close(*results, rtol=2e-7, atol=1e-7)


@pytest.mark.native_cuda
@pytest.mark.parametrize("after", [0, 2])
def test_cuda_overflow_changes_nothing(after):
    p = nn.Parameter(torch.ones(100, device="cuda"))
    optimizer = FusedSGD([p], lr=0.1, momentum=0.9, dampening=0.5)
    for _ in range(after):
        p.grad = torch.ones_like(p)
        optimizer.step()
    before = p.detach().clone()
    scaler = torch.amp.GradScaler("cuda", init_scale=8.0)
    optimizer.zero_grad()
    scaler.scale((p * torch.inf).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(p, before) and len(optimizer.state) == (after > 0)
