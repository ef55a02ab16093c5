"""bench/floors.py: what it counts, where the count is known."""

import pytest
import torch
from load_script import BENCH, load_script
from torch import nn

pytest.importorskip("triton", reason="Triton is not installed")


@pytest.fixture(scope="module")
def floors():
    return load_script(BENCH / "floors.py")


def test_one_convolution_and_one_relu(floors):
    conv = nn.Conv2d(3, 8, 3, padding=1, bias=False)
    x = torch.randn(floors.COUNTED, 3, 4, 4)
    with torch.no_grad():
        cost = floors.eager_cost(lambda: conv(x).relu().view(2, -1), batch=10)
    image = 10 * 4 * 4 * 4  # bytes a channel of ten images
    assert cost.launches == 2  # a view launches nothing
    assert cost.bytes == image * (3 + 8) + conv.weight.nbytes + image * (8 + 8)
    assert cost.flops == 2 * 10 * 16 * 8 * 27
    assert cost.seconds(bandwidth=1, teraflops=1e9) == pytest.approx(cost.bytes / 1e12)


def test_the_plan_of_wide_resnet(floors):
    planned, eager = floors.planned_prefix("wrn-40-4", 1.0), floors.eager_prefix("wrn-40-4", 1.0)
    assert planned.launches == 40 + 4  # and four copies
    assert planned.flops == eager.flops  # every convolution once; its affine is not counted in either
    assert 2.5 < eager.bytes / 1e9 < 3.0 and 1.0 < planned.bytes / 1e9 < 1.3


def test_a_training_step_gets_cheaper_as_it_freezes(floors):
    steps = [floors.training_step("vgg-16", fraction) for fraction in (0.0, 0.5)]
    assert steps[1][0].flops < steps[0][0].flops and steps[1][0].bytes < steps[0][0].bytes
    parameters = sum(p.numel() for p in floors.build_model("vgg-16", floors.CLASSES).parameters())
    assert steps[0][1].bytes == 20 * parameters > steps[1][1].bytes
