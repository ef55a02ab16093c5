"""Stand-ins for tensors and sizes: tensors to isinstance, and nothing that torch's own code would read as memory."""

from contextlib import suppress

import pytest
import torch
import torch.nn.functional as F
from prefix_cases import freeze
from torch import Tensor, nn

from freezeout_ext.layers import find_layers
from freezeout_ext.prefix import Prefix
from freezeout_ext.prefix.cpu import CpuEngine
from freezeout_ext.prefix.guard import Guard
from freezeout_ext.prefix.judge import Refused
from freezeout_ext.prefix.lower import lower_units
from freezeout_ext.prefix.trace import _Tracer

SIZES = {"10": 3.0, torch.Size((2, 6, 10, 10)): 3.0}


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


def swallowed(x):
    try:
        return x / 10 if x.max() > 20 else x
    except Exception:
        return x


def swallowed_bare(x):
    big = False
    try:
        big = bool(x.max() > 20)
    finally:
        return x / 10 if big else x  # noqa: B012


def suppressed(x):
    with suppress(Exception):
        if x.max() > 20:
            x = x / 10
    return x


def matched_class(x):
    match x:
        case Tensor():
            return x.clamp(max=20)
    return x


def matched_sizes(x):
    match x.shape:
        case (_, _, 10, 10):
            return x * 3
    return x


def added_in_place_elsewhere(x):
    y, also = x + 1.0, []
    also.append(y)
    y += 1.0 * (x.max() > 20)
    return also[0]


def added_in_place(x):
    y = also = x + 1.0
    y += 1.0 * (x > 20)
    return also


def drawn_unseen(x):
    with torch.random.fork_rng(devices=[]):
        return x + torch.randn(6, 1, 1)


REFUSED = {
    "except": swallowed,
    "finally": swallowed_bare,
    "suppress": suppressed,
    "f-string of a size": lambda x: x * SIZES.get(f"{x.shape[2]}", 1.0),
    "str of a size": lambda x: x * SIZES.get(str(x.shape[2]), 1.0),
    "match a class": matched_class,
    "match sizes": matched_sizes,
    "isinstance of a size": lambda x: x.clamp(max=20) if isinstance(x.size(2), int) else x,
    "an attribute that is None": lambda x: x.clamp(max=20) if x.grad_fn is None else x,
    "an attribute that there is not": lambda x: x.clamp(max=20) if getattr(x, "mask", None) is None else x,
    "in place on another view": lambda x: (y := x + 1.0, y.transpose(1, 2), y.narrow(1, 0, 2).relu_())[1],
    "in place by an overload": lambda x: (y := x + 1.0, torch.ops.aten.clamp_.default(y, None, 20.0))[0],
    "in place by another name": added_in_place_elsewhere,
    "random numbers unseen": drawn_unseen,
}
FORWARDS = {
    "% of a size": lambda x: x * SIZES.get("%s" % x.shape[2], 1.0),  # noqa: UP031
    "hash of a shape": lambda x: x * SIZES.get(x.shape, 1.0),
    "in place on a view": lambda x: (y := x + 1.0, F.hardtanh(y[:, :2], -20.0, 20.0, inplace=True))[0],
    "in place by another name": added_in_place,
}


class Does(nn.Module):
    def __init__(self, forward, inner=None):
        super().__init__()
        self.conv, self.bn, self.does = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), forward
        self.inner = inner

    def forward(self, x):
        return self.does(self.bn(self.conv(x)))


def assert_as_eager(unit):
    unit.eval().requires_grad_(False)
    unit.bn.running_var.fill_(0.1)
    engine = CpuEngine(lower_units(unit), dtype=torch.float32, output_dtype=torch.float32, channels_last=False)
    for size, scale in ((6, 1.0), (6, 100.0), (10, 1.0)):
        x = torch.randn(2, 3, size, size) * scale
        with torch.no_grad():
            torch.manual_seed(size)
            expected = unit(x)
            torch.manual_seed(size)
            (found,) = engine(x)
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()  # float32 rounds each weight anew


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_trace_would_answer_for_good_is_refused(name):
    with pytest.raises(Refused, match=" uses "):
        Guard(Does(REFUSED[name]).eval().requires_grad_(False))


@pytest.mark.parametrize("name", FORWARDS)
def test_an_engine_gives_what_eager_gives_for_values_and_sizes_that_the_trace_has_not_seen(name):
    assert_as_eager(Does(FORWARDS[name]))


class Clamp(nn.Module):
    def forward(self, x):
        if x.max() > 20:
            x.mul_(0.1)
        return x


class Add(nn.Module):
    def forward(self, x):
        x += 5.0 * (x.max() > 20)
        return x


class Slice(nn.Module):
    def forward(self, x):
        return x[:, 1:3]


@pytest.mark.parametrize(
    "inner", [Clamp(), Add(), nn.Sequential(Slice(), nn.ReLU6(inplace=True)), nn.Sequential(Clamp())]
)
def test_what_a_submodule_writes_into_its_input_is_seen_by_the_code_around_it(inner):
    class Around(Does):
        def forward(self, x):
            y = self.bn(self.conv(x)) + 1.0
            self.inner(y)
            return y

    assert_as_eager(Around(None, inner))


class Key(nn.Module):
    def forward(self, query, key):
        return query.clamp(max=20) if query is key else query


def test_a_value_that_is_given_twice_is_one_value_to_the_code_that_is_given_it():
    class Around(Does):
        def forward(self, x):
            y = self.bn(self.conv(x))
            return self.inner(y, y) + self.inner(y, x[:, :1])

    assert_as_eager(Around(None, Key()))


def test_an_assertion_is_part_of_the_program():
    unit = Does(lambda x: (torch._assert(x.max() < 20, "too large"), x)[1]).eval().requires_grad_(False)
    engine = CpuEngine(lower_units(unit), dtype=torch.float32, output_dtype=torch.float32, channels_last=False)
    with torch.no_grad():
        engine(torch.randn(2, 3, 6, 6))
        with pytest.raises(AssertionError, match="too large"):
            engine(torch.randn(2, 3, 6, 6) * 1e4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_times_and_angles_keep_their_width_inside_an_engine(dtype):
    """In float32 a time of 1e7 is known to 1, in bfloat16 a time of 1000 to 4."""

    class Timed(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 3)

        def forward(self, x):
            times = x.double() * 1e7 if dtype is torch.float32 else x * 1000.0
            return self.linear(torch.sin(times).float())

    unit, x = Timed().eval().requires_grad_(False), torch.rand(5, 3)
    engine = CpuEngine(lower_units(unit), dtype=dtype, output_dtype=torch.float32, channels_last=False)
    with torch.no_grad():
        (found,), expected = engine(x), unit(x)
    assert (found - expected).abs().max() <= (1e-6 if dtype is torch.float32 else 2e-2)  # the linear's own rounding
