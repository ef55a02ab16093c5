"""Parameters under a fused optimizer and again under torch's for-loop: stepped together, compared bit for bit."""

import itertools

import torch
from torch import nn

from freezeout_ext import FusedAdam, FusedAdamW, FusedSGD
from freezeout_ext.fused.compiled import same_layout

TORCHS = {FusedSGD: torch.optim.SGD, FusedAdamW: torch.optim.AdamW, FusedAdam: torch.optim.Adam}


def grid(**values):
    return [dict(zip(values, chosen, strict=True)) for chosen in itertools.product(*values.values())]


SGD_GRID = [
    options
    for options in grid(
        momentum=(0, 0.9), dampening=(0, 0.3), nesterov=(False, True), weight_decay=(0, 0.01), maximize=(False, True)
    )
    # Nesterov needs momentum, and no dampening.
    if not (options["nesterov"] and (options["momentum"] == 0 or options["dampening"]))
]
ADAM_GRID = grid(
    betas=((0.9, 0.999), (0.5, 0.6), (0.0, 0.9)),
    eps=(1e-8, 1e-2),
    weight_decay=(0, 0.1),
    amsgrad=(False, True),
    maximize=(False, True),
)


def twins(cls, shapes, dtype=torch.float32, device="cpu", **options):
    """The same parameters twice, in a group each: under `cls` and under torch's for-loop."""
    start = [torch.randn(shape).to(dtype) for shape in shapes]
    made = []
    for kind, more in ((cls, {}), (TORCHS[cls], {"foreach": False})):
        groups = [{"params": [nn.Parameter(t.to(device, copy=True))]} for t in start]
        defaults = {"lr": 0.1, "momentum": 0.9} if cls is FusedSGD else {"lr": 0.1}
        made.append(kind(groups, **defaults | options | more))
    return made


def params_of(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"]]


def set_gradients(*optimizers, which=None):
    """Equal gradients for all; none for the parameters i for which not which(i)."""
    for i, params in enumerate(zip(*map(params_of, optimizers), strict=True)):
        gradient = torch.randn_like(params[0]) if which is None or which(i) else None
        for p in params:
            p.grad = None if gradient is None else gradient.clone()


def step_both(ours, theirs, steps=1, which=None):
    for _ in range(steps):
        set_gradients(ours, theirs, which=which)
        ours.step()
        theirs.step()
        assert_equal(ours, theirs)


def assert_equal(ours, theirs):
    """Parameters and states, bit for bit; NaN where the other is."""
    for i, (p, q) in enumerate(zip(params_of(ours), params_of(theirs), strict=True)):
        assert_same(p, q, f"parameter {i}")
        assert (p in ours.state) == (q in theirs.state), f"state {i}"
        a, b = ours.state.get(p, {}), theirs.state.get(q, {})
        assert list(a) == list(b), f"state {i}"
        for name, value in b.items():
            assert_same(a[name], value, f"{name} {i}")


def assert_same(a, b, what):
    assert same_layout(a, b), what
    if not torch.equal(a, b):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True, msg=what)


def assert_within_one_rounding(found, expected):
    # Half a unit in the last place: eps / 2 relative, in the subnormals half of the smallest one; float's own
    # roundings, 2^-22 of terms below 8, may tip a tie.
    info = torch.finfo(found.dtype)
    allowed = expected.abs() * info.eps / 2 + info.smallest_normal * info.eps / 2 + 8 * 2**-22
    assert ((found.double() - expected).abs() <= allowed).all()
