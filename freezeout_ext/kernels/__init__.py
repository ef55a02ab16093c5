"""Triton kernels on channels-last images, each beside its PyTorch reference of the same name + `_reference`.

Importing this package needs Triton: CUDA builds of torch bring it, for the interpreter (TRITON_INTERPRET=1, CPU
tensors) install the version that this torch was released with.
"""

from .affine import affine_relu, affine_relu_reference
from .choice import choices, choose, tolerance
from .conv import Config, configs, conv2d, conv2d_reference
from .layout import DTYPES, Rows

__all__ = [
    "DTYPES",
    "Config",
    "Rows",
    "affine_relu",
    "affine_relu_reference",
    "choices",
    "choose",
    "configs",
    "conv2d",
    "conv2d_reference",
    "tolerance",
]
