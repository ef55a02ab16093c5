"""Layers of real timm models by their own group_matcher: all parameters, in the order of execution, through a run."""

import runpy
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from timm_models import MISSING, importable_timm

from freezeout_ext.freezeout import FreezeOut
from freezeout_ext.layers import find_layers

if MISSING:
    pytest.skip(MISSING, allow_module_level=True)


@pytest.fixture(scope="module")
def timm():
    with importable_timm() as module:
        yield module


MODELS = {
    "resnet18": ({}, 10, ["conv1", "layer1.0"], ["layer4.1", "fc"]),
    "convnext_atto": ({}, 14, ["stem", "stages.0.blocks.0"], ["stages.3.blocks.1", "head"]),
    "vit_tiny_patch16_224": ({"depth": 3, "img_size": 32}, 5, ["patch_embed", "blocks.0"], ["blocks.2", "head"]),
    "efficientnet_b0": ({}, 18, ["conv_stem", "blocks.0"], ["blocks.6", "classifier"]),
}


@pytest.mark.parametrize("name", MODELS)
def test_layers_of_a_timm_model_train_to_the_end(timm, name):
    arguments, count, first, last = MODELS[name]
    model = timm.create_model(name, num_classes=3, **arguments)
    layers = find_layers(model)
    names = [layer.name for layer in layers]
    assert len(names) == count and names[:2] == first and names[-2:] == last
    held = [p for layer in layers for p in layer.parameters.values()]
    assert len(held) == len({id(p) for p in held}) and {*map(id, held)} == {*map(id, model.parameters())}

    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    freezeout = FreezeOut(model, optimizer, total_steps=4, t_0=0.5, how_scale="linear", layers=layers)
    inputs, targets = torch.randn(2, 3, 32, 32), torch.tensor([0, 1])
    for _ in range(4):  # the first one checks the order of execution
        before = [p.clone() for p in held[: len(layers[0].parameters)]] if freezeout.num_frozen else None
        F.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
        optimizer.zero_grad()
        freezeout.step()
        assert before is None or all(map(torch.equal, before, held))
    assert freezeout.num_frozen == count - 1 and before is not None
    assert [p.requires_grad for p in held] == [p in set(layers[-1].parameters.values()) for p in held]


def test_the_example_fine_tunes_on_an_image_folder(timm, tmp_path, monkeypatch, capsys):
    image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    for name, level in {"dark": 40, "light": 200}.items():
        (tmp_path / name).mkdir()
        for i in range(16):
            image.new("RGB", (20, 24), (level + i, level, level)).save(tmp_path / name / f"{i}.png")
    example = Path(__file__).parent.parent / "examples" / "timm_finetune.py"
    arguments = [str(tmp_path), "--size", "32", "--epochs", "4", "--model", "resnet10t"]
    monkeypatch.setattr(sys, "argv", [str(example), *arguments])
    runpy.run_path(str(example), run_name="__main__")
    printed = capsys.readouterr().out
    assert "epoch 4" in printed and "5 of 6 frozen" in printed


@pytest.mark.parametrize(
    ("name", "least", "arguments"),
    [
        ("coat_lite_tiny", 13, {"img_size": 64}),  # modules shared among blocks
        ("pvt_v2_b0", 12, {}),  # groups that are whole stages
        ("lcnet_050", 12, {}),
    ],
)
@pytest.mark.filterwarnings("ignore:.*used by several layers")
def test_shared_modules_and_stages_are_divided_in_the_order_of_execution(name, least, arguments):
    with importable_timm() as timm:
        model = timm.create_model(name, num_classes=5, **arguments)
        layers = find_layers(model)
    assert len(layers) >= least
    held = [p for layer in layers for p in layer.parameters.values()]
    assert len(held) == len(set(held)) and set(held) == set(model.parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    freezeout = FreezeOut(model, optimizer, total_steps=10, t_0=0.1, how_scale="linear", layers=layers)
    model(torch.randn(2, 3, 64, 64)).sum().backward()
    optimizer.step()
    freezeout.step()
    assert freezeout.num_frozen == 1
