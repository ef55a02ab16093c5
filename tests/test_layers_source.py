"""The order that the source of forward tells, wrappers that are opened, warnings of layers that are most of a net."""

import warnings

import pytest
import torch
from torch import nn

from freezeout_ext import FreezeOut, find_layers
from freezeout_ext.source_order import run_order


def names(layers):
    return [layer.name for layer in layers]


def runs(model, *inputs):
    """One training step with the order watched."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    freezeout = FreezeOut(model, optimizer, total_steps=4, t_0=0.1, how_scale="linear")
    model(*inputs).sum().backward()
    optimizer.step()
    freezeout.step()
    freezeout.close()


class Late(nn.Module):
    """A norm that is registered before the blocks and runs behind them, a bias that is the reverse."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(4, 4)
        self.final_norm = nn.LayerNorm(4)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)) for _ in range(3))
        self.bias_of = nn.Linear(4, 4)

    def compute_bias(self, x):
        return self.bias_of(x)

    def forward(self, x):
        blocks = self.blocks
        x = self.embed(x)
        bias = self.compute_bias(x) if self.bias_of is not None else 0
        for block in blocks:
            x = block(x) + bias
        if self.final_norm is not None:
            x = self.final_norm(x)
        return x


class Turns(nn.Module):
    """Two lists whose entries run in turn."""

    def __init__(self, indexed):
        super().__init__()
        self.down = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.mix = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.indexed = indexed

    def forward(self, x):
        for down, mix in zip(self.down, self.mix, strict=True):
            x = mix(down(x))
        return x


class TurnsByIndex(Turns):
    def forward(self, x):
        for i in range(3):
            x = self.mix[i](self.down[i](x))
        return x


class Branches(nn.Module):
    """Calls its children in two places."""

    def __init__(self):
        super().__init__()
        self.b, self.a = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        if x.sum() > 0:
            return self.b(self.a(x))
        x = self.a(x)
        return self.b(x)


class Ambiguous(Branches):
    def forward(self, x):
        x = self.b(x) if x.sum() > 0 else x
        x = self.a(x)
        return self.b(x)


class Hidden(Branches):
    def forward(self, x):
        for child in self.children():
            x = child(x)
        return x


def test_the_order_of_calls_is_read_from_the_source():
    assert run_order(Late(), ["embed", "final_norm", "blocks", "bias_of"]) == [
        ("embed",), ("bias_of",), ("blocks",), ("final_norm",),
    ]  # fmt: skip
    assert run_order(Turns(0), ["down", "mix"]) == [("down", "mix")]
    assert sorted(run_order(TurnsByIndex(0), ["down", "mix"])[0]) == ["down", "mix"]
    for unclear in (Branches(), Ambiguous(), Hidden()):
        assert run_order(unclear, ["b", "a"]) is None
    assert run_order(nn.Linear(2, 2), []) == []


def test_layers_come_in_that_order_and_run_in_it():
    assert names(find_layers(Late())) == ["embed", "bias_of", *(f"blocks.{i}.{j}" for i in range(3) for j in range(2))]
    assert list(find_layers(Late())[-1].modules) == ["blocks.2.1", "final_norm"]
    for model in (Late(), Turns(0), TurnsByIndex(0)):
        runs(model, torch.randn(2, 4))
    assert names(find_layers(Turns(0))) == ["down.0", "mix.0", "down.1", "mix.1", "down.2", "mix.2"]


class ConvNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.norm(self.conv(x))


class Residual(nn.Module):
    """Two equal convolutions in a list: a block all the same."""

    def __init__(self):
        super().__init__()
        self.shortcut = ConvNorm()
        self.layer = nn.Sequential(ConvNorm(), ConvNorm())

    def forward(self, x):
        y = self.layer(x)
        return y + self.shortcut(x)


class Residuals(nn.Module):
    def __init__(self):
        super().__init__()
        self.stages = nn.ModuleList(nn.Sequential(Residual(), Residual()) for _ in range(2))

    def forward(self, x):
        for stage in self.stages:
            x = stage(x)
        return x


def test_a_residual_block_of_equal_convolutions_is_one_layer():
    model = Residuals()
    assert names(find_layers(model)) == ["stages.0.0", "stages.0.1", "stages.1.0", "stages.1.1"]
    runs(model, torch.randn(2, 4, 3, 3))


class Wrapper(nn.Module):
    def __init__(self, net, head=None):
        super().__init__()
        self.model, self.head = net, head or nn.Identity()

    def forward(self, x):
        return self.head(self.model(x))


class Deep(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(*(nn.Linear(4, 4) for _ in range(6)))

    def forward(self, x):
        return self.features(x)


@pytest.mark.parametrize("head", [None, nn.Linear(4, 2)])
@pytest.mark.parametrize("depth", [1, 3])
def test_a_net_inside_wrappers_is_opened(head, depth):
    model = Deep()
    for _ in range(depth):
        model = Wrapper(model)
    model = Wrapper(model, head)
    prefix = "model." * (depth + 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = names(find_layers(model))
    assert found == [f"{prefix}features.{i}" for i in range(6)] + (["head"] if head else [])
    runs(model, torch.randn(2, 4))


def test_few_layers_and_a_layer_that_is_most_of_the_net_are_a_warning_with_the_way_to_divide_it():
    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.decoder = nn.LSTM(4, 4), Hidden()

    with pytest.warns(
        UserWarning, match=r"only 2 layers were found \(encoder, decoder\), .*'decoder\.b', 'decoder\.a'"
    ):
        find_layers(Whole())
    with pytest.warns(UserWarning, match=r"layer 1 holds 9\d% of the trainable parameters .*its modules have no parts"):
        find_layers(nn.Sequential(nn.Conv1d(4, 4, 1), nn.LSTM(4, 20), nn.Linear(4, 4), nn.Linear(4, 2)))
    with pytest.warns(UserWarning, match=r"layer body holds .* with its parts in its place: 'body\.b', 'body\.a'"):
        model = nn.ModuleDict(
            {"stem": nn.Linear(1, 1), "body": Hidden(), "neck": nn.Linear(1, 1), "head": nn.Linear(1, 1)}
        )
        find_layers(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        find_layers(Whole(), ["encoder", "decoder"])  # as the user wants it
        find_layers(nn.Sequential(nn.Linear(2, 2), nn.Linear(9, 9), nn.Linear(2, 2)))  # of several alike
