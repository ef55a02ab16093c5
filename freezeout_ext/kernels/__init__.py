"""Triton kernels on channels-last images, each beside its PyTorch reference of the same name + `_reference`.

Importing this package needs Triton: CUDA builds of torch bring it, for the interpreter (TRITON_INTERPRET=1, CPU
tensors) install the version that this torch was released with.
"""

from .affine import (
    affine_relu,
    affine_relu_avg_pool2x2,
    affine_relu_avg_pool2x2_reference,
    affine_relu_reference,
)
from .choice import choices, choose, chosen, tolerance
from .conv import Config, configs, conv2d, conv2d_reference
from .layout import DTYPES, Rows, look_alike

__all__ = [
    "DTYPES",
    "Config",
    "Rows",
    "affine_relu",
    "affine_relu_avg_pool2x2",
    "affine_relu_avg_pool2x2_reference",
    "affine_relu_reference",
    "choices",
    "choose",
    "chosen",
    "configs",
    "conv2d",
    "conv2d_reference",
    "look_alike",
    "tolerance",
]
