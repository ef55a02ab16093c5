"""The compiled update below Python: every formula's loops and CUDA blocks against its reference, the CUDA source."""

import itertools
import math
import re
import shutil
import struct
import subprocess
from pathlib import Path

import host_module
import pytest
import torch
from fused_cases import assert_equal, params_of, step_both, twins
from torch import nn

from freezeout_ext import FusedSGD, native
from freezeout_ext.fused import compiled, fused_adamw_reference_, fused_sgd_reference_

pytestmark = [
    pytest.mark.skipif(native.C is None, reason=f"no compiled half: {native.import_error}"),
    pytest.mark.usefixtures("exact_square_roots"),
]

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


REFERENCES = {"sgd": fused_sgd_reference_, "adamw": fused_adamw_reference_}
STATES = {"sgd": 1, "adamw": 3}
STARTS = [0.0, 0.0, 7.0, 3.0]  # steps that tensors have behind them, in turn


def group_of(formula, lr, options):
    """(lr, milestone, warmup, weight_decay, coefficients, options), as the module takes a group."""
    decay = options.get("weight_decay", 0.0 if formula == "sgd" else 0.01)
    flags = {"weight_decay": decay != 0, "maximize": options.get("maximize", False)}
    if formula == "sgd":
        momentum = options.get("momentum", 0.0)
        flags |= {"momentum": momentum != 0, "nesterov": options.get("nesterov", False)}
        coefficients = (momentum, 1 - options.get("dampening", 0.0), 0.0)
    else:
        flags |= {"amsgrad": options.get("amsgrad", False), "coupled": not options.get("decoupled", True)}
        coefficients = (options.get("beta1", 0.9), options.get("beta2", 0.999), options.get("eps", 1e-8))
    return (lr, 0.0, 0.0, decay, coefficients, compiled.option_bits(formula, **flags))


class Case:
    """Tensors, their update, and a copy for the reference."""

    def __init__(self, formula, sizes, dtype, *, where, groups=None, offsets=(0, 0, 0), without_grad=(), **options):
        self.formula, self.where, self.options = formula, where, options
        kinds = [[aligned_to(n, offset, dtype) for n in sizes] for offset in offsets]
        kinds += [[aligned_to(n, offsets[1], dtype) for n in sizes] for _ in range(STATES[formula] - 1)]
        self.rooms = [room for kind in kinds for room, _ in kind]
        self.params, first, self.grads, *more = ([tensor for _, tensor in kind] for kind in kinds)
        self.states = [first, *more]
        for squares in self.states[1:]:
            for tensor in squares:
                tensor.abs_()
        self.steps = [torch.tensor(STARTS[i % 4]) for i in range(len(sizes))]
        self.groups = groups or list(range(len(sizes)))
        self.lrs = [0.01 * (i + 1) for i in range(self.groups[-1] + 1)]
        self.without_grad = without_grad
        module = native.C if where == "cpu" else host_module.load()
        work = []
        for i, (p, g) in enumerate(zip(self.params, self.grads, strict=True)):
            states = [tensors[i].data_ptr() if self.uses(k) else 0 for k, tensors in enumerate(self.states)]
            states += [0] * (3 - len(states))
            step = self.steps[i].data_ptr() if formula == "adamw" else 0
            work.append(
                (p.data_ptr(), states, 0 if i in without_grad else g.data_ptr() or 64, step, p.numel(), self.groups[i])
            )
        self.batch = module.TensorBatch(
            formula=compiled.FORMULAS[formula],
            dtype=compiled.DTYPES[dtype],
            device_type=1 if where == "cpu" else 2,
            device_index=0,
            work=work,
            groups=[group_of(formula, lr, options) for lr in self.lrs],
        )
        self.table = torch.frombuffer(bytearray(self.batch.table()), dtype=torch.uint8)
        self.batch.set_table(self.table.data_ptr(), 0)
        kinds = (self.params, *self.states, self.grads, self.steps)
        self.expected = [[t.clone() for t in kind] for kind in kinds]

    def uses(self, state):
        if self.formula == "sgd":
            return self.options.get("momentum", 0.0) != 0
        return state < 2 or self.options.get("amsgrad", False)

    def run(self, scale=None, found_inf=None):
        """Returns the number of kernels that it took."""
        self.batch.run(num_threads=2, schedule_step=0, grad_scale=address(scale), found_inf=address(found_inf))
        return host_module.kernel().freezeout_launches()

    def reference(self, scale=None):
        params, *states, grads, steps = self.expected
        used = [i for i in range(len(params)) if i not in self.without_grad]
        more = [] if self.formula == "sgd" else [[steps[i] for i in used]]
        REFERENCES[self.formula](
            [params[i] for i in used],
            [grads[i] for i in used],
            *[[tensors[i] for i in used] for tensors in states],
            *more,
            [self.groups[i] for i in used],
            self.lrs,
            scale,
            **self.options,
        )

    def assert_as_expected(self):
        params, *states, grads, steps = self.expected
        assert all(map(torch.equal, self.steps, steps))
        found = [*self.params, *(t for kind in self.states for t in kind), *self.grads]
        expected = [*params, *(t for kind in states for t in kind), *grads]
        for a, b in zip(found, expected, strict=True):
            if a.dtype in (torch.float32, torch.float64):
                assert torch.equal(a, b)
            else:
                # The reference rounds up to eight times to 8 or 11 bits, the update once.
                torch.testing.assert_close(a, b, rtol=8 * torch.finfo(a.dtype).eps, atol=8 * torch.finfo(a.dtype).eps)
        for room, tensor in zip(
            self.rooms,
            [*self.params, *self.states[0], *self.grads, *(t for kind in self.states[1:] for t in kind)],
            strict=True,
        ):
            assert room.isnan().sum() == room.numel() - tensor.numel(), "written outside of the tensor"
        entries = list(struct.iter_unpack("<QQQQQqIIII", bytes(self.table.tolist())))
        assert all(entry[8] == 0 for entry in entries), "blocks are counted from 0 in the next launch"


def address(tensor):
    return 0 if tensor is None else tensor.data_ptr()


WHERE = ["cpu", "cuda blocks on_the_host"]
OPTIONS = [
    ("sgd", {}),
    ("sgd", {"weight_decay": 0.1, "maximize": True}),
    ("sgd", {"momentum": 0.9, "dampening": 0.3}),
    ("sgd", {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    ("adamw", {"weight_decay": 0.0}),
    ("adamw", {"amsgrad": True}),
    ("adamw", {"beta1": 0.3, "beta2": 0.5, "eps": 1e-3, "maximize": True, "weight_decay": 0.1}),
    ("adamw", {"decoupled": False, "weight_decay": 0.1, "amsgrad": True}),
]
of_every_formula = pytest.mark.parametrize("formula", ["sgd", "adamw"])


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize(("formula", "options"), OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_edge_equals_the_reference(dtype, formula, options, where):
    case = Case(formula, SIZES, dtype, without_grad={5, 9}, where=where, **options)
    for _ in range(2):
        case.run()
        case.reference()
    case.assert_as_expected()


@of_every_formula
@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("offsets", [(0, 0, 2), (0, 0, 1), (1, 0, 0), (0, 3, 0), (1, 1, 1)], ids=str)
def test_every_alignment_equals_the_reference(offsets, where, formula):
    options = {"momentum": 0.9, "nesterov": True} if formula == "sgd" else {"amsgrad": True}
    case = Case(formula, [5, 2049, CHUNK + 3], torch.float32, offsets=offsets, where=where, **options)
    scale = torch.tensor(4.0)
    case.run(scale)
    case.reference(scale)
    case.assert_as_expected()


@of_every_formula
@pytest.mark.parametrize("count", [400, 600, 2500])
def test_thousands_of_groups_take_several_launches(count, formula):
    case = Case(formula, [3] * count, torch.float32, where="cuda", without_grad={0, 1, count - 1})
    launches = case.run()
    case.reference()
    case.assert_as_expected()
    # 9 words a tensor with its own group, 4064 words a launch.
    assert launches == math.ceil((count - 2) / (4064 // 9))


@of_every_formula
def test_one_launch_for_a_densenet_in_76_groups(formula):
    case = Case(formula, [16] * 228, torch.float32, groups=[i // 3 for i in range(228)], where="cuda")
    assert case.run() == 1


@pytest.mark.parametrize("which", [range(4), range(2), ()], ids=str)
def test_no_launch_without_gradients(which):
    case = Case("sgd", [16, 0, 3, 0], torch.float32, without_grad=set(which), where="cuda")
    assert case.run() == (0 if len(which) == 4 else 1)


def test_the_table():
    sizes = [1, 0, CHUNK, CHUNK + 1]
    case = Case("adamw", sizes, torch.float32, groups=[0, 0, 1, 2], where="cuda", amsgrad=True)
    rows = list(struct.iter_unpack("<QQQQQqIIII", case.batch.table()))
    # An empty tensor has a chunk too, for its step.
    assert [row[5:] for row in rows] == [(1, 1, 0, 0, 0), (0, 2, 0, 0, 0), (CHUNK, 3, 1, 0, 0), (CHUNK + 1, 5, 2, 0, 0)]
    for i, tensors in enumerate((case.params, *case.states, case.steps)):
        assert [row[i] for row in rows] == [t.data_ptr() for t in tensors]


@of_every_formula
@pytest.mark.parametrize("where", WHERE)
def test_found_inf_stops_every_block(where, formula):
    case = Case(formula, [5, CHUNK], torch.float32, where=where)
    case.run(found_inf=torch.tensor(2.0))
    case.assert_as_expected()


GROUP = (0.1, 0.0, 0.0, 0.0, (0.9, 1.0, 0.0), 4)
BAD_BATCHES = {
    "formula must be 0 or 1, got 2": {"formula": 2},
    "dtype must be 0 to 3, got 9": {"dtype": 9},
    "options must be ones that the formula has, got 8": {"groups": [(*GROUP[:5], 8)]},
    "group must be below 1, got 1": {"work": [(64, (64, 0, 0), 64, 0, 1, 1)]},
    "states\\[0\\] must not be null": {"work": [(64, (0, 0, 0), 64, 0, 1, 0)]},
    "param must not be null": {"work": [(0, (64, 0, 0), 64, 0, 1, 0)]},
    "step must not be null": {"formula": 1, "work": [(64, (64, 64, 64), 64, 0, 1, 0)]},
    "size must be >= 0, got -1": {"work": [(64, (64, 0, 0), 64, 0, -1, 0)]},
}


@pytest.mark.parametrize("message", BAD_BATCHES)
def test_bad_batches_are_errors(message):
    good = {"formula": 0, "dtype": 0, "device_type": 1, "device_index": 0, "work": [], "groups": [GROUP]}
    native.C.TensorBatch(**good)
    with pytest.raises(ValueError, match=message):
        native.C.TensorBatch(**(good | BAD_BATCHES[message]))


def test_bad_arguments_of_the_raw_module_are_errors():
    with pytest.raises(ValueError, match="isa must be one of"):
        native.C.use_cpu_isa("z80")
    with pytest.raises(TypeError):
        native.C.PreparedStep(None, formula=0, groups=[], state={}, native=[], schedule=None)
    with pytest.raises(TypeError):
        native.C.TensorReader(None, None, {}, None, exchange=True)
    reader = compiled.tensor_reader()
    for groups, planned in (
        ([{"params": (1,)}], [[True]]),
        ([3], [[True]]),
        ([{}], [[True]]),
        ([{"params": [1]}], [[]]),
    ):
        with pytest.raises(ValueError, match="native must have one entry for each parameter of a list in a dict"):
            native.C.PreparedStep(reader, formula=0, groups=groups, state={}, native=planned, schedule=None)
    with pytest.raises(ValueError, match="native must have one entry for each of the 1 param groups, got 0"):
        native.C.PreparedStep(reader, formula=0, groups=[{}], state={}, native=[], schedule=None)
    sizes = {"rows": 1, "channels": 1, "x_stride": 1, "y_stride": 1, "relu": True, "dtype": "float32", "threads": 1}
    for null in range(4):
        with pytest.raises(ValueError, match="x, y, scale and shift must be addresses, got a null one"):
            native.C.affine_relu(*(0 if i == null else 64 for i in range(4)), **sizes)


@pytest.mark.parametrize("exchange", [True, False])
def test_plans_read_tensors_with_and_without_the_exchange(exchange, monkeypatch):
    increment = torch.autograd.graph.increment_version
    reader = native.C.TensorReader(torch.Tensor, nn.Parameter, compiled.DLPACK_DTYPES, increment, exchange=exchange)
    assert reader.exchanges == (exchange and hasattr(torch.Tensor, "__dlpack_c_exchange_api__"))
    monkeypatch.setattr(compiled, "tensor_reader", lambda: reader)
    ours, theirs = twins(FusedSGD, [(), (0,), (1, 1), (4, 3)])
    for step in range(5):
        if step == 4:
            params_of(ours)[3].data = params_of(ours)[3].data.clone()
        step_both(ours, theirs)
        if step == 2:
            for optimizer in (ours, theirs):
                params_of(optimizer)[3].grad = torch.ones(3, 4).t()
                optimizer.step()
            assert_equal(ours, theirs)


NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="no nvcc on PATH or in /usr/local/cuda")
# Registers a thread of 256: 64 leave room for four blocks on an SM, 80 for three, 128 for two.
REGISTERS = {"f": 80, "d": 104, "Half": 112, "BFloat16": 112}


def compile_cuda(architecture, out):
    """The kernels' machine code in the file `out`; returns what ptxas says of it."""
    command = [NVCC, "-O3", "-std=c++17", "-fmad=false", "-Xptxas", "-v", f"-arch={architecture}"]
    command += ["-DFREEZEOUT_WITH_CUDA", "-cubin", str(CSRC / "fused_update_cuda.cu"), "-o", str(out)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stderr


@needs_nvcc
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_the_cuda_source_compiles_without_spills(architecture, tmp_path):
    report = compile_cuda(architecture, tmp_path / "o.cubin")
    kernels = re.findall(
        r"Function properties for \S*fused_update_kernelINS_\d+(Sgd|AdamW)E(?:NS_\d+)?(f|d|Half|BFloat16)E?\S*\s+"
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads\s+.*Used (\d+) registers",
        report,
    )
    assert len(kernels) == 24 and {kernel[:2] for kernel in kernels} == set(
        itertools.product(("Sgd", "AdamW"), REGISTERS)
    )
    for formula, dtype, stack, stores, loads, registers in kernels:
        assert stack == stores == loads == "0", report
        assert int(registers) <= (64 if (formula, dtype) == ("Sgd", "f") else REGISTERS[dtype]), report


@needs_nvcc
def test_the_cuda_machine_code_moves_16_bytes_an_access(tmp_path):
    """Two vectors of each operand in flight, by loads that know their memory is global; nothing in local memory."""
    triton = pytest.importorskip("triton", reason="Triton's package carries the disassembler")
    compile_cuda("sm_90", tmp_path / "o.cubin")
    disassembler = triton.knobs.nvidia.cuobjdump.path
    sass = subprocess.run(
        [disassembler, "--dump-sass", str(tmp_path / "o.cubin")], capture_output=True, text=True, check=True
    ).stdout
    kernels = [part for part in sass.split("Function : ")[1:] if "fused_update_kernel" in part.split()[0]]
    assert len(kernels) == 24
    for kernel in kernels:
        name = kernel.split()[0]
        # Parameter, states and gradient; SGD's one state by two vectors in flight, AdamW's three by one.
        accesses = 3 * 2 if "3Sgd" in name else 5
        assert len(re.findall(r"\bLDG\.E\.128\b(?!\.CONSTANT)", kernel)) == accesses, name
        assert len(re.findall(r"\bSTG\.E\.128\b", kernel)) == accesses, name
        assert not re.search(r"\b(LDL|STL|LD\.E|ST\.E)\b", kernel), name
