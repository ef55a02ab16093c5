"""What stands for a value between two units: nobody can tell it from the value, then or later."""

import math

import pytest
import torch
from prefix_cases import conv_bn, freeze
from torch import nn
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from freezeout_ext.layers import find_layers
from freezeout_ext.prefix import Prefix

MODES = pytest.mark.parametrize("mode", ["exact", "folded"])
ROUNDING = {"exact": 0.0, "folded": 1e-5}  # folding rounds each weight anew


class Block(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.body = conv_bn(channels, 4)

    def forward(self, x, mask=None, sign=0.0):
        y = self.body(x).relu() * math.copysign(1.0, sign)
        return y if mask is None else y * mask


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.head = Block(3), Block(4), Block(4), nn.Linear(4, 2)
        self.kept, self.given = [], {"mask": None, "sign": 0.0}

    def forward(self, x):
        for block in (self.a, self.b, self.c):
            x = block(x, **self.given)
            self.look(x)
        return self.head(x.mean((2, 3)))

    def look(self, x):
        pass


class Keeping(Net):
    def look(self, x):
        self.kept.append(x)


class AskingType(Net):
    def forward(self, x):
        for block in (self.a, self.b, self.c):
            x = block(x)
            x = x if type(x) is torch.Tensor and x.__class__ is torch.Tensor else x * 2
        return self.head(x.mean((2, 3)))


class Lowered(Net):
    """Of blocks that an engine computes without their modules."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Sequential(conv_bn(channels, 4), nn.ReLU()) for channels in (3, 4, 4))
        self.given = {}


def prepared(kind, mode, steps=3):
    torch.manual_seed(0)
    model = kind().train()
    layers = find_layers(model, ["a", "b", "c", "head"])
    freeze(model, 3, layers)
    prefix = Prefix(model, layers, mode=mode, measure=False)
    prefix.freeze(3)
    for _ in range(steps):
        model(images())
    assert mode == "off" or steps < 2 or prefix.report().calls
    return model, prefix


def images():
    return torch.randn(4, 3, 6, 6)


def assert_as_plain(kind, mode, run, steps=3):
    """run(model) gives with the prefix what it gives without."""
    found = [run(prepared(kind, each, steps)[0]) for each in ("off", mode)]
    torch.testing.assert_close(found[1], found[0], rtol=ROUNDING[mode], atol=ROUNDING[mode])


@MODES
@pytest.mark.parametrize("change", [{"mask": torch.full((4,), 0.5).view(4, 1, 1)}, {"sign": -0.0}, {"sign": -1}])
def test_an_argument_that_was_none_or_zero_at_the_capture_is_looked_at(change, mode):
    def run(model):
        model.given |= change
        return model(images())

    assert_as_plain(Net, mode, run)


@MODES
def test_a_tensor_at_the_capture_may_be_none_later(mode):
    def run(model):
        model.given |= {"mask": torch.full((4, 1, 1), 0.5)}
        model.train()
        found = [model(images()) for _ in range(3)]
        model.given |= {"mask": None}
        return torch.stack([*found, model(images())])

    assert_as_plain(Net, mode, run, steps=0)


def change_weights(model, prefix):
    for p in model.a.parameters():
        p.data.mul_(2)
    model.b.body[1].running_mean.data.add_(1)


@MODES
@pytest.mark.parametrize("steps", [0, 1, 2, 4])
@pytest.mark.parametrize("happens", [change_weights, lambda model, prefix: prefix.close()])
def test_a_value_that_the_model_keeps_is_that_of_its_forward(happens, steps, mode):
    values = []
    for each in ("off", mode):
        model, prefix = prepared(Keeping, each, 0)
        for _ in range(steps):
            model.kept.clear()
            model(images())
        model.kept.clear()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model(images())
            if each != "off":
                model.kept.clear()
                torch.manual_seed(1)
                model(images())
        if each == "off":
            model.kept.clear()
            torch.manual_seed(1)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                model(images())
        happens(model, prefix)
        values.append([x.clone() for x in model.kept])
    assert [x.dtype for x in values[0]] == [x.dtype for x in values[1]]
    for plain, found in zip(*values, strict=True):  # folded in bfloat16: one rounding of 2**-8 a layer
        bound = 0 if mode == "exact" else 3e-2
        torch.testing.assert_close(found, plain, rtol=bound, atol=bound)


@MODES
def test_a_model_that_asks_for_the_type_of_a_value_sees_a_tensor(mode):
    assert_as_plain(AskingType, mode, lambda model: model(images()))


class DoubledReLU(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        return found * 2 if func is torch.relu else found


class DoubledInside(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        return found * 2 if func is torch.ops.aten.relu.default else found


@MODES
@pytest.mark.parametrize("kind", [DoubledReLU, DoubledInside])
def test_a_mode_of_the_users_sees_each_operation(kind, mode):
    def run(model):
        with kind():
            return model(images())

    assert_as_plain(Lowered, mode, run)


def test_the_default_device_is_no_such_mode():
    model, prefix = prepared(Lowered, "folded")
    calls = prefix.report().calls
    with torch.device("cpu"):
        model(images())
    assert prefix.report().calls == calls + 1


@MODES
def test_a_derivative_in_forward_mode_goes_through_the_frozen_modules(mode):
    def run(model):
        x = images()
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(model(forward_ad.make_dual(x, torch.ones_like(x)))).tangent

    assert_as_plain(Lowered, mode, run)
