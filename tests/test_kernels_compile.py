"""The kernels compiled for sm_80 and sm_90, no GPU needed: registers, shared memory, spills, instructions."""

import pytest
import torch
from load_script import BENCH, load_script

triton = pytest.importorskip("triton", reason="Triton is not installed")
if triton.knobs.runtime.interpret:
    pytest.skip("TRITON_INTERPRET is set: there is nothing to compile", allow_module_level=True)

from freezeout_ext.kernels import affine, conv  # noqa: E402

compiler = load_script(BENCH / "machine_code.py")
Compiled, compiled, compiled_conv = compiler.Compiled, compiler.compiled, compiler.compiled_conv
DENSE_1X1, DENSE_3X3, WIDE_3X3 = compiler.DENSE_1X1, compiler.DENSE_3X3, compiler.WIDE_3X3

# A thread has 255 registers, and 232 keep two blocks of 128 threads on a multiprocessor with room to spare; two blocks
# of 80 KiB fit its shared memory on sm_80 (164 KiB) and sm_90 (228 KiB).
MOST_REGISTERS = 232
MOST_SHARED = 80 * 1024


def assert_lean(found: Compiled) -> None:
    assert found.stack == 0, "registers spill to the stack"
    assert found.registers <= MOST_REGISTERS
    assert found.shared <= MOST_SHARED


def on_tensor_cores(found: Compiled, arch: int) -> bool:
    return ("wgmma.mma_async" if arch == 90 else "mma.sync") in found.ptx


@pytest.mark.parametrize("config", conv.configs(180, 48, 1, torch.bfloat16, False), ids=str)
def test_conv1x1_with_a_prologue(config: conv.Config) -> None:
    found = compiled_conv(config, DENSE_1X1, size=1, arch=90, vec_in=4, vec_out=16)
    assert_lean(found)
    assert on_tensor_cores(found, 90)
    assert "cp.async" in found.ptx  # the operand is on its way while the last one is multiplied
    assert "ld.global.b16" not in found.ptx  # 36 channels a pixel are read four at a time


@pytest.mark.parametrize("config", conv.configs(48, 12, 3, torch.bfloat16, False), ids=str)
def test_conv3x3_into_a_slice(config: conv.Config) -> None:
    found = compiled_conv(config, DENSE_3X3, size=3, arch=90, vec_in=16, vec_out=4)
    assert_lean(found)
    assert on_tensor_cores(found, 90)
    assert "st.global.v2.b32" in found.ptx and "st.global.b16" not in found.ptx  # four of 12 channels at a time


@pytest.mark.parametrize("config", conv.configs(128, 128, 3, torch.bfloat16, False), ids=str)
def test_conv3x3_with_two_outputs(config: conv.Config) -> None:
    found = compiled_conv(config, WIDE_3X3, size=3, arch=90, vec_in=16, vec_out=16)
    assert_lean(found)
    assert on_tensor_cores(found, 90)
    assert "st.global.v4.b32" in found.ptx  # 16 bytes an access


@pytest.mark.parametrize(("dtype", "precision"), [("fp16", "ieee"), ("fp32", "tf32"), ("fp32", "ieee")])
def test_the_other_precisions(dtype: str, precision: str) -> None:
    torch_dtype = {"fp16": torch.float16, "fp32": torch.float32}[dtype]
    config = conv.configs(128, 128, 3, torch_dtype, precision == "tf32")[0]
    found = compiled_conv(
        config, WIDE_3X3, size=3, arch=90, vec_in=16, vec_out=16, dtype=dtype, precision=precision
    )  # fmt: skip
    assert_lean(found)
    assert on_tensor_cores(found, 90) == (dtype == "fp16" or precision == "tf32")


@pytest.mark.parametrize(
    ("size", "given", "n_in", "n_out", "vec_in", "vec_out"),
    [(1, DENSE_1X1, 180, 48, 4, 16), (3, DENSE_3X3, 48, 12, 16, 4), (3, WIDE_3X3, 128, 128, 16, 16)],
)
def test_sm_80(size: int, given: set[str], n_in: int, n_out: int, vec_in: int, vec_out: int) -> None:
    for config in conv.configs(n_in, n_out, size, torch.bfloat16, False):
        found = compiled_conv(config, given, size=size, arch=80, vec_in=vec_in, vec_out=vec_out)
        assert_lean(found)
        assert on_tensor_cores(found, 80)


@pytest.mark.parametrize("arch", [80, 90])
def test_affine_relu(arch: int) -> None:
    pointers = {"p_x", "p_y", "p_scale", "p_shift", "p_residual", "p_sum"}
    found = compiled(
        affine._affine_relu_kernel, pointers, {"RELU": True, "VEC": 16, "BLOCK_P": 64, "BLOCK_C": 64}, arch=arch
    )  # fmt: skip
    assert_lean(found)
    assert found.registers <= 96  # five blocks of 128 threads and more: it lives on loads in flight
    assert "ld.global.v4.b32" in found.ptx and "st.global.v4.b32" in found.ptx
    assert "max.NaN.f32" in found.ptx
