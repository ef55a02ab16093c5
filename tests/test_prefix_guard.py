"""What a frozen module relies on: any change of it, by any route, is noticed at the next call."""

import copy
import enum
import functools
import random
import types
from dataclasses import dataclass, field

import hypothesis.strategies as st
import numpy
import pytest
import torch
from hypothesis import given, settings
from prefix_cases import conv_bn, freeze, one_step
from torch import get_num_threads, nn

from freezeout_ext.layers import find_layers
from freezeout_ext.prefix import Prefix
from freezeout_ext.prefix.guard import Guard
from freezeout_ext.prefix.judge import Refused

FACTOR = [1.0]


def doubled(x):
    return x * 2


def halved(x):
    return x / 2


@dataclass
class Cfg:
    shift: float = 0.25
    table: dict = field(default_factory=lambda: {"power": [1, 2]})


class Block(nn.Module):
    """Reads attributes of every kind."""

    level = 0.5

    def __init__(self, channels, out):
        super().__init__()
        self.body = conv_bn(channels, out)
        self.act = nn.ReLU()
        self.gain, self.kind, self.norms, self.extra, self.post = 1.0, "soft", [1.0, 2.0], None, doubled
        self.pair, self.cfg, self.space = (1, [2]), Cfg(), types.SimpleNamespace(t=1.0)
        self.register_buffer("offset", torch.full((1,), 0.1))
        self.loose = torch.full((1,), 0.2)

    def helper(self, x):
        return x + self.level

    def forward(self, x):
        x = self.act(self.body(x)) * self.gain * self.norms[0] + self.offset + self.loose
        if self.kind == "hard":
            x = x * 3
        if self.extra is not None:
            x = x + self.extra
        x = self.helper(self.post(x)) * self.cfg.table["power"][0] * self.pair[1][0] + self.cfg.shift
        return x * self.space.t * FACTOR[0]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(Block(3, 4), Block(4, 4), Block(4, 5))
        self.head = nn.Linear(5, 10)

    def forward(self, x):
        return self.head(self.blocks(x).mean((2, 3)))


def data_copy(b):
    b.body[0].weight.data.copy_(b.body[0].weight.data * 1.5)


def through_numpy(b):
    b.body[0].weight.detach().numpy()[...] *= 0.5


def running_mean_data(b):
    b.body[1].running_mean.data.add_(0.5)


def in_place(b):
    with torch.no_grad():
        b.body[1].weight.mul_(2)


def loose(b):
    b.loose.data.add_(1)


def transposed(b):
    b.body[0].weight.data = b.body[0].weight.data.flip(0)


def replaced_weight(b):
    b.body[0].weight = nn.Parameter(b.body[0].weight.detach() * 3, requires_grad=False)


def loaded(b):
    b.load_state_dict({k: v * 1.25 if v.is_floating_point() else v for k, v in b.state_dict().items()})


def assigned(b):
    b.load_state_dict({k: v.clone() + 1 for k, v in b.state_dict().items()}, assign=True)
    b.requires_grad_(False)


def storage(b):
    b.body[1].bias.untyped_storage().copy_(torch.full_like(b.body[1].bias, 0.7).untyped_storage())


TENSORS = (data_copy, through_numpy, running_mean_data, in_place, loaded, storage, loose)
CHANGES = {
    "number": lambda b: setattr(b, "gain", b.gain + 1),
    "string": lambda b: setattr(b, "kind", "hard"),
    "list entry": lambda b: b.norms.__setitem__(0, 3.0),
    "list replaced": lambda b: setattr(b, "norms", [5.0]),
    "none to tensor": lambda b: setattr(b, "extra", torch.ones(1)),
    "tuple": lambda b: setattr(b, "pair", (1, [3])),
    "list in a tuple": lambda b: b.pair[1].__setitem__(0, 4),
    "function": lambda b: setattr(b, "post", halved),
    "lambda": lambda b: setattr(b, "post", lambda x: x + 1),
    "config": lambda b: setattr(b.cfg, "shift", 2.0),
    "config's dict": lambda b: b.cfg.table["power"].__setitem__(0, 2),
    "namespace": lambda b: setattr(b.space, "t", 3.0),
    "method on the instance": lambda b: setattr(b, "helper", lambda x: x - 1),
    "attribute before the class's": lambda b: setattr(b, "level", 2.0),
    "eps": lambda b: setattr(b.body[1], "eps", 0.5),
    "stride": lambda b: setattr(b.body[0], "stride", (2, 2)),
    "activation": lambda b: setattr(b, "act", nn.Sigmoid()),
    "submodule in a Sequential": lambda b: b.body.__setitem__(1, nn.Identity()),
    "submodule added": lambda b: b.body.append(nn.Tanh()),
    "inner forward": lambda b: setattr(b.act, "forward", lambda x: x * 0.1),
    "inner method": lambda b: setattr(b.body[0], "_conv_forward", lambda x, w, bias: torch.zeros_like(x[:, :1])),
    "hook": lambda b: b.body.register_forward_hook(lambda m, args, y: y + 1),
    "hook on itself": lambda b: b.register_forward_pre_hook(lambda m, args: (args[0] * 2,)),
    "mode": lambda b: setattr(b.body[1], "training", True),
    "class": lambda b: setattr(b.act, "__class__", nn.Tanh),
    **{f.__name__: f for f in (data_copy, through_numpy, running_mean_data, in_place, transposed, replaced_weight,
                               loaded, assigned, storage, loose)},
}  # fmt: skip


@settings(max_examples=15)
@given(
    st.lists(st.tuples(st.sampled_from(sorted(CHANGES)), st.integers(0, 1)), min_size=1, max_size=3, unique=True),
    st.sampled_from(["exact", "folded"]),
)
def test_whatever_changes_between_two_steps_the_modules_run_as_they_then_are(changes, mode):
    run_with_changes(changes, mode)


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("mode", ["exact", "folded"])
def test_a_change_is_noticed_at_the_next_call(name, mode):
    run_with_changes([(name, 1)], mode)


def run_with_changes(changes, mode):
    torch.manual_seed(0)
    model = Net().train()
    plain = copy.deepcopy(model)
    for net in (plain, model):
        freeze(net, 2, layers := find_layers(net))
    prefix = Prefix(model, layers, mode=mode, measure=False)
    prefix.freeze(2)
    for seed in range(3):
        one_step(plain, seed), one_step(model, seed)
    assert prefix.is_settled and prefix.report().calls
    for i, (name, block) in enumerate(changes):
        try:
            CHANGES[name](plain.blocks[block])
        except AttributeError:  # of a module that an earlier change took away
            continue
        CHANGES[name](model.blocks[block])
        sync(plain, model)
        before = prefix.report()
        expected, found = outcome(plain, 10 + i), outcome(model, 10 + i)
        if before.units == before.of_units:
            assert same(expected, found), (name, block)  # bit for bit: that call ran the modules
            live = mode == "exact" and CHANGES[name] in TENSORS  # whose engine reads them at each call
            assert prefix.report().calls == before.calls or live or not isinstance(found, dict)
        else:  # an earlier change left a block without an engine, and the other one's goes on
            assert same(expected, found, 0 if mode == "exact" else 1e-3), (name, block)
        for seed in range(3):
            sync(plain, model)
            assert same(outcome(plain, seed), outcome(model, seed), 0 if mode == "exact" else 1e-3), (name, block)


def sync(plain, model):
    """Active layers and their statistics as in the other, whatever rounding did."""
    with torch.no_grad():
        for p, q in zip((*plain.blocks[2].parameters(), *plain.blocks[2].buffers()),
                        (*model.blocks[2].parameters(), *model.blocks[2].buffers()), strict=True):  # fmt: skip
            p.copy_(q)


def outcome(net, seed):
    try:
        return one_step(net, seed)
    except Exception as error:
        return type(error)


def same(expected, found, tolerance=0.0):
    if not isinstance(expected, dict) or not isinstance(found, dict):
        return expected == found
    if tolerance:
        keys = ["loss"]
        return all((expected[k] - found[k]).abs().max() <= tolerance * expected[k].abs().max() for k in keys)
    return all(torch.equal(value, found[key]) or value.isnan().any() for key, value in expected.items())


STATE = 1.0


def by_helper(x, *, factor=1.0):
    return x * STATE * factor


class Base(nn.Module):
    gain = 1.0

    def forward(self, x):
        return self.conv(x)


class Scaled(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight * STATE, bias)


class Reader(Base):
    """Reads what is no attribute of itself."""

    def __init__(self, conv=nn.Conv2d):
        super().__init__()
        self.conv, self.norm = conv(3, 3, 1), nn.BatchNorm2d(3)
        self.conv.weight.gain = 1.0

    def forward(self, x):
        x = torch.relu(by_helper(super().forward(x))) * self.gain * abs(-1)
        return self.norm(x) * self.conv.weight.gain


STRANGE = {
    "global of a helper": lambda b, patch: patch.setitem(globals(), "STATE", 3.0),
    "global before a builtin": lambda b, patch: patch.setitem(globals(), "abs", lambda x: 3.0),
    "function of torch's": lambda b, patch: patch.setattr(torch, "relu", torch.sigmoid),
    "keyword default": lambda b, patch: patch.setattr(by_helper, "__kwdefaults__", {"factor": 3.0}),
    "code": lambda b, patch: patch.setattr(by_helper, "__code__", (lambda x, *, factor: x * 3).__code__),
    "class attribute before the base's": lambda b, patch: patch.setattr(Reader, "gain", 3.0, raising=False),
    "class's forward": lambda b, patch: patch.setattr(Reader, "forward", lambda self, x: self.conv(x) * 3),
    "base's forward": lambda b, patch: patch.setattr(Base, "forward", lambda self, x: self.conv(x) * 3),
    "forward of torch's class": lambda b, patch: patch.setattr(nn.BatchNorm2d, "forward", lambda self, x: x * 3),
    "tensor's attribute": lambda b, patch: patch.setattr(b.conv.weight, "gain", 3.0),
}


@pytest.mark.parametrize("name", STRANGE)
@pytest.mark.parametrize("mode", ["exact", "folded"])
@pytest.mark.parametrize("conv", [nn.Conv2d, Scaled])
def test_a_change_outside_of_the_module_is_noticed_at_the_next_call(name, mode, conv, monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(Reader(conv), Reader(conv), nn.Flatten(), nn.Linear(48, 2)).train()
    layers = find_layers(model, ["0", "1", "3"])
    freeze(model, 2, layers)
    prefix = Prefix(model, layers, mode=mode, measure=False)
    prefix.freeze(2)
    x = torch.randn(4, 3, 4, 4)
    for _ in range(3):
        before = model(x)
    calls = prefix.report().calls
    assert calls, prefix.report()
    STRANGE[name](model[0], monkeypatch)
    found = model(x)
    assert prefix.report().calls == calls
    prefix.close()
    assert torch.equal(found, model(x)) and not torch.allclose(found, before)


class Asks(nn.Module):
    def __init__(self, question):
        super().__init__()
        self.conv, self.question = nn.Conv2d(3, 3, 1), question

    def forward(self, x):
        return self.conv(x) * (3.0 if self.question(x) else 1.0)


QUESTIONS = {
    "size in a set": lambda x: x.shape[-1] in {6, 7},
    "size as a key": lambda x: {6: True}.get(x.size(2)),
    "memory format": lambda x: not x.is_contiguous(),
    "default dtype": lambda x: torch.get_default_dtype() == torch.float64,
}


@pytest.mark.parametrize("name", QUESTIONS)
@pytest.mark.parametrize("mode", ["exact", "folded"])
def test_an_answer_that_the_probe_had_is_not_kept(name, mode):
    model = nn.Sequential(Asks(QUESTIONS[name]), nn.Conv2d(3, 3, 1), nn.Conv2d(3, 2, 1)).train()
    layers = find_layers(model, ["0", "1", "2"])
    freeze(model, 2, layers)
    prefix = Prefix(model, layers, mode=mode, measure=False)
    prefix.freeze(2)
    for _ in range(3):
        model(torch.randn(4, 3, 4, 4))
    assert prefix.report().calls
    x = torch.randn(4, 3, 6, 6).contiguous(memory_format=torch.channels_last)
    torch.set_default_dtype(torch.float64)
    try:
        torch.testing.assert_close(model(x), copy.deepcopy(model)(x), rtol=1e-5, atol=1e-6)  # as folded rounds
    finally:
        torch.set_default_dtype(torch.float32)


def test_values_that_are_put_back_need_no_new_capture():
    """As when an average of the weights is swapped in for an evaluation."""
    model = Net().train()
    layers = freeze(model, 2)
    prefix = Prefix(model, layers, mode="folded", measure=False)
    prefix.freeze(2)
    for seed in range(3):
        one_step(model, seed)
    calls, kept = prefix.report().calls, [p.detach().clone() for p in model.parameters()]
    for p in model.parameters():
        p.data.copy_(p.data * 0.5)
    model.eval()
    with torch.no_grad():
        x = torch.randn(4, 3, 8, 8)
        assert torch.equal(model(x), copy.deepcopy(model)(x))
    assert prefix.report().calls == calls
    model.train()
    for p, value in zip(model.parameters(), kept, strict=True):
        p.data.copy_(value)
    one_step(model, 5)
    assert prefix.report().calls == calls + 1


class Keeps(nn.Module):
    def __init__(self, keep):
        super().__init__()
        self.conv, self.keep, self.seen = nn.Conv2d(3, 3, 3, padding=1), keep, []
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x):
        y = self.conv(x)
        if self.keep == "list":
            self.seen.append(y.detach())
        elif self.keep == "buffer":
            self.count.add_(1)
        return y


class KeepsAttribute(Keeps):
    def forward(self, x):
        self.feat = self.conv(x)
        return self.feat


class KeepsByHelper(Keeps):
    def note(self, y):
        object.__setattr__(self, "feat", y)

    def forward(self, x):
        y = self.conv(x)
        self.note(y)
        return y


class Draws(Keeps):
    def forward(self, x):
        draw = {"random": random.random, "numpy": numpy.random.rand}[self.keep]
        return self.conv(x) * (1.0 if draw() < 0.9 else 0.5)


class HoldsDraw(Keeps):
    def __init__(self, draw):
        super().__init__("")
        self.draw = draw

    def forward(self, x):
        return self.conv(x) * (1.0 if self.draw() < 0.9 else 0.5)


class Counts(Keeps):
    def __init__(self):
        super().__init__("")
        self.numbers = iter(range(1000))

    def forward(self, x):
        return self.conv(x) * next(self.numbers)


class Noisy(Keeps):
    def forward(self, x):
        return self.conv(x) + torch.randn(3, 1, 1)


class Prints(Keeps):
    def forward(self, x):
        if self.seen:
            print(x.shape)
        return self.conv(x)


CLOCK = functools.partial(random.uniform, 0, 1)
WRITERS = {
    "list": lambda: Keeps("list"), "buffer": lambda: Keeps("buffer"), "attribute": lambda: KeepsAttribute(""),
    "by a helper": lambda: KeepsByHelper(""), "random": lambda: Draws("random"), "numpy": lambda: Draws("numpy"),
    "bound method": lambda: HoldsDraw(random.random), "lambda": lambda: HoldsDraw(lambda: numpy.random.rand()),
    "partial": lambda: HoldsDraw(CLOCK), "iterator": Counts, "torch's": lambda: Noisy(""), "print": lambda: Prints(""),
}  # fmt: skip


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("mode", ["exact", "folded"])
def test_a_block_that_writes_or_draws_runs_as_it_is_and_the_report_says_why(name, mode):
    results = []
    for each in ("off", mode):
        random.seed(0), numpy.random.seed(0), torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 3, 1), WRITERS[name](), nn.Conv2d(3, 3, 1), nn.Flatten(), nn.Linear(192, 10))
        layers = find_layers(model.train(), ["0", "1", "2", "4"])
        freeze(model, 3, layers)
        prefix = Prefix(model, layers, mode=each, measure=False)
        prefix.freeze(3)
        losses = []
        for _ in range(5):
            loss = model(torch.randn(4, 3, 8, 8)).square().mean()
            loss.backward()
            losses.append(loss.item())
        block = model[1]
        state = len(block.seen), block.count.item(), random.random(), numpy.random.rand(), torch.rand(1).item()
        results.append((losses, state))
        feats = getattr(block, "feat", None)
        assert feats is None or (type(feats) is torch.Tensor and len(feats) == 4)
    report = prefix.report()
    assert results[0][1] == results[1][1]
    torch.testing.assert_close(results[1][0], results[0][0], rtol=0 if mode == "exact" else 1e-5, atol=0)
    assert report.units == 2 and any(line.startswith("1 runs as it is: ") for line in report.fallbacks), report


def test_what_cannot_be_compared_is_refused():
    block = Block(3, 3).eval().requires_grad_(False)
    block.handle = open(__file__)  # noqa: SIM115
    with block.handle, pytest.raises(Refused, match="attribute handle of a Block is a TextIOWrapper, which cannot be"):
        Guard(block)


STORE = {"k": 1.0}


def read_store(*_):
    return STORE["k"]


def holding(*methods):
    """An object whose class has these methods, which no code names."""
    return type("Config", (), dict.fromkeys(methods, read_store))()


class Magic(nn.Module):
    def __getattribute__(self, name):
        return STORE["k"] if name == "magic" else super().__getattribute__(name)

    def forward(self, x):
        return x * self.magic


class Described(nn.Module):
    gain = holding("__get__")

    def forward(self, x):
        return x * self.gain


class Reads(nn.Module):
    def __init__(self, how, config=None):
        super().__init__()
        self.how, self.config, self.inner = how, config, Base()

    def forward(self, x):
        return self.how(self, x)


def in_context(module, x):
    with module.config as k:
        return x * k


def appended(module, x):
    module.config.append(1.0)
    return x


def with_function(module, x):
    def double():
        return x * 2

    return double()


class Kind(enum.Enum):
    SOFT = types.SimpleNamespace(gain=1.0)


class Name(str):
    gain = 1.0


class Called(nn.Conv2d):
    def __call__(self, x):
        return super().__call__(x) * STATE


class Absent(nn.Module):
    def __getattr__(self, name):
        return STATE if name == "absent" else super().__getattr__(name)

    def forward(self, x):
        return x * self.absent


def with_attribute(module, x):
    return x * with_attribute.gain


with_attribute.gain = 1.0
HIDDEN = {
    "enum": lambda: Reads(lambda module, x: x * module.config.value.gain, Kind.SOFT),
    "text with an attribute": lambda: Reads(lambda module, x: x * module.config.gain, Name("a")),
    "call": lambda: Called(3, 3, 1).requires_grad_(False),
    "absent attribute": Absent,
    "function's attribute": lambda: Reads(with_attribute),
    "element": lambda: Reads(lambda module, x: x * module.config["k"], holding("__getitem__")),
    "number": lambda: Reads(lambda module, x: x * float(module.config), holding("__float__")),
    "truth": lambda: Reads(lambda module, x: x * (3.0 if module.config else 1.0), holding("__bool__")),
    "equality": lambda: Reads(lambda module, x: x * (module.config == 1.0), holding("__eq__", "__hash__")),
    "method": lambda: Reads(lambda module, x: x * module.config.get(), holding("get")),
    "context": lambda: Reads(in_context, 1.0),
    "descriptor": Described,
    "any attribute": Magic,
    "class": lambda: Reads(lambda module, x: x * float(Cfg().shift)),
    "attribute of a submodule's class": lambda: Reads(lambda module, x: module.inner.children().send(None)),
    "list": lambda: Reads(appended, []),
    "function": lambda: Reads(with_function),
    "closure": lambda: (lambda k: Reads(lambda module, x: x * k))(2.0),
    "text": lambda: Reads(lambda module, x: x * STORE.get(f"{x.shape[0]}", 1.0)),
    "global state": lambda: Reads(lambda module, x: x * torch.get_num_threads()),
    "global state by a global": lambda: Reads(lambda module, x: x * get_num_threads()),
    "global state by an attribute": lambda: Reads(lambda module, x: x * module.config(), get_num_threads),
    "identity": lambda: Reads(lambda module, x: x * 2 if x.is_cuda is False else x),
    "out": lambda: Reads(lambda module, x: torch.add(x, 1.0, out=module.config), torch.ones(1)),
}


@pytest.mark.parametrize("name", HIDDEN)
def test_code_outside_of_a_small_subset_of_python_is_refused(name):
    with pytest.raises(Refused):
        Guard(HIDDEN[name]().eval())


@pytest.mark.parametrize("function", [setattr, getattr, isinstance, print])
def test_a_function_that_is_known_by_its_name_must_not_have_another(function):
    class Block(nn.Module):
        def forward(self, x, renamed=function):
            return x

    with pytest.raises(Refused, match=function.__name__):
        Guard(Block().eval())
