"""The paper's nets: parameter counts, the layers' order, shapes at other sizes, names and their errors."""

from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from freezeout_ext.models import VGG, DenseNet, WideResNet, build_model, model_names


def count(model):
    return sum(p.numel() for p in model.parameters())


def conv_bn(channels, out_channels, kernel):
    return kernel * kernel * channels * out_channels + 2 * out_channels


def wrn_count(depth, width, classes):
    total, channels = 27 * 16, 16
    for out_channels in (16 * width, 32 * width, 64 * width):
        for _ in range((depth - 4) // 6):
            total += 2 * channels + conv_bn(channels, out_channels, 3) + 9 * out_channels**2
            total += channels * out_channels if channels != out_channels else 0
            channels = out_channels
    return total + 2 * channels + (channels + 1) * classes


def densenet_count(depth, growth, classes):
    channels = 2 * growth
    total = 27 * channels
    for stage in range(3):
        for _ in range((depth - 4) // 6):
            total += 2 * channels + conv_bn(channels, 4 * growth, 1) + 36 * growth**2
            channels += growth
        if stage < 2:
            total += 2 * channels + channels * (channels // 2)
            channels //= 2
    return total + 2 * channels + (channels + 1) * classes


def vgg_count(classes):
    cfg = [64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512]
    convs = sum(conv_bn(c, d, 3) for c, d in pairwise([3, *cfg]))
    return convs + 2 * 513 * 512 + 3 * 1024 + 513 * classes


# The first three rows are the FreezeOut paper's nets; the papers of the others give 36.5 M and 0.8 M.
@pytest.mark.parametrize(
    ("name", "with_10", "with_100", "formula"),
    [
        ("wrn-40-4", 8_949_210, 8_972_340, lambda c: wrn_count(40, 4, c)),
        ("densenet-76-12", 486_730, 510_040, lambda c: densenet_count(76, 12, c)),
        ("vgg-16", 15_252_426, 15_298_596, vgg_count),
        ("wrn-28-10", 36_479_194, 36_536_884, lambda c: wrn_count(28, 10, c)),
        ("wrn-16-1", 175_066, 180_916, lambda c: wrn_count(16, 1, c)),
        ("densenet-100-12", 769_162, 800_032, lambda c: densenet_count(100, 12, c)),
    ],
)
def test_parameter_counts(name, with_10, with_100, formula):
    with torch.device("meta"):
        found = [count(build_model(name, classes)) for classes in (10, 100)]
    assert found == [with_10, with_100] == [formula(10), formula(100)]


def test_resnet_18_has_its_usual_count():
    with torch.device("meta"):
        assert count(build_model("resnet-18")) == 11_173_962


SMALL = ["wrn-10-1", "densenet-10-4", "vgg-11-x0.125", "vgg-16-x0.0625", "resnet-18-x0.125"]


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize(("size", "channels", "classes"), [(4, 1, 10), (8, 1, 7), (28, 1, 2), (32, 3, 100), (40, 3, 5)])
def test_other_image_sizes(name, size, channels, classes):
    torch.manual_seed(0)
    model = build_model(name, classes, channels, size)
    out = model(torch.randn(2, channels, size, size))
    assert out.shape == (2, classes)
    out.square().sum().backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not without


@pytest.mark.parametrize("name", SMALL)
def test_images_that_are_not_square(name):
    assert build_model(name)(torch.randn(2, 3, 32, 48)).shape == (2, 10)


@pytest.mark.parametrize("name", SMALL)
def test_fx_traces_the_net(name):
    torch.manual_seed(0)
    model = build_model(name)
    inputs = torch.randn(2, 3, 32, 32)
    traced = torch.fx.symbolic_trace(model)
    assert torch.equal(traced.eval()(inputs), model.eval()(inputs))
    assert not [node for node in traced.graph.nodes if node.op == "get_attr"]


@pytest.mark.parametrize("name", SMALL)
def test_same_seed_same_weights(name):
    models = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        models.append(build_model(name).state_dict())
    assert all(torch.equal(models[0][key], models[1][key]) for key in models[0])
    assert not all(torch.equal(models[0][key], models[2][key]) for key in models[0])


@pytest.mark.parametrize("name", ["wrn-16-4", "densenet-40-12", "vgg-16-x0.5", "resnet-18-x0.5"])
def test_initialisation(name):
    torch.manual_seed(0)
    for module in build_model(name).modules():
        if isinstance(module, nn.Conv2d):
            expected = (2 / (module.kernel_size[0] ** 2 * module.out_channels)) ** 0.5
            # The standard error of a deviation from n normals is sigma / sqrt(2 n); 5 of them.
            assert module.weight.std().item() == pytest.approx(expected, rel=5 / (2 * module.weight.numel()) ** 0.5)
            assert module.bias is None
        elif isinstance(module, nn.Linear):
            assert not module.bias.any() and module.weight.any()


def children(model):
    return [type(module).__name__ for module in model]


def test_order_of_the_layers():
    assert children(DenseNet(16, 4).blocks) == ["Bottleneck"] * 2 + (["Transition"] + ["Bottleneck"] * 2) * 2
    assert children(DenseNet(76, 2).blocks).count("Bottleneck") == 36
    assert children(WideResNet(40, 1).blocks) == ["WideBlock"] * 18
    assert children(VGG(16, 0.05).features) == ["ConvUnit"] * 13
    strides = [block.conv1.stride[0] for block in WideResNet(16, 1).blocks]
    assert strides == [1, 1, 2, 1, 2, 1]


@pytest.mark.parametrize(("name", "last"), [("wrn-10-1", 4), ("densenet-10-4", 4), ("resnet-18-x0.125", 2)])
def test_last_map_of_an_image_of_16(name, last):
    model = build_model(name)
    assert model.blocks(model.stem(torch.randn(2, 3, 16, 16))).shape[2:] == (last, last)


def double(model):
    model = model.double().eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                for tensor in (module.weight, module.bias, module.running_mean):
                    tensor.normal_()
                module.running_var.uniform_(0.5, 2)
    return model


def bn_relu(bn, x):
    shape = (1, -1, 1, 1)
    scale = bn.weight / (bn.running_var + bn.eps).sqrt()
    return ((x - bn.running_mean.view(shape)) * scale.view(shape) + bn.bias.view(shape)).clamp(min=0)


def test_wide_block_is_pre_activated_and_so_is_its_projection():
    torch.manual_seed(0)
    x = torch.randn(2, 16, 8, 8, dtype=torch.float64)
    first, second = double(WideResNet(16, 2)).blocks[:2]
    for block, stride in ((first, 1), (second, 1)):
        a = bn_relu(block.bn1, x)
        shortcut = F.conv2d(a, block.shortcut.weight, stride=stride) if block is first else x
        hidden = bn_relu(block.bn2, F.conv2d(a, block.conv1.weight, stride=stride, padding=1))
        expected = shortcut + F.conv2d(hidden, block.conv2.weight, padding=1)
        torch.testing.assert_close(block(x), expected)
        x = expected


def test_bottleneck_appends_and_transition_pools_behind_its_convolution():
    torch.manual_seed(0)
    net = double(DenseNet(10, 4))
    x = torch.randn(2, 8, 8, 8, dtype=torch.float64)
    bottleneck, transition = net.blocks[:2]
    hidden = bn_relu(bottleneck.bn2, F.conv2d(bn_relu(bottleneck.bn1, x), bottleneck.conv1.weight))
    expected = torch.cat((x, F.conv2d(hidden, bottleneck.conv2.weight, padding=1)), 1)
    torch.testing.assert_close(bottleneck(x), expected)
    pooled = F.avg_pool2d(F.conv2d(bn_relu(transition.bn, expected), transition.conv.weight), 2)
    torch.testing.assert_close(transition(expected), pooled)
    assert pooled.shape == (2, 6, 4, 4)


@pytest.mark.parametrize(("size", "pools", "last"), [(32, 5, 1), (8, 3, 1), (4, 2, 1), (28, 4, 1), (64, 5, 2)])
def test_vgg_pools_while_the_image_is_larger_than_a_pixel(size, pools, last):
    model = build_model("vgg-16-x0.0625", image_size=size)
    assert sum(isinstance(unit.pool, nn.MaxPool2d) for unit in model.features) == pools
    assert model.features(torch.randn(2, 3, size, size)).shape[2:] == (last, last)


def test_every_example_of_the_help_is_a_model():
    examples = [word.strip(",:") for line in model_names() for word in line.split(": ", 2)[-1].split(", ")]
    assert "densenet-76-12" in examples and len(examples) == 9
    for name in examples:
        with torch.device("meta"):
            build_model(name)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("resnet50",), r"model must be one of wrn-DEPTH-WIDTH, .*got 'resnet50'"),
        (("wrn-16",), "got 'wrn-16'"),
        (("wrn-16-2-x0.5",), "got 'wrn-16-2-x0.5'"),
        (("WRN-16-2",), "got 'WRN-16-2'"),
        (("vgg-16-x",), "got 'vgg-16-x'"),
        (("vgg-16-x-1",), "got 'vgg-16-x-1'"),
        (("",), "got ''"),
        (("wrn-17-2",), r"model 'wrn-17-2': WRN depth must be 6n \+ 4 .*got 17"),
        (("wrn-4-2",), "model 'wrn-4-2': depth must be >= 10, got 4"),
        (("wrn-16-0",), "width must be >= 1, got 0"),
        (("densenet-41-12",), r"DenseNet-BC depth must be 6n \+ 4 .*got 41"),
        (("densenet-40-0",), "growth must be >= 1, got 0"),
        (("vgg-15",), "VGG depth must be one of 11, 13, 16, 19, got 15"),
        (("vgg-16-x0.01",), "width must be >= 0.015625 .*got 0.01"),
        (("resnet-50",), "ResNet depth must be one of 18, 34, got 50"),
        (("vgg-16", 0), "num_classes must be >= 1, got 0"),
        (("vgg-16", 10, 0), "in_channels must be >= 1, got 0"),
        (("wrn-16-1", 10, 3, 3), "image_size must be >= 4, got 3"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        build_model(*arguments)


def test_counts_must_be_whole_numbers():
    with pytest.raises(TypeError, match=r"num_classes must be a whole number, got 10\.0"):
        build_model("vgg-16", 10.0)
