"""The numbers of FusedSGD: bit-equal to torch.optim.SGD's for-loop in float32 and float64, half types rounded once."""

import pytest
import torch
from fused_cases import SGD_GRID, assert_within_one_rounding, params_of, set_gradients, step_both, twins
from torch import nn

from freezeout_ext import FusedSGD, native

# Around vectors of 4, 8 and 16, the unscaling block of 1024, the chunk of 8192, and two threads' least of 2 * 16384.
SIZES = [0, 1, 3, 7, 8, 9, 15, 16, 17, 1023, 1024, 1025, 8191, 8192, 8193, 40000]


@pytest.mark.parametrize("isa", native.C.cpu_isas() if native.C else [])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_equals_the_for_loop_over_the_option_grid(dtype, isa):
    used = native.C.cpu_isa()
    native.C.use_cpu_isa(isa)
    try:
        for options in SGD_GRID:
            sizes = SIZES[:-3] if isa == "baseline" else SIZES
            ours, theirs = twins(FusedSGD, [(n,) for n in sizes], dtype, **options)
            step_both(ours, theirs, steps=3 if isa == "baseline" else 20)
            assert ours.native_report() == {}
    finally:
        native.C.use_cpu_isa(used)


def test_threads_split_tensors_and_change_nothing():
    ours, theirs = twins(FusedSGD, [(50_000,), (3,), (0,), (70_001,)], weight_decay=0.1)
    torch.set_num_threads(3)
    try:
        step_both(ours, theirs, steps=3)
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", SGD_GRID, ids=str)
def test_half_types_are_rounded_once(dtype, options):
    ours, _ = twins(FusedSGD, [(33,), (2000,)], dtype, lr=0.1, **options)
    if options["momentum"] and options["dampening"]:  # a first step with dampening is torch's, which rounds more often
        set_gradients(ours)
        ours.step()
    for _ in range(3):
        # In double from what is stored: nothing but the stores may round (and float inside, 1e-7 of the terms).
        before = [
            (p.double(), ours.state[p].get("momentum_buffer") if p in ours.state else None) for p in params_of(ours)
        ]
        before = [(p, None if b is None else b.double()) for p, b in before]
        set_gradients(ours)
        ours.step()
        for p, (p0, b0) in zip(params_of(ours), before, strict=True):
            d = (-p.grad if options["maximize"] else p.grad).double() + options["weight_decay"] * p0
            b = d if b0 is None else options["momentum"] * b0 + (1 - options["dampening"]) * d
            u = d if options["momentum"] == 0 else d + options["momentum"] * b if options["nesterov"] else b
            assert_within_one_rounding(p, p0 - 0.1 * u)
            if options["momentum"]:
                assert_within_one_rounding(ours.state[p]["momentum_buffer"], b)
            assert not torch.equal(p.double(), p0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_half_pattern_survives_a_load_and_a_store(dtype):
    bits = torch.arange(-(2**15), 2**15).to(torch.int16)
    p = nn.Parameter(bits.view(dtype).clone())
    p.grad = torch.zeros_like(p)
    FusedSGD([p], lr=0.5).step()
    nan = bits.view(dtype).isnan()
    assert torch.equal(p.detach()[~nan], bits.view(dtype)[~nan])
    assert p.detach()[nan].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_stores_round_as_torch_does(dtype):
    # p = -(-2 * g): the product is float(2 g), rounded once; ties, subnormals and overflow among them.
    lr = 1 + 2**-9
    g = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    g = g[~g.isnan()]
    p = nn.Parameter(torch.zeros_like(g))
    p.grad = g.clone()
    FusedSGD([p], lr=lr).step()
    assert torch.equal(p.detach(), (-lr * g.float()).to(dtype))
