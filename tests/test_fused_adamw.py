"""FusedAdamW and FusedAdam against torch's for-loop: equal bit for bit in float32 and float64, but for MKL's roots."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fused_cases import ADAM_GRID, assert_within_one_rounding, params_of, step_both, twins
from timm_models import MISSING, importable_timm
from torch import nn

from freezeout_ext import FusedAdam, FusedAdamW, native

pytestmark = pytest.mark.skipif(native.C is None, reason=f"no compiled half: {native.import_error}")

KINDS = [FusedAdamW, FusedAdam]
# Around vectors of 4, 8 and 16, the unscaling block of 1024 and two threads' least of 2 * 16384.
SIZES = [(), (0,), (1,), (3,), (7, 3), (16,), (17,), (1025,), (40000,)]


@pytest.mark.usefixtures("exact_square_roots")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("cls", KINDS)
@pytest.mark.parametrize("threads", [1, 2])
def test_the_option_grid_is_equal_bit_for_bit_where_square_roots_are(cls, dtype, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for options in ADAM_GRID if threads == 1 else ADAM_GRID[:2]:
            ours, theirs = twins(cls, SIZES, dtype, **options)
            step_both(ours, theirs, steps=3)
            assert ours.native_report() == {}
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("cls", KINDS)
def test_with_torch_s_own_square_roots_a_step_is_three_ulp_off_at_most(cls, dtype):
    for options in ADAM_GRID:
        ours, theirs = twins(cls, [(5000,)], dtype, **options)
        (p,), (q,) = params_of(ours), params_of(theirs)
        for _ in range(4):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
            before = q.detach().clone()
            ours.step()
            theirs.step()
            a, b = ours.state[p], theirs.state[q]
            assert all(torch.equal(a[name], b[name]) for name in b), "moments take no root"
            largest = torch.maximum(q.abs(), torch.maximum((q - before).abs(), before.abs()))
            ulp = torch.finfo(dtype).eps * 2 ** largest.log2().floor()
            assert ((p - q).abs() <= 3 * ulp).all()
            p.data.copy_(q.data)


WITHOUT_AVX512 = """
import sys
import numpy as np, torch
sys.path.insert(0, {tests!r})
import fused_cases as cases
from freezeout_ext import FusedAdamW
x = torch.rand(1 << 20)
if not np.array_equal(x.sqrt().numpy(), np.sqrt(x.numpy())):
    sys.exit("inexact roots")
for options in cases.ADAM_GRID[::5]:
    cases.step_both(*cases.twins(FusedAdamW, [(70001,)], **options), steps=5)
"""


def test_where_mkl_s_square_roots_are_exact_torch_s_own_loop_is_equal_bit_for_bit():
    """MKL's code for AVX2 takes roots of floats as IEEE 754 says; of doubles it rounds 1.5 % otherwise."""
    code = WITHOUT_AVX512.format(tests=str(Path(__file__).parent))
    environment = os.environ | {"MKL_ENABLE_INSTRUCTIONS": "AVX2"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    if "inexact roots" in done.stderr:
        pytest.skip("torch's square roots are not exact without AVX-512 either")
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cls", KINDS)
def test_half_types_are_rounded_once(cls, dtype):
    for options in ADAM_GRID[:8]:
        beta1, beta2 = options["betas"]
        ours = cls([nn.Parameter(torch.randn(2001).to(dtype))], lr=0.1, **options)
        (p,) = params_of(ours)
        for step in range(1, 4):
            # In double from what is stored: nothing but the stores may round (and float inside, 1e-7 of the terms).
            state = {name: value.double() for name, value in ours.state.get(p, {}).items()}
            p.grad = torch.randn(2001).to(dtype)
            g, p0, decay = p.grad.double(), p.detach().double(), options["weight_decay"]
            if options["maximize"]:
                g = -g
            if cls is FusedAdam:
                g = g + decay * p0
            else:
                p0 = p0 * (1 - 0.1 * decay)
            zero = torch.zeros_like(g)
            m = beta1 * state.get("exp_avg", zero) + (1 - beta1) * g
            v = beta2 * state.get("exp_avg_sq", zero) + (1 - beta2) * g * g
            largest = torch.maximum(v, state.get("max_exp_avg_sq", zero)) if options["amsgrad"] else v
            root = (largest / (1 - beta2**step)).sqrt()
            ours.step()
            assert_within_one_rounding(ours.state[p]["exp_avg"], m)
            assert_within_one_rounding(ours.state[p]["exp_avg_sq"], v)
            assert_within_one_rounding(p, p0 - 0.1 / (1 - beta1**step) * m / (root + options["eps"]))


def test_what_torch_refuses_is_refused():
    for change, error, match in (
        ({"capturable": True}, AssertionError, "capturable=True"),
        ({"amsgrad": True}, KeyError, "max_exp_avg_sq"),
    ):
        ours, theirs = twins(FusedAdamW, [(3,)])
        for optimizer in (ours, theirs):
            params_of(optimizer)[0].grad = torch.ones(3)
            optimizer.step()
            optimizer.param_groups[0].update(change)
            with pytest.raises(error, match=match):
                optimizer.step()
        assert len(ours.native_report()) == 1
    ours, _ = twins(FusedAdamW, [(4, 3)])
    params_of(ours)[0].grad = torch.ones(4, 3).to_sparse()
    with pytest.raises(RuntimeError, match="does not support sparse gradients"):
        ours.step()


@pytest.mark.usefixtures("exact_square_roots")
def test_float64_counters_go_through_torch_and_are_reported():
    ours, theirs = twins(FusedAdamW, [(3,), (4,)])
    step_both(ours, theirs)
    for optimizer in (ours, theirs):
        p = params_of(optimizer)[0]
        optimizer.state[p]["step"] = optimizer.state[p]["step"].double()
    step_both(ours, theirs, steps=2)
    assert list(ours.native_report()) == ["group 0, parameter 0"]
    assert "step must be one float32" in ours.native_report()["group 0, parameter 0"]


@pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
@pytest.mark.usefixtures("exact_square_roots")
def test_timm_s_layer_wise_decay_is_one_call():
    """The groups of docs/optimizers.md, over a tiny ViT."""
    optimizers = []
    with importable_timm():
        import timm
        from timm.optim import param_groups_layer_decay

        for cls in (FusedAdamW, torch.optim.AdamW):
            torch.manual_seed(0)
            model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=3, num_classes=5)
            groups = param_groups_layer_decay(model, weight_decay=0.05, layer_decay=0.75)
            for group in groups:
                group["lr"] = 1e-3 * group["lr_scale"]
            optimizers.append(cls(groups, lr=1e-3, **({} if cls is FusedAdamW else {"foreach": False})))
    ours, theirs = optimizers
    assert len({group["lr"] for group in ours.param_groups}) == 5
    step_both(ours, theirs, steps=2)
    assert len(ours._prepared.step.batches) == 1 and ours.native_report() == {}
