"""What the simulated device runs in place of kernels: host_kernel.cpp's (the optimizers'), references (Triton's)."""

import inspect
from collections.abc import Callable
from typing import Any

import host_module
import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from freezeout_ext.kernels import affine, choice, conv

from .graphs import record_launch


def replace() -> None:
    """Puts the twins in the kernels' places, for the rest of the process."""
    conv._conv_kernel = _Kernel(conv._conv_kernel, _conv)
    affine._affine_relu_kernel = _Kernel(affine._affine_relu_kernel, _affine_relu)
    choice.LAUNCHES = choice.ROUNDS = 1  # nothing is timed here
    host_module.kernel().freezeout_record(_record_update)


class _Kernel:
    """kernel[grid](*args): its arguments by name to a function that reads and writes the same memory."""

    def __init__(self, kernel: Any, twin: Callable[[dict[str, Any]], None]) -> None:
        self._signature, self._twin = inspect.signature(kernel.fn), twin

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        assert all(n > 0 for n in grid), f"CUDA error: invalid configuration argument, grid {grid}"

        def launch(*args: Any, **kwargs: Any) -> None:
            with _disable_current_modes(), torch.no_grad():
                names = self._signature.parameters
                self._twin(self._signature.bind(*args, **{n: v for n, v in kwargs.items() if n in names}).arguments)

        def run(*args: Any, **kwargs: Any) -> None:
            if not record_launch(launch, args, kwargs):
                launch(*args, **kwargs)

        return run


def _image(given: dict[str, Any], name: str, n: int, c: int, h: int, w: int) -> Tensor | None:
    """The kernel's argument p_NAME with skip_NAME and stride_NAME as [N, C, H, W]."""
    base, skip, stride = (given[f"{part}_{name}"] for part in ("p", "skip", "stride"))
    if base is None:
        return None
    return base.as_strided((n, c, h, w), (h * w * stride, 1, w * stride, stride), skip)


def _conv(given: dict[str, Any]) -> None:
    h, w = given["height_out"], given["width_out"]
    n = given["n_pixels"] // (h * w)
    x = _image(given, "x", n, given["n_in"], given["height"], given["width"])
    y, residual, second = (_image(given, name, n, given["n_out"], h, w) for name in ("y", "residual", "second"))
    prologue = None if given["p_in_scale"] is None else (given["p_in_scale"], given["p_in_shift"])
    conv.conv2d_reference(
        x, given["p_weight"], out=y, stride=given["STRIDE"], prologue=prologue, bias=given["p_bias"], residual=residual,
        relu=given["RELU"], second=None if second is None else (given["p_scale"], given["p_shift"], second),
    )  # fmt: skip


def _affine_relu(given: dict[str, Any]) -> None:
    x, y, residual, total = (
        _image(given, name, given["n_pixels"], given["n_channels"], 1, 1) for name in ("x", "y", "residual", "sum")
    )
    affine.affine_relu_reference(
        x, given["p_scale"], given["p_shift"], out=y, residual=residual, out_sum=total, relu=given["RELU"]
    )


fails_next = False  # a test's wish


@host_module.Recorder
def _record_update(number: int, device: int, stream: int) -> int:
    """What becomes of an optimizer's launch."""
    if device != 0:
        return host_module.NO_DEVICE
    current = torch.cuda.current_stream().cuda_stream
    # An exception would not leave this function.
    if fails_next or stream != current:
        return host_module.FAILS
    recorded = record_launch(host_module.kernel().freezeout_run, (number,), {})
    return host_module.RECORDED if recorded else host_module.RUN_NOW
