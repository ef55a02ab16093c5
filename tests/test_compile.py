"""torch.compile: layer by layer two graphs a transition, frozen layers without a backward, and never silently eager."""

import inspect
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.backends.common import aot_autograd

from freezeout_ext.freezeout import FreezeOut
from freezeout_ext.integrations.compile import CompiledLayers

TOTAL_STEPS = 20
SCHEDULE = {"total_steps": TOTAL_STEPS, "t_0": 0.3, "how_scale": "linear"}


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.norm = nn.BatchNorm1d(width)

    def forward(self, x):
        return x + F.relu(self.norm(self.linear(x)))


class Breaking(Block):
    def forward(self, x):
        torch._dynamo.graph_break()
        return super().forward(x)


def net(depth=3, block=Block):
    torch.manual_seed(0)
    blocks = [block(6) for _ in range(depth)]
    return nn.Sequential(nn.Linear(4, 6), *blocks, nn.Sequential(nn.ReLU(), nn.Linear(6, 3)))


def train(model, optimizer, freezeout, steps, on_step=lambda step: None):
    for step in steps:
        generator = torch.Generator().manual_seed(1000 + step)
        inputs, targets = torch.randn(5, 4, generator=generator), torch.randint(0, 3, (5,), generator=generator)
        F.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
        optimizer.zero_grad()
        on_step(step)
        freezeout.step()


def controlled(model, **schedule):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return optimizer, FreezeOut(model, optimizer, **{**SCHEDULE, **schedule})


class CountedRuns:
    """A backend that counts runs of forward and backward graphs."""

    def __init__(self):
        self.forwards = self.backwards = 0

    def __call__(self, graph, inputs):
        return aot_autograd(fw_compiler=self._counting("forwards"), bw_compiler=self._counting("backwards"))(
            graph, inputs
        )

    def _counting(self, name):
        from functorch.compile import make_boxed_func

        def compiler(graph, inputs):
            def run(*arguments):
                setattr(self, name, getattr(self, name) + 1)
                return graph(*arguments)

            return make_boxed_func(run)

        return compiler


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_each_transition_takes_a_backward_graph_out_of_the_step_and_the_weights_stay_those_of_eager():
    eager = net()
    train(eager, *controlled(eager), range(TOTAL_STEPS))

    model = net()
    optimizer, freezeout = controlled(model)
    backend = CountedRuns()
    compiled = CompiledLayers(freezeout, backend=backend)
    assert list(compiled.blocks) == ["1", "2", "3", "4"] and "single Linear" in compiled.left_out["0"]
    backwards = {}

    def on_step(step):
        assert backend.forwards == 4  # every block ran compiled, frozen or not
        backwards.setdefault(freezeout.num_frozen, set()).add(backend.backwards)
        backend.forwards = backend.backwards = 0

    train(model, optimizer, freezeout, range(TOTAL_STEPS), on_step)
    # Layer 0 is a bare Linear and stays eager.
    assert backwards == {0: {4}, 1: {4}, 2: {3}, 3: {2}, 4: {1}}
    # Equal blocks share a graph; then the frozen one and the one at the frontier.
    assert compiled.graphs == {0: 2, 1: 1, 2: 1, 3: 0, 4: 1}
    for name, value in eager.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-5, atol=1e-6, msg=name)  # float32, fused
    assert "frozen" in repr(compiled)


def test_more_transitions_than_torchs_limit_stay_compiled():
    model = net(depth=12)
    optimizer, freezeout = controlled(model)
    backend = CountedRuns()
    compiled = CompiledLayers(freezeout, backend=backend)
    before = torch._dynamo.config.recompile_limit

    def on_step(step):
        assert backend.forwards == 13
        backend.forwards = 0

    train(model, optimizer, freezeout, range(TOTAL_STEPS), on_step)
    assert len(freezeout.transitions) > 8 > sum(compiled.graphs.values())
    assert torch._dynamo.config.recompile_limit == before


def test_a_graph_break_is_an_error_unless_allowed():
    model = net(block=Breaking)
    optimizer, freezeout = controlled(model)
    compiled = CompiledLayers(freezeout, backend="eager")
    with pytest.raises(torch._dynamo.exc.Unsupported):
        train(model, optimizer, freezeout, [0])
    compiled.close()
    train(model, optimizer, freezeout, [0])

    model = net(block=Breaking)
    optimizer, freezeout = controlled(model)
    CompiledLayers(freezeout, backend="eager", fullgraph=False)
    train(model, optimizer, freezeout, [0])


@pytest.mark.skipif(
    "recompile_limit" not in inspect.signature(torch.compile).parameters,
    reason="this torch has one limit for the whole process",
)
def test_a_limit_that_is_reached_is_an_error_not_eager():
    model = net()
    optimizer, freezeout = controlled(model)
    CompiledLayers(freezeout, backend="eager", recompile_limit=1)
    with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
        train(model, optimizer, freezeout, range(TOTAL_STEPS))


def test_a_model_compiled_as_a_whole_is_unwrapped_and_warned_about_only_beyond_the_limit():
    limit = torch._dynamo.config.recompile_limit
    with pytest.warns(UserWarning, match=f"eager for good.*max_transitions={limit - 2} .*CompiledLayers"):
        _, freezeout = controlled(torch.compile(net(depth=limit)))
    assert not any(name.startswith("_orig_mod") for layer in freezeout.layers for name in layer.parameters)
    in_place = net(depth=limit)
    in_place.compile(backend="eager")
    with pytest.warns(UserWarning, match="eager for good"):
        controlled(in_place)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        controlled(torch.compile(net(depth=limit)), max_transitions=limit - 2)
        controlled(net(depth=limit))


def test_a_whole_compiled_model_within_the_limit_follows_each_transition():
    model = net()
    backend = CountedRuns()
    whole = torch.compile(model, backend=backend)
    optimizer, freezeout = controlled(whole, max_transitions=2)
    eager = net()
    train(eager, *controlled(eager, max_transitions=2), range(TOTAL_STEPS))
    ran = []
    train(
        whole, optimizer, freezeout, range(TOTAL_STEPS), lambda step: ran.append((backend.forwards, backend.backwards))
    )
    assert ran == [(step + 1, step + 1) for step in range(TOTAL_STEPS)]  # never eager
    for name, value in eager.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-5, atol=1e-6, msg=name)


def test_a_layer_that_is_compiled_already_is_refused():
    model = net()
    _, freezeout = controlled(model)
    model[1].compile(backend="eager")
    with pytest.raises(ValueError, match="must not be compiled already, 1 is"):
        CompiledLayers(freezeout, backend="eager")


class Rows(nn.Module):
    """Blocks that are plain Sequentials: their layers hold the leaves."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU()) for _ in range(4))
        self.head = nn.Linear(3, 2)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((2, 3)))


def test_sequentials_of_leaves_are_compiled_as_blocks():
    model = Rows()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    freezeout = FreezeOut(model, optimizer, total_steps=8, t_0=0.3, how_scale="linear")
    compiled = CompiledLayers(freezeout, backend="eager")
    assert list(compiled.blocks) == [f"blocks.{i}" for i in range(4)] and list(compiled.left_out) == ["head"]
    for _ in range(8):
        model(torch.randn(2, 3, 4, 4)).pow(2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        freezeout.step()
    assert freezeout.num_frozen == 4 and sum(compiled.graphs.values()) > 1


def test_layers_without_a_block_are_a_warning():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    freezeout = FreezeOut(model, torch.optim.SGD(model.parameters(), lr=0.1), total_steps=8)
    with pytest.warns(UserWarning, match=r"no layer holds a block that could be compiled: 0 \(a single Linear"):
        CompiledLayers(freezeout, backend="eager")
