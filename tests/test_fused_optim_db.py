"""torch's own optimizer inputs and errors, those of SGD, AdamW and Adam, put to the fused optimizers."""

import copy
import pickle
import warnings
from unittest import mock

import pytest
import torch
from fused_cases import TORCHS
from torch import nn

from freezeout_ext import FusedAdam, FusedAdamW, FusedSGD

pytest.importorskip("expecttest", reason="torch's test helpers import it")
# Its import would forbid the whole process to set torch.backends flags, as the training loop does in other tests.
with mock.patch.object(torch.backends, "disable_global_flags"):
    from torch.testing._internal.common_optimizers import optim_db

INFOS = {ours: next(info for info in optim_db if info.optim_cls is theirs) for ours, theirs in TORCHS.items()}
INPUTS = {
    (ours, given.desc): given.kwargs
    for ours, info in INFOS.items()
    for given in info.optim_inputs_func(device="cpu")
    if not given.kwargs.get("capturable")  # for CUDA only
}
ERRORS = {
    (ours, error.optimizer_error_input.desc): error
    for ours, info in INFOS.items()
    for error in info.optim_error_inputs_func(device="cpu", dtype=torch.float32)
}
DTYPES = [torch.float32, torch.float64]
pytestmark = pytest.mark.usefixtures("exact_square_roots")


def name_of(value):
    return value.__name__ if isinstance(value, type) else str(value)


of_inputs = pytest.mark.parametrize(("cls", "desc"), INPUTS, ids=name_of)


def test_the_inputs_are_what_is_expected():
    found = {cls: {desc for owner, desc in INPUTS if owner is cls} for cls in TORCHS}
    assert {"default", "tensor lr", "maximize", "dampening", "nesterov"} <= found[FusedSGD]
    for cls in (FusedAdamW, FusedAdam):
        assert {"default", "non-default lr", "nonzero weight_decay", "maximize", "amsgrad"} <= found[cls]
    assert all(sum(owner is cls for owner, _ in ERRORS) >= 7 for cls in TORCHS)


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
@of_inputs
def test_trains_as_the_for_loop_does(cls, desc, dtype, flags):
    given = INPUTS[cls, desc]
    if (
        flags.get("foreach")
        and any(isinstance(value, torch.Tensor) for value in given.values())
        and cls is not FusedSGD
    ):
        pytest.skip("torch's constructor refuses foreach with a tensor")
    ours, optimizer = model_and(cls, dtype, {**given, **flags})
    theirs, judge = model_and(TORCHS[cls], dtype, {**given, "foreach": False})
    assert train(ours, optimizer, 5) == train(theirs, judge, 5)
    assert all(torch.equal(p, q) for p, q in zip(ours.parameters(), theirs.parameters(), strict=True))


@of_inputs
def test_state_dict_deepcopy_and_pickle(cls, desc):
    given = {"foreach": False, **INPUTS[cls, desc]}
    model, optimizer = model_and(cls, torch.float32, given)
    judge_model, judge = model_and(TORCHS[cls], torch.float32, given)
    train(model, optimizer)
    train(judge_model, judge)
    assert states_equal(optimizer, judge)
    for source, target in ((judge, optimizer), (optimizer, judge)):
        target.load_state_dict(copy.deepcopy(source.state_dict()))
        assert states_equal(source, target)
    for copied in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert type(copied) is cls and states_equal(copied, optimizer)
    assert train(model, optimizer) == train(judge_model, judge)


@of_inputs
def test_the_same_repr_and_defaults(cls, desc):
    _, optimizer = model_and(cls, torch.float32, INPUTS[cls, desc])
    _, judge = model_and(TORCHS[cls], torch.float32, INPUTS[cls, desc])
    assert repr(optimizer) == "Fused" + repr(judge)
    assert optimizer.defaults == judge.defaults


@pytest.mark.parametrize(("cls", "desc"), ERRORS, ids=name_of)
def test_the_same_errors(cls, desc):
    error = ERRORS[cls, desc]
    params = error.optimizer_error_input.params
    if params is None:
        params = [nn.Parameter(torch.randn(2, 3))]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        with pytest.raises(error.error_type, match=error.error_regex):
            cls(params, **error.optimizer_error_input.kwargs)


@pytest.mark.parametrize("cls", TORCHS, ids=name_of)
def test_duplicate_parameters_are_updated_twice(cls):
    results = []
    options = {"momentum": 0.9} if cls is FusedSGD else {}
    for made in (cls, TORCHS[cls]):
        p = nn.Parameter(torch.ones(3))
        with pytest.warns(UserWarning, match="duplicate parameters"):
            optimizer = made([p, p], lr=0.1, foreach=False, **options)
        for _ in range(3):
            p.grad = torch.ones(3)
            optimizer.step()
        results.append(p.detach().clone())
    assert torch.equal(*results)
