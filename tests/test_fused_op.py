"""fused_sgd_ and fused_adamw_, the ops: against their references, under opcheck, their errors; and torch.compile."""

import shutil

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from freezeout_ext import FusedAdam, FusedAdamW, FusedSGD, native
from freezeout_ext.fused import fused_adamw_, fused_adamw_reference_, fused_sgd_, fused_sgd_reference_

pytestmark = pytest.mark.skipif(native.C is None, reason=f"no compiled half: {native.import_error}")

OPS = {"sgd": (fused_sgd_, fused_sgd_reference_), "adamw": (fused_adamw_, fused_adamw_reference_)}
OPTIONS = [
    ("sgd", {}),
    ("sgd", {"momentum": 0.9}),
    ("sgd", {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1}),
    ("sgd", {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1, "maximize": True}),
    ("adamw", {}),
    ("adamw", {"amsgrad": True, "maximize": True, "weight_decay": 0.1}),
    ("adamw", {"decoupled": False, "weight_decay": 0.1, "beta1": 0.3, "beta2": 0.5, "eps": 1e-3}),
]
LISTS = {"sgd": 3, "adamw": 6}


def arguments(formula="sgd", dtype=torch.float32, amsgrad=True):
    """Lists of parameters, gradients, states and steps, layer_of, lrs."""
    shapes = [(5,), (0,), (33, 40)]
    params, grads, first = ([torch.randn(s, dtype=dtype) for s in shapes] for _ in range(3))
    if formula == "sgd":
        return params, grads, first, [0, 1, 1], [0.1, 0.2]
    squares, largest = ([torch.rand_like(p) for p in params] for _ in range(2))
    steps = [torch.tensor(float(i)) for i in range(len(params))]
    return params, grads, first, squares, largest if amsgrad else [], steps, [0, 1, 1], [0.1, 0.2]


def copied(given, formula):
    return [[t.clone() for t in tensors] for tensors in given[: LISTS[formula]]] + list(given[LISTS[formula] :])


def assert_equal(a, b, formula):
    for ours, theirs in zip(a[: LISTS[formula]], b[: LISTS[formula]], strict=True):
        assert all(torch.equal(x, y) for x, y in zip(ours, theirs, strict=True))


@pytest.mark.usefixtures("exact_square_roots")
@pytest.mark.parametrize(("formula", "options"), OPTIONS, ids=str)
@pytest.mark.parametrize("scale", [None, 4.0, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_equals_the_reference(dtype, scale, formula, options):
    ours = arguments(formula, dtype, options.get("amsgrad", False))
    theirs = copied(ours, formula)
    scales = (None if scale is None else torch.tensor(scale), torch.tensor(0.0))
    op, reference = OPS[formula]
    op(*ours, *scales, **options)
    reference(*theirs, *scales, **options)
    assert_equal(ours, theirs, formula)


@pytest.mark.parametrize("formula", OPS)
def test_found_inf_leaves_everything(formula):
    ours = arguments(formula)
    before = copied(ours, formula)
    options = {"momentum": 0.9} if formula == "sgd" else {"amsgrad": True}
    OPS[formula][0](*ours, torch.tensor(2.0), torch.tensor(2.0), **options)
    assert_equal(ours, before, formula)


@pytest.mark.parametrize("formula", OPS)
def test_rates_in_one_tensor_take_the_place_of_numbers(formula):
    one = arguments(formula, amsgrad=False)
    other = copied(one, formula)
    OPS[formula][0](*one)
    OPS[formula][0](*other[:-1], [9.0, 9.0], None, None, torch.tensor(one[-1], dtype=torch.float64))
    assert_equal(one, other, formula)


def test_opcheck():
    scales = torch.tensor(2.0), torch.tensor(0.0)
    rates = torch.tensor([0.1, 0.2], dtype=torch.float64)
    torch.library.opcheck(fused_sgd_, arguments(), {"momentum": 0.9, "nesterov": True})
    params, grads, _, *rest = arguments()
    torch.library.opcheck(fused_sgd_, (params, grads, [], *rest, *scales))
    torch.library.opcheck(fused_adamw_, arguments("adamw"), {"amsgrad": True})
    torch.library.opcheck(fused_adamw_, (*arguments("adamw", amsgrad=False), *scales, rates))


def test_an_empty_list():
    fused_sgd_([], [], [], [], [])


ERRORS = {
    "grads must have one entry for each of 3 parameters, got 2": lambda p, g, b, of, lrs: (p, g[1:], b, of, lrs),
    "momentum_buffers must have one entry for each of 3 parameters, got 0": lambda p, g, b, of, lrs: (
        p, g, [], of, lrs,
    ),
    "layer_of must ascend within 0..1, got [1, 0, 0]": lambda p, g, b, of, lrs: (p, g, b, [1, 0, 0], lrs),
    "layer_of must ascend within 0..0, got [0, 1, 1]": lambda p, g, b, of, lrs: (p, g, b, of, lrs[1:]),
    "params must share dtype and device, got torch.float64 on cpu (parameter 1)": lambda p, g, b, of, lrs: (
        [p[0], p[1].double(), p[2]], g, b, of, lrs,
    ),
    "params must be dense and of a floating dtype, got torch.float32, strides (80, 2) (2)": lambda p, g, b, of, lrs: (
        [*p[:2], torch.randn(33, 80)[:, ::2]], g, b, of, lrs,
    ),
    "params, states and steps must not share memory": lambda p, g, b, of, lrs: ([p[2][0, :5], *p[1:]], g, b, of, lrs),
    "params, states and steps must not share": lambda p, g, b, of, lrs: (p, g, [b[2][0, :5], *b[1:]], of, lrs),
    "grads must not share memory with params, states or steps (group 0)": lambda p, g, b, of, lrs: (
        p, [b[2][0, :5], *g[1:]], b, of, lrs,
    ),
    "gradients that are unscaled must not share memory": lambda p, g, b, of, lrs: (
        p, [g[2][0, :5], *g[1:]], b, of, lrs, torch.tensor(2.0),
    ),
    "grads must be laid out as their parameters, got strides (1, 33) (2)": lambda p, g, b, of, lrs: (
        p, [*g[:2], torch.randn(40, 33).t()], b, of, lrs,
    ),
}  # fmt: skip


@pytest.mark.parametrize("message", ERRORS)
def test_errors_say_what_and_where(message):
    with pytest.raises(ValueError) as caught:
        fused_sgd_(*ERRORS[message](*arguments()), momentum=0.9)
    assert message in str(caught.value)


def test_counters_elsewhere_are_errors():
    given = list(arguments("adamw"))
    given[5] = [step.double() for step in given[5]]
    with pytest.raises(ValueError, match=r"steps must be one float32 each on cpu, got torch\.float64"):
        fused_adamw_(*given, amsgrad=True)


@pytest.mark.usefixtures("exact_square_roots")
@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1)], ids=["number", "tensor"])
@pytest.mark.parametrize(
    ("cls", "judge", "options"),
    [
        (FusedSGD, torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
        (FusedAdamW, torch.optim.AdamW, {"amsgrad": True}),
        (FusedAdam, torch.optim.Adam, {"weight_decay": 0.1}),
    ],
)
def test_torch_compile_runs_the_op_in_one_graph(cls, judge, options, lr):
    torch._dynamo.reset()
    runs = []
    start = [torch.randn(shape) for shape in ((3, 4), (5,), ())]
    for make in (cls, judge):
        params = [nn.Parameter(t.clone()) for t in start]
        more = {} if make is cls else {"foreach": False}
        runs.append((params, make([{"params": [p]} for p in params], lr=lr, **options, **more)))
    counter = CompileCounterWithBackend("eager")
    step = torch.compile(runs[0][1].step, backend=counter, fullgraph=True)
    for _ in range(3):
        for p, q in zip(runs[0][0], runs[1][0], strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        step()
        runs[1][1].step()
        for p, q in zip(runs[0][0], runs[1][0], strict=True):
            # With a rate in a float32 tensor AdamW's loop computes in float what the op does in double.
            tolerance = 1e-6 if isinstance(lr, torch.Tensor) and cls is not FusedSGD else 0
            torch.testing.assert_close(p, q, rtol=tolerance, atol=tolerance)
    assert counter.frame_count == 1
    called = [
        str(node.target) for graph in counter.graphs for node in graph.graph.nodes if "freezeout" in str(node.target)
    ]
    assert called == ["freezeout_ext.fused_sgd_.default" if cls is FusedSGD else "freezeout_ext.fused_adamw_.default"]
    assert runs[0][1].native_report() == {}


BACKENDS = ["eager", "inductor" if shutil.which("g++") else "aot_eager"]  # the former goes through the latter
KINDS = {
    "SGD": (FusedSGD, torch.optim.SGD, {"momentum": 0.9}),
    "AdamW": (FusedAdamW, torch.optim.AdamW, {"amsgrad": True}),
    "SGD with dampening": (FusedSGD, torch.optim.SGD, {"momentum": 0.9, "dampening": 0.5}),
}


@pytest.mark.parametrize(
    ("kind", "backend"),
    [*((kind, backend) for kind in ("SGD", "AdamW") for backend in BACKENDS), ("SGD with dampening", "eager")],
)
def test_compiled_steps_are_torch_s_whatever_the_op_takes(kind, backend):
    """Groups that mix what the op takes with a transposed gradient, a strided and a transposed parameter."""
    torch._dynamo.reset()
    cls, judge, options = KINDS[kind]
    start = [torch.randn(4, 3), torch.randn(3), torch.randn(6, 5), torch.randn(8, 2)[:, 0], torch.randn(5, 2).t()]
    runs = []
    for make in (cls, judge):
        params = [nn.Parameter(torch.empty_strided(t.shape, t.stride()).copy_(t)) for t in start]
        groups = [{"params": params[:1]}, {"params": params[1:4], "lr": 0.2}, {"params": params[4:]}]
        runs.append((params, make(groups, lr=0.1, foreach=False, **options)))
    (ours, optimizer), (theirs, torchs) = runs
    step = torch.compile(optimizer.step, backend=backend)
    for count in range(4):
        for i, (p, q) in enumerate(zip(ours, theirs, strict=True)):
            # The second parameter's first gradient comes late.
            p.grad = None if i == 1 and count == 0 else torch.empty_like(p).copy_(torch.randn(p.shape))
            if i == 2:
                p.grad = torch.randn(5, 6).t()
            q.grad = None if p.grad is None else p.grad.clone()
        step()
        torchs.step()
        for p, q in zip(ours, theirs, strict=True):
            # Traced, torch's loop may round a product and its sum apart, and AdamW's takes powers of the step in float:
            # 1e-5 of a step of 0.2.
            torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
            a, b = optimizer.state.get(p, {}), torchs.state.get(q, {})
            assert a.keys() == b.keys()
            for name in a:
                torch.testing.assert_close(a[name], b[name], rtol=1e-5, atol=1e-6)
    assert list(optimizer.native_report()) == [f"group {i}, parameter {j}" for i, j in ((1, 1), (1, 2), (2, 0))]
    assert "as the traced op needs it" in optimizer.native_report()["group 2, parameter 0"]


@pytest.mark.parametrize(("kind", "backend"), [*(("SGD", backend) for backend in BACKENDS), ("AdamW", "eager")])
def test_compiled_steps_update_parameters_that_share_memory_one_after_the_other(kind, backend):
    """Two that overlap across groups, beside one in each group that the op takes."""
    torch._dynamo.reset()
    cls, judge, options = KINDS[kind]
    base, values = torch.randn(10), [torch.randn(4), torch.randn(3, 3)]
    runs = []
    for make in (cls, judge):
        memory = base.clone()
        alone, other_alone = [nn.Parameter(t.clone()) for t in values]
        params = [alone, nn.Parameter(memory[:6]), nn.Parameter(memory[4:]), other_alone]
        runs.append((params, make([{"params": params[:2]}, {"params": params[2:]}], lr=0.1, foreach=False, **options)))
    (ours, optimizer), (theirs, torchs) = runs
    counter = CompileCounterWithBackend(backend)
    step = torch.compile(optimizer.step, backend=counter)
    for count in range(4):
        for i, (p, q) in enumerate(zip(ours, theirs, strict=True)):
            # Without it the next one comes first among those that have a gradient.
            p.grad = None if i == 0 and count == 2 else torch.randn_like(p)
            q.grad = None if p.grad is None else p.grad.clone()
        step()
        torchs.step()
        for p, q in zip(ours, theirs, strict=True):
            # As above: traced, torch's loop may round a product and its sum apart.
            torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
    calls = [node for graph in counter.graphs for node in graph.graph.nodes if "freezeout" in str(node.target)]
    assert [len(call.args[0]) for call in calls] == [2, 1]  # all gradients; without the first
    reason = "it or a state of it shares memory with others"
    assert optimizer.native_report() == {"group 0, parameter 1": reason, "group 1, parameter 0": reason}


def test_parameters_that_come_to_share_memory_after_the_trace_are_an_error():
    torch._dynamo.reset()
    params = [nn.Parameter(torch.randn(4)) for _ in range(2)]
    optimizer = FusedSGD(params, lr=0.1)
    step = torch.compile(optimizer.step, backend="eager")
    for p in params:
        p.grad = torch.ones(4)
    step()
    memory = torch.zeros(6)
    params[0].data, params[1].data = memory[:4], memory[2:]
    # What torch traced does not restore the grad mode when an op raises.
    with torch.enable_grad(), pytest.raises(ValueError, match="params, states and steps must not share memory"):
        step()
    assert not memory.any()
