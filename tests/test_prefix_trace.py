"""Stand-ins for tensors and sizes: tensors to isinstance, and nothing that torch's own code would read as memory."""

import pytest
import torch
from prefix_cases import freeze
from torch import Tensor, nn

from freezeout_ext.layers import find_layers
from freezeout_ext.prefix import Prefix
from freezeout_ext.prefix.trace import _Tracer


def stand_in():
    return _Tracer().create_proxy("placeholder", "x0", (), {})


USES = {
    "sizes": lambda x: torch.zeros((x, 3)),
    "sizes as arguments": lambda x: torch.zeros(x, 3),
    "expand": lambda x: torch.ones(4).expand(x, -1),
    "view": lambda x: torch.ones(4).view(x, 2),
    "range": lambda x: torch.arange(x),
    "split": lambda x: torch.ones(4).split([x, 2]),
    "index": lambda x: torch.ones(4)[[x, 0]],
}


@pytest.mark.parametrize("name", USES)
def test_torchs_own_code_gets_another_stand_in_or_raises(name):
    try:
        found = USES[name](stand_in())
    except (TypeError, RuntimeError):
        return
    assert type(found).__name__.endswith("Proxy")


def test_a_stand_in_is_a_tensor_to_isinstance_alone():
    x = stand_in()
    assert isinstance(x, Tensor) and torch.is_tensor(x) and not isinstance(x, (list, tuple))
    assert [isinstance(y, (int, Tensor)) for y in (x,)] == [True]


class Positions(nn.Module):
    """Is given sizes, and makes a tensor of them."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 1)

    def forward(self, shape: tuple):
        places = torch.ones(shape).cumsum(1)
        return self.conv(torch.stack([places, places.transpose(1, 2)], 1))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.places = nn.Conv2d(3, 3, 1), Positions()

    def forward(self, x):
        batch, _, height, width = x.shape
        inside = torch.arange(x.abs().argmax() + 1).numel() > 0
        return self.conv(x) + self.places((batch, height, width)) * inside


def test_a_block_that_makes_tensors_of_sizes_and_of_values_does_not_end_the_process():
    torch.manual_seed(0)
    outputs = []
    for mode in ("off", "folded"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 3, 1), Block(), nn.Conv2d(3, 2, 1)).train()
        layers = find_layers(model, ["0", "1", "2"])
        freeze(model, 2, layers)
        prefix = Prefix(model, layers, mode=mode, measure=False)
        prefix.freeze(2)
        torch.manual_seed(1)
        outputs.append(torch.stack([model(torch.randn(4, 3, 6, 6)) for _ in range(3)]))
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-5, atol=1e-5)  # folding rounds each weight anew
    assert prefix.report().calls
