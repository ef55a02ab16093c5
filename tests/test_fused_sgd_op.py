"""fused_sgd_, the op: against the reference, under opcheck, and its errors."""

import pytest
import torch

from freezeout_ext import native
from freezeout_ext.fused import fused_sgd_, fused_sgd_reference_

pytestmark = pytest.mark.skipif(native.C is None, reason=f"no compiled half: {native.import_error}")

OPTIONS = [
    {},
    {"momentum": 0.9},
    {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1},
    {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1, "maximize": True},
]


def arguments(dtype=torch.float32, device="cpu"):
    shapes = [(5,), (0,), (33, 40)]
    params, grads, buffers = ([torch.randn(s, dtype=dtype, device=device) for s in shapes] for _ in range(3))
    return params, grads, buffers, [0, 1, 1], [0.1, 0.2]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("scale", [None, 4.0, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_equals_the_reference(dtype, scale, options):
    ours = arguments(dtype)
    theirs = [[t.clone() for t in tensors] for tensors in ours[:3]] + list(ours[3:])
    scales = (None if scale is None else torch.tensor(scale), torch.tensor(0.0))
    fused_sgd_(*ours, *scales, **options)
    fused_sgd_reference_(*theirs, *scales, **options)
    for a, b in zip(ours[:3], theirs[:3], strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_found_inf_leaves_everything():
    ours = arguments()
    before = [[t.clone() for t in tensors] for tensors in ours[:3]]
    fused_sgd_(*ours, torch.tensor(2.0), torch.tensor(2.0), momentum=0.9)
    for a, b in zip(ours[:3], before, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_opcheck():
    torch.library.opcheck(fused_sgd_, arguments(), {"momentum": 0.9, "nesterov": True})
    params, grads, _, layer_of, lrs = arguments()
    torch.library.opcheck(fused_sgd_, (params, grads, [], layer_of, lrs, torch.tensor(2.0), torch.tensor(0.0)))


def test_an_empty_list():
    fused_sgd_([], [], [], [], [])


ERRORS = {
    "grads must have one entry for each of 3 parameters, got 2": lambda p, g, b, of, lrs: (p, g[1:], b, of, lrs),
    "momentum_buffers must have one entry for each of 3 parameters, got 0": lambda p, g, b, of, lrs: (
        p, g, [], of, lrs,
    ),
    "layer_of must ascend within 0..1, got [1, 0, 0]": lambda p, g, b, of, lrs: (p, g, b, [1, 0, 0], lrs),
    "layer_of must ascend within 0..0, got [0, 1, 1]": lambda p, g, b, of, lrs: (p, g, b, of, lrs[1:]),
    "params must share dtype and device, got torch.float64 on cpu (parameter 1)": lambda p, g, b, of, lrs: (
        [p[0], p[1].double(), p[2]], g, b, of, lrs,
    ),
    "params must be dense and of a floating dtype, got torch.float32, strides (80, 2) (2)": lambda p, g, b, of, lrs: (
        [*p[:2], torch.randn(33, 80)[:, ::2]], g, b, of, lrs,
    ),
    "grads must be laid out as their parameters, got strides (1, 33) (2)": lambda p, g, b, of, lrs: (
        p, [*g[:2], torch.randn(40, 33).t()], b, of, lrs,
    ),
}  # fmt: skip


@pytest.mark.parametrize("message", ERRORS)
def test_errors_say_what_and_where(message):
    with pytest.raises(ValueError) as caught:
        fused_sgd_(*ERRORS[message](*arguments()), momentum=0.9)
    assert message in str(caught.value)
