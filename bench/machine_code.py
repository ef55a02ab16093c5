"""What the Triton kernels compile to for sm_90, no GPU needed: python bench/machine_code.py

Registers and shared memory of each candidate of three convolutions of the paper's nets and of the affine kernel.
tests/test_kernels_compile.py holds them to limits.
"""

import re
import subprocess
import tempfile
from dataclasses import dataclass

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from freezeout_ext.kernels import affine, conv

DENSE_1X1 = {"p_in_scale", "p_in_shift", "p_bias"}  # conv1(relu(bn1(x))) of a bottleneck, bn2 folded
DENSE_3X3: set[str] = set()  # conv2, into a slice of 12 channels
WIDE_3X3 = {"p_bias", "p_residual", "p_scale", "p_shift", "p_second"}  # conv2 + shortcut, and relu(bn(.)) of it
VECTORS = {"p_scale", "p_shift", "p_bias", "p_in_scale", "p_in_shift"}

CONVS = {
    "1x1, 180 -> 48, BN-ReLU prologue": (1, DENSE_1X1, 180, 48, 4, 16),
    "3x3, 48 -> 12, into a slice": (3, DENSE_3X3, 48, 12, 16, 4),
    "3x3, 128 -> 128, two outputs": (3, WIDE_3X3, 128, 128, 16, 16),
}


@dataclass
class Compiled:
    registers: int
    stack: int
    shared: int
    ptx: str


def compiled(
    kernel, given: set[str], constants: dict, *, arch: int, dtype: str = "bf16", num_stages: int = 3
) -> Compiled:
    """What the launch of `kernel` compiles to, where the pointers in `given` are present and aligned to 16 bytes."""
    signature, constexprs, attributes = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants or (name.startswith("p_") and name not in given):
            signature[name], constexprs[(i,)] = "constexpr", constants.get(name)
        elif name.startswith("p_"):
            signature[name] = "*fp32" if name in VECTORS else f"*{dtype}"
            attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "i32"
    source = ASTSource(kernel, signature, constexprs, attributes)
    options = {"num_warps": 4, "num_stages": num_stages}
    binary = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = (int(re.search(rf"{word}:(\d+)", usage)[1]) for word in ("REG", "STACK"))
    return Compiled(registers, stack, binary.metadata.shared, binary.asm["ptx"])


def compiled_conv(
    config: conv.Config, given: set[str], *, size: int, arch: int, vec_in: int, vec_out: int, dtype: str = "bf16",
    precision: str = "ieee",
) -> Compiled:  # fmt: skip
    constants = {
        "KERNEL": size, "STRIDE": 1, "RELU": True, "PRECISION": precision, "UPCAST": False,
        "VEC_IN": vec_in, "VEC_OUT": vec_out,
        "BLOCK_P": config.block_p, "BLOCK_K": config.block_k, "BLOCK_C": config.block_c,
    }  # fmt: skip
    pointers = given | {"p_x", "p_weight", "p_y"}
    return compiled(conv._conv_kernel, pointers, constants, arch=arch, dtype=dtype, num_stages=config.num_stages)


def row(name: str, blocks: str, found: Compiled) -> str:
    product = "wgmma" if "wgmma.mma_async" in found.ptx else "mma" if "mma.sync" in found.ptx else "-"
    return f"| {name} | {blocks} | {found.registers} | {found.shared / 1024:.0f} | {found.stack} | {product} |"


def main() -> None:
    print("| kernel, bfloat16 | block, stages | registers | shared, KiB | stack, bytes | product |")
    print("|---|---|---|---|---|---|")
    for name, (size, given, n_in, n_out, vec_in, vec_out) in CONVS.items():
        for config in conv.configs(n_in, n_out, size, torch.bfloat16, False):
            found = compiled_conv(config, given, size=size, arch=90, vec_in=vec_in, vec_out=vec_out)
            blocks = f"{config.block_p}x{config.block_k}x{config.block_c}, {config.num_stages}"
            print(row(name, blocks, found))
    pointers = {"p_x", "p_y", "p_scale", "p_shift", "p_residual", "p_sum"}
    constants = {"RELU": True, "VEC": 16, "BLOCK_P": 64, "BLOCK_C": 64}
    found = compiled(affine._affine_relu_kernel, pointers, constants, arch=90)
    print(row("affine+ReLU, add, sum", "64x64", found))


if __name__ == "__main__":
    main()
