"""What is no part of a prefix, or ceases to be one: the modules compute as without one, and the report says why."""

import copy
import time

import prefix_cases
import pytest
import torch
from prefix_cases import freeze, images, one_step
from torch import nn

from freezeout_ext.layers import find_layers
from freezeout_ext.prefix import Prefix


class Block(nn.Module):
    """A convolution, what a subclass makes of it, and how a model calls it."""

    gain = 1.0

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.act = nn.ReLU()

    def forward(self, x):
        return self.act(self.conv(x))

    def called(self, x):
        return self(x)


class Model(nn.Module):
    def __init__(self, block, stem):
        super().__init__()
        self.stem, self.block, self.last, self.head = stem, block, nn.Conv2d(4, 4, 1), nn.Linear(4, 10)

    def forward(self, x):
        return self.head(self.last(self.block.called(self.stem(x))).mean((2, 3)))


def frozen(block, names=("stem", "block", "last", "head")):
    """-> a model with plain freezing, one with a prefix, and that prefix. All layers but the head are frozen."""
    torch.manual_seed(0)
    stem = nn.Conv2d(3, 4, 1) if "stem" in names else nn.ConstantPad3d((0, 0, 0, 0, 0, 1), 0.5)
    model, count = Model(block, stem).train(), len(names) - 1
    plain = copy.deepcopy(model)
    layers = [freeze(net, count, find_layers(net, list(names))) for net in (plain, model)][1]
    prefix = Prefix(model, layers, mode="folded", measure=False)
    prefix.freeze(count)
    return plain, model, prefix


def same_steps(plain, model, count=5):
    for seed in range(count):
        plain.load_state_dict(model.state_dict())
        expected, found = one_step(plain, seed), one_step(model, seed)
        torch.testing.assert_close(found["loss"], expected["loss"], rtol=1e-4, atol=0)  # folding


class Appends(Block):
    def forward(self, xs):
        xs += [self.conv(xs[0])]
        return self.act(xs[0])

    def called(self, x):
        return self(xs := [x]) + xs[1]


class WritesInput(Block):
    def forward(self, x):
        x *= 2
        return self.conv(x)


class WritesFirstInput(Block):
    def forward(self, x, side):
        side += 1
        return self.conv(x) + side

    def called(self, x):
        return self(x, torch.ones(4, 1, 1))


class GivenNumbers(Block):
    def forward(self, channels):
        return self.conv(torch.ones(1, channels, 2, 2))

    def called(self, x):
        return x + self(x.shape[1]).mean()


class GivenSubclass(Block):
    def called(self, x):
        return self(nn.Parameter(x.detach(), requires_grad=False))


class GivenObject(Block):
    def forward(self, x, past):
        return self.conv(x)

    def called(self, x):
        return self(x, ModelCache())


class ModelCache:
    """As Transformers' caches of keys and values are named."""


class ReturnsInput(Block):
    def forward(self, x):
        return self.conv(x), x

    def called(self, x):
        y, x = self(x)
        return x + y


class ReturnsTwo(Block):
    def forward(self, x):
        y = self.conv(x)
        return y, y * 2

    def called(self, x):
        return sum(self(x))


class ChangedBehindItsCall(Block):
    def forward(self, x):
        return self.conv(x) * self.gain

    def called(self, x):
        y = self(x)
        self.gain = 2.0 if self.gain == 1.0 else 1.0
        return y


class Imports(Block):
    def forward(self, x):
        import colorsys

        return self.conv(x) * colorsys.rgb_to_hsv(1, 1, 1)[2]


class ReadsClock(Block):
    def forward(self, x):
        return self.conv(x) * (1 if time.time() > 0 else 2)


class HoldsSparse(Block):
    def __init__(self):
        super().__init__()
        self.table = torch.eye(2).to_sparse()

    def forward(self, x):
        return self.conv(x) * self.table.to_dense()[0, 0]


class HoldsOther(Block):
    def __init__(self):
        super().__init__()
        self.other = [nn.Conv2d(4, 4, 1)]

    def forward(self, x):
        return self.conv(x) + self.other[0](x).detach()


class ReadsModule(Block):
    def forward(self, x):
        return self.conv(x) * len(prefix_cases.NETS)


class Recurrent(Block):
    def __init__(self):
        super().__init__()
        self.conv = nn.GRU(16, 16, batch_first=True)

    def forward(self, x):
        return self.conv(x.flatten(0, 1))[0].unflatten(0, x.shape[:2])


def compiled():
    block = Block()
    block.conv.compile(backend="eager")
    return block


REASONS = {
    Appends: "called with a list, which it may change",
    WritesInput: "it changes its input in place",
    WritesFirstInput: "it changes its input in place",
    GivenNumbers: "no tensor is given",
    GivenSubclass: "called with something else than plain tensors",
    GivenObject: "called with a ModelCache; a cache of keys and values is written to: pass use_cache=False",
    ReturnsInput: "it returns the value that it was given",
    ReturnsTwo: "it returns 2 tensors",
    ChangedBehindItsCall: "the model changes it behind its call",
    Imports: "uses IMPORT_NAME",
    ReadsModule: "is the module prefix_cases",
    ReadsClock: "is the module time",
    HoldsSparse: "is a Tensor, torch.sparse_coo",
    HoldsOther: "is a module outside of it",
    Recurrent: "a GRU computes other bits without a graph",
    compiled: "a Conv2d is compiled",
}


@pytest.mark.parametrize("make", REASONS, ids=lambda make: make.__name__)
def test_a_block_runs_as_it_is_and_the_report_says_why(make):
    plain, model, prefix = frozen(make())
    same_steps(plain, model)
    report = prefix.report()
    assert any(line.startswith("block runs as it is") and REASONS[make] in line for line in report.fallbacks), report
    assert report.units == 2 and report.calls


class View(Block):
    def forward(self, x):
        return x.view_as(x)


def test_a_chain_whose_output_shares_memory_with_its_input_is_not_used():
    plain, model, prefix = frozen(View(), ["block", ["last", "head"]])
    same_steps(plain, model)
    assert prefix.report().fallbacks == ("block not used: its output shares memory with its input",)


class Switched(Block):
    by = 1.0

    def forward(self, x, gain=1.0, side=None):
        return self.conv(x) * gain if side is None else self.conv(x) + side

    def called(self, x):
        return self(x, self.by) if type(self.by) is float else self(x, side=x.mean())


@pytest.mark.parametrize("by", [2.0, None])
@pytest.mark.parametrize("first", [True, False])
def test_a_unit_that_is_called_otherwise_than_at_the_capture_runs_as_it_is(first, by):
    plain, model, prefix = frozen(Switched(), ["block", "last", "head"] if first else ["stem", "block", "last", "head"])
    same_steps(plain, model, 3)
    calls = prefix.report().calls
    assert calls
    model.block.by = plain.block.by = by
    same_steps(plain, model)
    model.block.by = plain.block.by = 1.0
    same_steps(plain, model)


METHODS = {
    "forward": lambda b: setattr(b.act, "forward", lambda x: torch.relu(x).clamp(max=5)),
    "another": lambda b: setattr(b.conv, "_conv_forward", lambda x, w, bias: nn.functional.conv2d(
        x.clamp(-5, 5), w, bias, padding=1)),
    "copied": lambda b: setattr(b, "act", Clamped(inplace=True)),
}  # fmt: skip


class Clamped(nn.ReLU):
    def forward(self, x):
        return super().forward(x).clamp_(max=5)


@pytest.mark.parametrize("name", METHODS)
def test_what_a_module_of_torchs_does_is_not_known_by_its_class_where_a_method_was_replaced(name):
    """On the probe the replaced method gives what the class's gives."""
    block = Block()
    METHODS[name](block)
    plain, model, prefix = frozen(block)
    same_steps(plain, model, 3)
    assert prefix.report().calls
    large = 1e3 * images()
    plain.load_state_dict(model.state_dict())
    torch.testing.assert_close(model(large), plain(large), rtol=1e-4, atol=1e-4)


class ReadsNumber(Block):
    def forward(self, x):
        return self.conv(x) * self.factor


def test_an_equal_number_is_no_change_and_a_missing_one_is():
    block = ReadsNumber()
    block.factor = 1000.5
    plain, model, prefix = frozen(block)
    same_steps(plain, model, 3)
    calls = prefix.report().calls
    model.block.factor = float("1000.5")
    same_steps(plain, model, 1)
    assert prefix.report().calls == calls + 1
    del model.block.factor
    with pytest.raises(AttributeError, match="factor"):
        model(images())


OTHER: list[torch.Tensor] = []


class Pair(Block):
    def forward(self, x, side):
        return self.conv(x) + side

    def called(self, x):
        return self(x, OTHER[0] if OTHER else x)


def test_two_arguments_that_were_one_tensor_at_the_capture_may_differ_later(monkeypatch):
    plain, model, prefix = frozen(Pair(), ["block", "last", "head"])
    same_steps(plain, model, 3)
    calls = prefix.report().calls
    assert calls
    monkeypatch.setitem(globals(), "OTHER", [torch.zeros(6, 4, 16, 16)])
    same_steps(plain, model, 1)
    assert prefix.report().calls == calls
