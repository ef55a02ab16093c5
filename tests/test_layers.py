"""find_layers: the authors' counting on the paper's nets, the grouping rules, overrides and errors."""

import pytest
import torch
from torch import nn

from freezeout_ext.layers import find_layers
from freezeout_ext.models import build_model


def names(layers):
    return [layer.name for layer in layers]


def assert_partition(model, layers):
    held = [p for layer in layers for p in layer.parameters.values()]
    assert len(held) == len(set(held))
    assert set(held) == {p for p in model.parameters() if p.requires_grad}


@pytest.mark.parametrize(("net", "last"), [("wrn-40-4", 19), ("densenet-76-12", 39), ("vgg-16", 13)])
def test_the_authors_own_counting(net, last):
    model = build_model(net)
    layers = find_layers(model)
    assert len(layers) - 1 == last
    assert_partition(model, layers)


def test_the_order_is_that_of_the_forward_pass():
    layers = find_layers(build_model("densenet-40-12"))
    parameters = [next(iter(layer.parameters)) for layer in layers]
    order = [name for name, _ in build_model("densenet-40-12").named_parameters()]
    assert [order.index(name) for name in parameters] == sorted(order.index(name) for name in parameters)


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = nn.BatchNorm1d(width)
        self.linear = nn.Linear(width, width)

    def forward(self, x):
        return x + self.linear(torch.relu(self.norm(x)))


class Stage(nn.Module):
    def __init__(self, width, depth):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))
        self.blocks = nn.Sequential(*(Block(width) for _ in range(depth)))

    def forward(self, x):
        return self.blocks(x * self.scale)


class Net(nn.Module):
    """Pre-activation: a stem with its norm, two stages, a norm that opens the head."""

    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(torch.zeros(4))
        self.stem = nn.Linear(3, 4)
        self.stem_norm = nn.BatchNorm1d(4)
        self.stages = nn.ModuleList([Stage(4, 2), Stage(4, 2)])
        self.dropout = nn.Dropout()
        self.norm = nn.LayerNorm(4)
        self.head = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Dropout(), nn.Linear(4, 2))

    def forward(self, x):
        x = self.stem_norm(self.stem(x)) + self.token
        for stage in self.stages:
            x = stage(x)
        return self.head(self.norm(self.dropout(x)))


def test_stages_open_blocks_do_not_and_norms_find_their_layer():
    model = Net()
    layers = find_layers(model)
    assert names(layers) == [
        "stem", "stages.0.blocks.0", "stages.0.blocks.1", "stages.1.blocks.0", "stages.1.blocks.1", "head",
    ]  # fmt: skip
    assert list(layers[0].modules) == ["stem", "stem_norm"]
    assert list(layers[0].parameters) == ["token", "stem.weight", "stem.bias", "stem_norm.weight", "stem_norm.bias"]
    assert "stages.1.scale" in layers[3].parameters
    assert list(layers[5].modules) == ["norm", "head"]
    assert_partition(model, layers)


def test_modules_without_parameters_go_with_the_layer_before_them_only_where_the_order_is_known():
    sequential = nn.Sequential(
        nn.Dropout(), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False), nn.ReLU(), nn.Dropout(), nn.Conv2d(4, 4, 3)
    )
    layers = find_layers(sequential)
    assert [list(layer.modules) for layer in layers] == [["0", "1", "2", "3", "4"], ["5"]]
    dropout = Net().dropout
    assert not any(isinstance(module, nn.Dropout) for layer in find_layers(Net())[:-1] for module in layer.submodules)
    assert isinstance(dropout, nn.Dropout)


def test_a_transition_in_a_flat_sequential_is_opened_by_its_norm():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(),
        nn.Sequential(Block(4), Block(4)),
        nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1), nn.AvgPool2d(2)),
        nn.Flatten(), nn.Linear(2, 2),
    )  # fmt: skip
    layers = find_layers(model)
    assert [list(layer.modules) for layer in layers] == [
        ["0", "1", "2"], ["3.0"], ["3.1"], ["4.0", "4.1", "4.2", "4.3", "5"], ["6"],
    ]  # fmt: skip


def test_plain_nets_and_transformers():
    mlp = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2))
    assert names(find_layers(mlp)) == ["0", "2", "4"]
    encoder = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(8, 2, 16, norm_first=True), 3, norm=nn.LayerNorm(8), enable_nested_tensor=False
    )
    assert names(find_layers(encoder)) == ["layers.0", "layers.1", "layers.2"]
    assert list(find_layers(encoder)[2].modules) == ["layers.2", "norm"]
    assert names(find_layers(nn.Linear(2, 2))) == ["weight"]


def test_tied_parameters_and_shared_modules_belong_to_the_last_layer_that_holds_them():
    tied = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Linear(4, 4))
    tied[3].weight = tied[0].weight
    with pytest.warns(UserWarning, match=r"0\.weight: used by several layers"):
        layers = find_layers(tied)
    assert [list(layer.parameters) for layer in layers] == [["0.bias"], ["2.weight", "2.bias"], ["0.weight", "3.bias"]]

    shared, dropout = nn.Linear(4, 4), nn.Dropout()
    model = nn.Sequential(nn.Linear(4, 4), dropout, shared, nn.Linear(4, 4), dropout, shared)
    with pytest.warns(UserWarning, match="used by several layers"):
        layers = find_layers(model)
    assert names(layers) == ["0", "3", "5"]
    assert shared in layers[2].submodules
    # The dropout still runs behind layer 3 when layer 0 freezes.
    assert dropout not in layers[0].submodules and dropout in layers[1].submodules


def test_what_the_user_froze_is_no_layer():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    assert names(find_layers(model)) == ["1", "2"]
    with pytest.raises(ValueError, match="requires_grad=True, found none"):
        find_layers(model.requires_grad_(False))


def test_overrides_by_module_name_and_wildcard():
    model = Net()
    layers = find_layers(
        model, [["stem*", "token"], model.stages[0], "stages.1.scale", "stages.1.blocks.*", ["norm", model.head]]
    )
    assert [list(layer.modules) for layer in layers] == [
        ["stem", "stem_norm"], ["stages.0"], [], ["stages.1.blocks.0", "stages.1.blocks.1"], ["norm", "head"],
    ]  # fmt: skip
    assert_partition(model, layers)


@pytest.mark.parametrize(
    ("layers", "error", "message"),
    [
        (["stem", "nothing"], ValueError, r"layers\[1\] .* nothing is called 'nothing'; top modules: stem"),
        (["stem", "stem"], ValueError, r"must not overlap, layers\[0\] holds stem and layers\[1\] stem"),
        (
            ["stages.0", "stages.0.blocks.1"],
            ValueError,
            r"layers\[0\] holds stages.0 and layers\[1\] stages.0.blocks.1",
        ),
        (["stem", "stages*", "head", "norm"], ValueError, "3 are in none: token, stem_norm.weight, stem_norm.bias"),
        ([3], TypeError, r"layers\[0\] must be a module, a name or a list of these, got int"),
        ("stem", TypeError, "layers must be a sequence with one entry a layer, got str"),
        ([nn.Linear(2, 2)], ValueError, r"layers\[0\] must be a module inside the model, got a Linear"),
    ],
)
def test_bad_overrides_are_named(layers, error, message):
    with pytest.raises(error, match=message):
        find_layers(Net(), layers)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
def test_a_scripted_model_or_layer_is_refused_by_name():
    with pytest.raises(TypeError, match="model must not be scripted or traced"):
        find_layers(torch.jit.script(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))))
    with pytest.raises(TypeError, match="layer 1 must not be scripted or traced"):
        find_layers(nn.Sequential(nn.Linear(2, 2), torch.jit.script(nn.Linear(2, 2))))


def test_the_table_shows_layer_parameters_and_modules():
    table = repr(find_layers(Net()))
    assert table.splitlines()[0].split() == ["layer", "name", "parameters", "modules"]
    assert table.splitlines()[1].split() == ["0", "stem", "28", "stem,", "stem_norm"]
    assert table.splitlines()[-1].split() == ["total", f"{sum(p.numel() for p in Net().parameters()):,}"]
