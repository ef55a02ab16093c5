"""What the Triton kernels compile to for sm_90, no GPU needed: python bench/machine_code.py

Registers and shared memory of each candidate of three convolutions of the paper's nets and of the affine kernel, by the
compiler that tests/test_kernels_compile.py uses.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import test_kernels_compile as compiler

from freezeout_ext.kernels import affine, conv

CONVS = {
    "1x1, 180 -> 48, BN-ReLU prologue": (1, compiler.DENSE_1X1, 180, 48, 4, 16),
    "3x3, 48 -> 12, into a slice": (3, compiler.DENSE_3X3, 48, 12, 16, 4),
    "3x3, 128 -> 128, two outputs": (3, compiler.WIDE_3X3, 128, 128, 16, 16),
}


def row(name: str, blocks: str, found: compiler.Compiled) -> str:
    product = "wgmma" if "wgmma.mma_async" in found.ptx else "mma" if "mma.sync" in found.ptx else "-"
    return f"| {name} | {blocks} | {found.registers} | {found.shared / 1024:.0f} | {found.stack} | {product} |"


def main() -> None:
    print("| kernel, bfloat16 | block, stages | registers | shared, KiB | stack, bytes | product |")
    print("|---|---|---|---|---|---|")
    for name, (size, given, n_in, n_out, vec_in, vec_out) in CONVS.items():
        for config in conv.configs(n_in, n_out, size, torch.bfloat16, False):
            found = compiler.compiled_conv(config, given, size=size, arch=90, vec_in=vec_in, vec_out=vec_out)
            blocks = f"{config.block_p}x{config.block_k}x{config.block_c}, {config.num_stages}"
            blocks += ", through L1" * (config.max_vector < vec_in)
            print(row(name, blocks, found))
    pointers = {"p_x", "p_y", "p_scale", "p_shift", "p_residual", "p_sum"}
    constants = {"RELU": True, "VEC": 16, "BLOCK_P": 64, "BLOCK_C": 64}
    print(
        row(
            "affine+ReLU, add, sum",
            "64x64",
            compiler.compiled(affine._affine_relu_kernel, pointers, constants, arch=90),
        )
    )


if __name__ == "__main__":
    main()
