"""torch's own optimizer inputs and errors, those of SGD, put to FusedSGD."""

import copy
import pickle
import warnings
from unittest import mock

import pytest
import torch
from torch import nn

from freezeout_ext import FusedSGD

pytest.importorskip("expecttest", reason="torch's test helpers import it")
# Its import would forbid the whole process to set torch.backends flags, as the training loop does in other tests.
with mock.patch.object(torch.backends, "disable_global_flags"):
    from torch.testing._internal.common_optimizers import optim_db

SGD_INFO = next(info for info in optim_db if info.optim_cls is torch.optim.SGD)
INFO = copy.copy(SGD_INFO)
INFO.optim_cls = FusedSGD
INPUTS = {i.desc: i.kwargs for i in INFO.optim_inputs_func(device="cpu")}
ERRORS = {e.optimizer_error_input.desc: e for e in INFO.optim_error_inputs_func(device="cpu", dtype=torch.float32)}
DTYPES = [torch.float32, torch.float64]


def test_the_inputs_are_what_is_expected():
    assert {"default", "tensor lr", "maximize", "dampening", "nesterov"} <= INPUTS.keys()
    assert len(ERRORS) >= 7


def model_and(cls, dtype, kwargs):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).to(dtype)
    options = {key: value.clone() if isinstance(value, torch.Tensor) else value for key, value in kwargs.items()}
    return model, cls(model.parameters(), **options)


def train(model, optimizer, steps=3):
    inputs = torch.linspace(-1, 1, 20, dtype=next(model.parameters()).dtype).view(4, 5)

    def closure():
        optimizer.zero_grad()
        loss = model(inputs).square().sum()
        loss.backward()
        return loss

    return [optimizer.step(closure).item() for _ in range(steps)]


def states_equal(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a["param_groups"] == b["param_groups"] and all(
        a["state"][k].keys() == b["state"][k].keys()
        and all(torch.equal(a["state"][k][name], b["state"][k][name]) for name in a["state"][k])
        for k in a["state"].keys() | b["state"].keys()
    )


@pytest.mark.parametrize("flags", [{}, {"foreach": False}, {"foreach": True}, {"fused": True}], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("desc", INPUTS)
def test_trains_as_the_for_loop_does(desc, dtype, flags):
    ours, optimizer = model_and(INFO.optim_cls, dtype, {**INPUTS[desc], **flags})
    theirs, judge = model_and(torch.optim.SGD, dtype, {**INPUTS[desc], "foreach": False})
    assert train(ours, optimizer, 5) == train(theirs, judge, 5)
    assert all(torch.equal(p, q) for p, q in zip(ours.parameters(), theirs.parameters(), strict=True))


@pytest.mark.parametrize("desc", INPUTS)
def test_state_dict_deepcopy_and_pickle(desc):
    model, optimizer = model_and(INFO.optim_cls, torch.float32, INPUTS[desc])
    judge_model, judge = model_and(torch.optim.SGD, torch.float32, INPUTS[desc])
    train(model, optimizer)
    train(judge_model, judge)
    assert states_equal(optimizer, judge)
    for source, target in ((judge, optimizer), (optimizer, judge)):
        target.load_state_dict(copy.deepcopy(source.state_dict()))
        assert states_equal(source, target)
    for copied in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert type(copied) is FusedSGD and states_equal(copied, optimizer)
    assert train(model, optimizer) == train(judge_model, judge)


@pytest.mark.parametrize("desc", INPUTS)
def test_the_same_repr_and_defaults(desc):
    _, optimizer = model_and(INFO.optim_cls, torch.float32, INPUTS[desc])
    _, judge = model_and(torch.optim.SGD, torch.float32, INPUTS[desc])
    assert repr(optimizer) == repr(judge).replace("SGD", "FusedSGD", 1)
    assert optimizer.defaults == judge.defaults


@pytest.mark.parametrize("desc", ERRORS)
def test_the_same_errors(desc):
    error = ERRORS[desc]
    params = error.optimizer_error_input.params
    if params is None:
        params = [nn.Parameter(torch.randn(2, 3))]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        with pytest.raises(error.error_type, match=error.error_regex):
            INFO.optim_cls(params, **error.optimizer_error_input.kwargs)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"lr": -0.1},
        {"weight_decay": -1},
        {"nesterov": True},
        {"nesterov": True, "momentum": 0.9, "dampening": 0.1},
        {"fused": True, "foreach": True},
        {"fused": True, "differentiable": True},
    ],
    ids=str,
)
def test_the_same_errors_for_bad_values(kwargs):
    def message_of(cls):
        with pytest.raises((ValueError, RuntimeError)) as caught:
            cls([nn.Parameter(torch.ones(3))], **kwargs)
        return caught.type, str(caught.value)

    assert message_of(FusedSGD) == message_of(torch.optim.SGD)


def test_duplicate_parameters_are_updated_twice():
    results = []
    for cls in (FusedSGD, torch.optim.SGD):
        p = nn.Parameter(torch.ones(3))
        with pytest.warns(UserWarning, match="duplicate parameters"):
            optimizer = cls([p, p], lr=0.1, momentum=0.9, foreach=False)
        for _ in range(3):
            p.grad = torch.ones(3)
            optimizer.step()
        results.append(p.detach().clone())
    assert torch.equal(*results)
