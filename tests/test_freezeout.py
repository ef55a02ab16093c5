"""FreezeOut on real training: each invariant of the transition, resume, and plain cosine as the limit."""

import ast
import copy
import io
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from freezeout_ext.freezeout import FreezeOut
from freezeout_ext.fused import FusedAdamW
from freezeout_ext.layers import find_layers
from freezeout_ext.models import build_model

TOTAL_STEPS = 24
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-2),
    "sgd-plain": lambda p: torch.optim.SGD(p, lr=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "fused-adamw": lambda p: FusedAdamW(p, lr=1e-2),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.9, weight_decay=1e-2),
}


def small_net():
    torch.manual_seed(0)
    return build_model("wrn-10-1", in_channels=1, image_size=8)


def batch(step, size=8):
    generator = torch.Generator().manual_seed(1000 + step)
    return torch.randn(size, 1, 8, 8, generator=generator), torch.randint(0, 10, (size,), generator=generator)


def train(model, optimizer, freezeout, steps, *, set_to_none=True):
    for step in steps:
        inputs, targets = batch(step)
        loss = F.cross_entropy(model(inputs), targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=set_to_none)
        freezeout.step()


def controlled(optimizer="sgd", model=None, **arguments):
    model = model or small_net()
    optimizer = OPTIMIZERS[optimizer](model.parameters())
    arguments = {"total_steps": TOTAL_STEPS, "t_0": 0.3, "how_scale": "linear", **arguments}
    return model, optimizer, FreezeOut(model, optimizer, **arguments)


def frozen_tensors(freezeout):
    frozen = freezeout.layers[: freezeout.num_frozen]
    return [p for layer in frozen for p in layer.parameters.values()] + [
        b for layer in frozen for module in layer.submodules for b in module.buffers(recurse=False)
    ]


def assert_same(mine, theirs):
    assert mine.keys() == theirs.keys()
    for name in mine:
        assert torch.equal(mine[name], theirs[name]), name


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("set_to_none", [True, False])
def test_frozen_parameters_and_buffers_stay_bit_identical(optimizer, set_to_none):
    model, optimizer, freezeout = controlled(optimizer)
    train(model, optimizer, freezeout, range(14), set_to_none=set_to_none)
    assert 0 < freezeout.num_frozen < len(freezeout.layers) - 1
    frozen = frozen_tensors(freezeout)
    assert not set(optimizer.state).intersection(frozen)
    before = [tensor.clone() for tensor in frozen]
    active = next(iter(freezeout.layers[-1].parameters.values()))
    active_before = active.clone()
    train(model, optimizer, freezeout, range(14, TOTAL_STEPS), set_to_none=set_to_none)
    assert any(tensor.dim() == 0 for tensor in frozen)  # num_batches_tracked of a batch norm
    assert all(map(torch.equal, frozen, before))
    assert not torch.equal(active, active_before)


def test_every_frozen_parameter_is_off_and_its_momentum_freed():
    model, optimizer, freezeout = controlled()
    train(model, optimizer, freezeout, range(14))
    for i, layer in enumerate(freezeout.layers):
        for p in layer.parameters.values():
            assert p.requires_grad == (i >= freezeout.num_frozen)
            assert (p in optimizer.state) == (i >= freezeout.num_frozen)
            assert p.grad is None
    for group in optimizer.param_groups:
        assert group["frozen"] == (group["layer"] < freezeout.num_frozen)
        assert (group["lr"] == 0) == group["frozen"]
    first = freezeout.transitions[0]
    stem = freezeout.layers[0]
    assert first.layers == (stem.name,) and first.num_frozen == 1
    assert first.parameters_frozen == stem.num_parameters
    assert first.state_bytes_freed == 4 * stem.num_parameters


def test_transitions_come_at_the_milestones():
    model, optimizer, freezeout = controlled()
    train(model, optimizer, freezeout, range(TOTAL_STEPS))
    expected = [math.ceil(freezeout.schedule.milestone(i)) for i in range(len(freezeout.layers) - 1)]
    assert [t.step for t in freezeout.transitions for _ in t.layers] == expected
    assert freezeout.num_frozen == len(freezeout.layers) - 1


def test_the_frozen_prefix_saves_nothing_for_backward_the_stem_included():
    model, optimizer, freezeout = controlled()
    owner = {module: i for i, layer in enumerate(freezeout.layers) for module in layer.submodules}
    running, saved = [], {}

    def count(tensor):
        if running:
            saved[running[-1]] = saved.get(running[-1], 0) + tensor.numel()
        return tensor

    def saved_by_layer(step):
        saved.clear()
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            model(batch(step)[0])
        return dict(saved)

    def leave(*_):
        running.pop()

    for module, i in owner.items():
        module.register_forward_pre_hook(lambda *_, i=i: running.append(i))
        module.register_forward_hook(leave)
    assert set(saved_by_layer(0)) == set(range(len(freezeout.layers)))
    train(model, optimizer, freezeout, range(14))
    assert freezeout.num_frozen >= 2
    assert min(saved_by_layer(14)) == freezeout.num_frozen


def test_model_train_does_not_thaw():
    model = nn.Sequential(
        nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 2)
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    freezeout = FreezeOut(model, optimizer, total_steps=10, t_0=0.1, how_scale="linear")
    for _ in range(2):
        model(torch.randn(8, 4)).sum().backward()
        optimizer.step()
        freezeout.step()
    assert freezeout.num_frozen == 1
    for _ in range(2):
        model.train()
        assert [module.training for module in model] == [False, False, False, True, True, True]
        model[1].train()
        assert not model[1].training
        model.eval()
        assert not any(module.training for module in model)


def test_copies_and_pickles_of_a_frozen_model_are_plain_models():
    model, optimizer, freezeout = controlled()
    early_copy = copy.deepcopy(model)  # made while the order of execution was still being watched
    train(model, optimizer, freezeout, range(14))
    stored = io.BytesIO()
    torch.save(model, stored)
    stored.seek(0)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(stored, weights_only=False)):
        assert_same(twin.state_dict(), model.state_dict())
        assert all(module.training for module in twin.train().modules())
        assert not any(module.training for module in twin.eval().modules())
        norm = next(module for module in twin.train().modules() if isinstance(module, nn.BatchNorm2d))
        before = norm.running_mean.clone()
        twin(batch(0)[0])
        assert not torch.equal(norm.running_mean, before)
        again = copy.deepcopy(twin)
        assert next(again.eval().children()).training is False and next(twin.children()).training is True
    assert not all(module.training for module in model.train().modules())
    before = freezeout.step_count
    early_copy(batch(0)[0])
    assert freezeout.step_count == before


def test_scaled_by_default_but_not_for_the_adam_family():
    assert controlled("sgd")[2].schedule.scale_lr is True
    assert controlled("rmsprop")[2].schedule.scale_lr is True
    assert controlled("adamw")[2].schedule.scale_lr is False
    assert controlled("fused-adamw")[2].schedule.scale_lr is False
    assert controlled("adamw", scale_lr=True)[2].schedule.scale_lr is True


def test_t_0_of_one_is_plain_cosine_training_bit_for_bit():
    model, optimizer, freezeout = controlled(t_0=1.0, scale_lr=False)
    train(model, optimizer, freezeout, range(TOTAL_STEPS))

    plain = small_net()
    optimizer = OPTIMIZERS["sgd"](plain.parameters())
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / TOTAL_STEPS))
    )
    for step in range(TOTAL_STEPS):
        inputs, targets = batch(step)
        F.cross_entropy(plain(inputs), targets).backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    assert_same(model.state_dict(), plain.state_dict())
    assert freezeout.transitions == []


def test_gradient_accumulation_counts_optimizer_steps_and_keeps_active_gradients():
    model, optimizer, freezeout = controlled(t_0=0.1)
    inputs, targets = batch(0)
    for _ in range(3):
        for half in (slice(0, 4), slice(4, 8)):
            (F.cross_entropy(model(inputs[half]), targets[half]) / 2).backward()
        optimizer.step()
        freezeout.step()  # before zero_grad: the gradients of active layers are not touched
        for i, layer in enumerate(freezeout.layers):
            assert all((p.grad is None) == (i < freezeout.num_frozen) for p in layer.parameters.values())
        optimizer.zero_grad()
    assert freezeout.step_count == 3 and freezeout.num_frozen == 1


def test_weight_tied_modules_freeze_with_the_last_layer_that_uses_them():
    torch.manual_seed(0)
    shared = nn.Linear(4, 4)
    model = nn.Sequential(nn.Linear(4, 4), shared, nn.ReLU(), nn.Linear(4, 4), shared, nn.Linear(4, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with pytest.warns(UserWarning, match="used by several layers"):
        freezeout = FreezeOut(model, optimizer, total_steps=40, t_0=0.1, how_scale="linear")
    assert [layer.name for layer in freezeout.layers] == ["0", "3", "4", "5"]
    while freezeout.num_frozen < 2:
        model(torch.randn(8, 4)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        freezeout.step()
    before = shared.weight.clone()
    model(torch.randn(8, 4)).sum().backward()
    assert shared.weight.grad is not None
    optimizer.step()
    assert not torch.equal(shared.weight, before)


class Swapped(nn.Module):
    """Runs in another order than that of registration, and its source does not say so."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.second, self.head = (
            nn.Linear(4, 4),
            nn.LayerNorm(4),
            nn.Linear(4, 4),
            nn.Linear(4, 2),
        )
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x):
        for name in ("second", "norm", "first", "head"):
            x = self.get_submodule(name)(x)
        return x * self.scale.mean()


def test_layers_that_run_in_another_order_are_an_error_with_the_order_that_was_seen():
    model = Swapped()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    freezeout = FreezeOut(model, optimizer, total_steps=10)
    with pytest.raises(ValueError, match=r"layer 0 \(first\) runs after layer 1 \(second\); pass .* layers=") as raised:
        model(torch.randn(2, 4))
    freezeout.close()
    seen = ast.literal_eval(str(raised.value).split("layers=")[1])
    assert seen == [["second", "norm"], ["first", "scale"], "head"]
    freezeout = FreezeOut(model, optimizer, total_steps=10, layers=seen)
    model(torch.randn(2, 4)).sum().backward()
    optimizer.step()
    freezeout.step()
    assert not model._forward_hooks and not model._forward_pre_hooks and not model.first._forward_pre_hooks


def test_the_module_that_runs_late_is_named_and_not_its_layer_alone():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    FreezeOut(model, optimizer, total_steps=10, layers=[["0", "2"], "1", "3"])
    with pytest.raises(
        ValueError, match=r"but 2 of layer 0 \(0\) runs after layer 1 \(1\); .* layers=\['0', \['1', '2'\]"
    ):
        model(torch.randn(2, 4))


def test_checkpointed_layers_are_not_taken_for_a_wrong_order():
    from torch.utils.checkpoint import checkpoint_sequential

    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(*(nn.Linear(4, 4) for _ in range(4)))
            self.head = nn.Linear(4, 2)

        def forward(self, x):
            return self.head(checkpoint_sequential(self.body, 2, x, use_reentrant=False))

    model = Checkpointed()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    freezeout = FreezeOut(model, optimizer, total_steps=10, t_0=0.1, how_scale="linear")
    for _ in range(4):
        model(torch.randn(2, 4)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        freezeout.step()
    assert freezeout.num_frozen > 1


@pytest.mark.parametrize(
    ("move", "start", "count"),
    [
        (lambda freezeout: freezeout.step(), 0, 1),
        (lambda freezeout: freezeout.freeze_to(3), 2, 3),
        (lambda freezeout: freezeout.thaw_to(0), 2, 0),
    ],
    ids=["step", "freeze_to", "thaw_to"],
)
def test_a_transition_that_raises_has_done_nothing(move, start, count):
    model, optimizer, freezeout = controlled(start_frozen=start, t_0=0.8 if start else 0.3)
    train(model, optimizer, freezeout, range(7))
    inputs, targets = batch(7)
    F.cross_entropy(model(inputs), targets).backward()
    optimizer.step()

    def picture():
        return str(
            [[(p.requires_grad, p.grad, optimizer.state.get(p)) for p in model.parameters()],
             [(m.training, "train" in vars(m)) for m in model.modules()],
             [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups],
             freezeout.state_dict(), freezeout.prefix_report().num_frozen]
        )  # fmt: skip

    seen = []

    def refuse(controller, transition):
        seen.append((controller.num_frozen, transition.num_frozen))
        raise RuntimeError("not now")

    before = picture()
    remove = freezeout.register_transition_hook(refuse)
    with pytest.raises(RuntimeError, match="not now"):
        move(freezeout)
    assert seen == [(count, count)]
    assert picture() == before and freezeout.num_frozen == start
    remove()
    move(freezeout)
    assert freezeout.num_frozen == count and freezeout.step_count == (7 if start else 8)
    model.train()
    assert [m.training for layer in freezeout.layers for m in layer.submodules] == [
        i >= count for i, layer in enumerate(freezeout.layers) for _ in layer.submodules
    ]


def test_close_gives_model_and_optimizer_back():
    model, optimizer, freezeout = controlled()
    train(model, optimizer, freezeout, range(14))
    freezeout.close()
    freezeout.close()
    assert all(p.requires_grad for p in model.parameters()) and all(m.training for m in model.modules())
    assert len(optimizer.param_groups) == 1 and optimizer.param_groups[0]["lr"] == 0.1
    assert list(optimizer.param_groups[0]["params"]) == list(model.parameters())
    with pytest.raises(RuntimeError, match="after close"):
        freezeout.step()
    FreezeOut(model, optimizer, total_steps=5)


def test_steps_beyond_the_end_warn_and_leave_the_weights_alone():
    model, optimizer, freezeout = controlled()
    train(model, optimizer, freezeout, range(TOTAL_STEPS))
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.warns(UserWarning, match="step 25 is beyond total_steps=24"):
        train(model, optimizer, freezeout, [TOTAL_STEPS])
    assert_same(dict(model.named_parameters()), before)


def test_each_transition_is_logged(caplog):
    model, optimizer, freezeout = controlled()
    with caplog.at_level("INFO", logger="freezeout_ext"):
        train(model, optimizer, freezeout, range(14))
    logged = [message for message in caplog.messages if message.startswith("step ")]
    assert len(logged) == len(freezeout.transitions) > 0
    assert logged[0].startswith(f"step {freezeout.transitions[0].step}: froze {freezeout.layers[0].name};")


def test_refused_arguments_are_named():
    model = small_net()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(TypeError, match=r"must not be an nn\.DataParallel: .* or pass model\.module"):
        FreezeOut(nn.DataParallel(model), sgd, total_steps=10)
    with pytest.raises(TypeError, match="LBFGS"):
        FreezeOut(model, torch.optim.LBFGS(model.parameters()), total_steps=10)
    with pytest.raises(ValueError, match=r"head\.\S+ of layer \d+ is not in it|must hold every trainable parameter"):
        FreezeOut(model, torch.optim.SGD(model.stem.parameters(), lr=0.1), total_steps=10)
    assert len(sgd.param_groups) == 1 and "layer" not in sgd.param_groups[0]
    FreezeOut(model, sgd, total_steps=10)
    with pytest.raises(ValueError, match="held by another FreezeOut"):
        FreezeOut(model, sgd, total_steps=10)
    scheduled = torch.optim.SGD(model.parameters(), lr=0.1)
    torch.optim.lr_scheduler.StepLR(scheduled, 3)
    with pytest.raises(ValueError, match="LR scheduler yet"):
        FreezeOut(model, scheduled, total_steps=10)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"twice": True}, ValueError, "each optimizer once, got the same SGD twice"),
        ({"shared": True}, ValueError, "each parameter once, optimizers 0 and 1 share one of shape"),
        ({"layers": [[], "stem", "blocks", "head"]}, ValueError, r"layers\[0\] must name at least one module"),
        (
            {"foreign": True},
            ValueError,
            r"layers must be of this model, layer 0 \(stem\) holds parameters that are not",
        ),
        ({"schedulers": [3], "anneal": False}, TypeError, "schedulers must be torch LR schedulers, got int"),
    ],
)
def test_what_does_not_belong_together_is_named_and_nothing_is_changed(arguments, error, message):
    model = small_net()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    given = {"model": model, "optimizer": optimizer, "total_steps": 10, **arguments}
    if given.pop("twice", False):
        given["optimizer"] = [optimizer, optimizer]
    if given.pop("shared", False):
        given["optimizer"] = [optimizer, OPTIMIZERS["sgd"](model.head.parameters())]
    if given.pop("foreign", False):
        given["layers"] = find_layers(small_net())
    with pytest.raises(error, match=message):
        FreezeOut(given.pop("model"), given.pop("optimizer"), **given)
    assert len(optimizer.param_groups) == 1 and "layer" not in optimizer.param_groups[0]
    assert not any(m._forward_hooks or m._forward_pre_hooks or "train" in vars(m) for m in model.modules())
