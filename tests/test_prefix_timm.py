"""The frozen prefix of timm models: exact to the bit, folded within its tolerance, norms folded into convolutions."""

import copy

import pytest
import torch
import torch.nn.functional as F
from prefix_cases import assert_within_perturbation, pair
from timm_models import MISSING, importable_timm

from freezeout_ext.layers import find_layers
from freezeout_ext.prefix.judge import TOLERANCE

if MISSING:
    pytest.skip(MISSING, allow_module_level=True)

# A small variant of each, and whether a norm of it folds into a convolution.
MODELS = {
    "resnet18": ({"channels": (8, 8, 12, 16)}, True),
    "resnetv2_50": ({"layers": (1, 1, 1, 1), "channels": (16, 32, 32, 48), "stem_chs": 8}, True),
    "convnext_atto": ({"depths": (1, 1, 2, 1), "dims": (8, 8, 16, 16)}, False),
    "mobilenetv3_small_050": ({}, True),
    "efficientnet_lite0": ({}, True),
    "regnetx_002": ({}, True),
    "tinynet_e": ({}, True),
    "densenet121": ({"growth_rate": 4, "block_config": (2, 2, 2)}, True),
    "vit_tiny_patch16_224": ({"depth": 4, "img_size": 32, "patch_size": 8, "embed_dim": 24, "num_heads": 3}, False),
}


@pytest.fixture(scope="module")
def timm():
    with importable_timm() as module:
        yield module


def step(model: torch.nn.Module, seed: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    x, y = torch.randn(4, 3, 32, 32), torch.randint(10, (4,))
    model.zero_grad()
    output = model(x)
    loss = F.cross_entropy(output, y)
    loss.backward()
    found = {"output": output.detach(), "loss": loss.detach()}
    found |= {f"gradient of {n}": p.grad for n, p in model.named_parameters() if p.grad is not None}
    return found | {n: b.clone() for n, b in model.named_buffers()}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("mode", ["exact", "folded"])
def test_a_timm_model_at_frontiers_from_end_to_end(timm, name, mode):
    arguments, folds = MODELS[name]
    torch.manual_seed(1)
    base = timm.create_model(name, pretrained=False, num_classes=10, **arguments).train()
    base(torch.randn(8, 3, 32, 32))
    count = len(find_layers(base))
    for num_frozen in sorted({1, 2, count // 2, count - 1}):
        plain, model, prefix = pair(copy.deepcopy(base), num_frozen, mode)
        for seed in range(7):
            expected, found = step(plain, seed), step(model, seed)
            assert expected.keys() == found.keys()
            for key, value in expected.items():
                assert mode == "folded" or torch.equal(value, found[key]), f"{key} at {num_frozen}"
        report = prefix.report()
        assert report.route in ("chain", "split") and report.units == report.of_units, report
        assert report.error <= TOLERANCE[mode] and report.calls > 0
        if mode == "folded":
            assert_within_perturbation(copy.deepcopy(base), plain, model, prefix, lambda net: step(net, 7))
            assert any("conv+bn" in kind for kind in report.fused) == folds or num_frozen < count - 1, report
