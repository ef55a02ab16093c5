"""What people do around a training step: checkpointing, clipping, EMA models, and adapters without their library."""

import copy
import importlib
import pickle
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

from freezeout_ext.freezeout import FreezeOut
from freezeout_ext.models import build_model

TOTAL_STEPS = 16


def batch(step):
    generator = torch.Generator().manual_seed(1000 + step)
    return torch.randn(8, 1, 8, 8, generator=generator), torch.randint(0, 10, (8,), generator=generator)


def small_net():
    torch.manual_seed(0)
    return build_model("wrn-10-1", in_channels=1, image_size=8)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1), nn.GroupNorm(2, 4)

    def forward(self, x):
        return x + F.relu(self.norm(self.conv(x)))


class Net(nn.Module):
    """No batch norm: one in a checkpointed block would update its running statistics twice a step."""

    def __init__(self, checkpointed):
        super().__init__()
        torch.manual_seed(0)
        self.checkpointed = checkpointed
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointed else block(x)
        return self.head(x)


def train(model, steps=range(TOTAL_STEPS), after=lambda: None, before_step=lambda: None):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    freezeout = FreezeOut(model, optimizer, total_steps=TOTAL_STEPS, t_0=0.5)
    for step in steps:
        inputs, targets = batch(step)
        F.cross_entropy(model(inputs), targets).backward()
        before_step()
        optimizer.step()
        optimizer.zero_grad()
        freezeout.step()
        after()
    return freezeout


def assert_same(mine, theirs):
    assert mine.keys() == theirs.keys()
    for name in mine:
        assert torch.equal(mine[name], theirs[name]), name


def test_gradient_checkpointing_changes_nothing():
    plain, checkpointed = Net(False), Net(True)
    train(plain)
    freezeout = train(checkpointed)
    assert freezeout.num_frozen == 4
    assert_same(plain.state_dict(), checkpointed.state_dict())


def test_clipping_counts_the_norm_of_active_layers_only():
    model = small_net()
    norms = []

    def clip():
        active = [p.grad for p in model.parameters() if p.requires_grad]
        expected = torch.linalg.vector_norm(torch.stack([g.norm() for g in active]))
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        torch.testing.assert_close(norm, expected)  # float32, another order of summation
        norms.append(len(active))
        clipped = torch.linalg.vector_norm(torch.stack([g.norm() for g in active]))
        assert clipped <= 0.01 * (1 + 1e-5)

    train(model, before_step=clip)
    assert norms == sorted(norms, reverse=True) and norms[-1] < norms[0]


def test_an_ema_model_follows_and_is_not_frozen_itself():
    model = small_net()
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    freezeout = train(model, after=lambda: ema.update_parameters(model))
    assert freezeout.num_frozen == 4
    assert all(p.requires_grad for p in ema.module.parameters()) and all(m.training for m in ema.module.modules())
    # Half of what is left goes at each step: layer 0 froze at step 2 of 16, layer 3 later, the head trained to the end.
    distance = [(a - b).abs().max() for a, b in zip(ema.module.parameters(), model.parameters(), strict=True)]
    assert distance[0] < 1e-4 < distance[-1]

    frozen_copy = pickle.loads(pickle.dumps(AveragedModel(model)))
    ema.eval(), frozen_copy.eval(), model.eval()
    assert torch.equal(frozen_copy(batch(0)[0]), model(batch(0)[0]))


def test_an_ema_copy_made_after_a_freeze_trains_apart():
    model = small_net()
    freezeout = train(model, steps=range(9))
    assert freezeout.num_frozen == 3
    twin = copy.deepcopy(model)
    freezeout.close()
    assert all(p.requires_grad for p in model.parameters())
    assert not next(twin.parameters()).requires_grad


@pytest.mark.parametrize("library", ["lightning", "transformers"])
def test_an_adapter_without_its_library_says_which_extra_to_install(library, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == library]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, library, None)
    monkeypatch.delitem(sys.modules, f"freezeout_ext.integrations.{library}", raising=False)
    with pytest.raises(ImportError, match=rf"pip install freezeout_ext\[{library}\]"):
        importlib.import_module(f"freezeout_ext.integrations.{library}")
