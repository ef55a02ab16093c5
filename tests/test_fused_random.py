"""Random groups, shapes, layouts, dtypes, freezes and reloads in random order: always what torch's optimizer gives."""

import copy

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from torch import nn

from freezeout_ext import FusedAdam, FusedAdamW, FusedSGD

SHAPES = [(), (0,), (1,), (3,), (17,), (4, 5), (2, 3, 3, 3), (300,), (8193,)]
LAYOUTS = ["contiguous", "reversed", "strided", "offset"]
OF_ALL = {
    "lr": st.sampled_from([0.0, 0.01, 0.5]),
    "weight_decay": st.sampled_from([0, 0.1]),
    "maximize": st.booleans(),
}
OF_SGD = st.fixed_dictionaries({**OF_ALL, "momentum": st.sampled_from([0, 0.5, 0.9])})
OF_ADAM = st.fixed_dictionaries(
    {**OF_ALL, "betas": st.sampled_from([(0.9, 0.999), (0.3, 0.5), (0.0, 0.9)]), "eps": st.sampled_from([1e-8, 1e-2])}
)


def tensor(shape, layout, dtype, generator):
    if layout == "strided":
        return torch.randn(*shape, 2, dtype=dtype, generator=generator)[..., 0]
    if layout == "offset":
        return torch.randn(torch.Size(shape).numel() + 1, dtype=dtype, generator=generator)[1:].view(shape)
    value = torch.randn(shape, dtype=dtype, generator=generator)
    if layout == "reversed":
        order = list(reversed(range(len(shape))))
        return value.permute(order).contiguous().permute(order)
    return value


class AgainstTorch(RuleBasedStateMachine):
    ours_class, theirs_class, options = FusedSGD, torch.optim.SGD, OF_SGD

    def __init__(self):
        super().__init__()
        self.generator = torch.Generator().manual_seed(0)
        first = torch.randn(5, generator=self.generator)
        self.ours = self.ours_class([nn.Parameter(first.clone())], lr=0.1)
        self.theirs = self.theirs_class([nn.Parameter(first.clone())], lr=0.1, foreach=False)

    def pairs(self):
        groups = zip(self.ours.param_groups, self.theirs.param_groups, strict=True)
        return [pair for a, b in groups for pair in zip(a["params"], b["params"], strict=True)]

    def both_groups(self, index):
        index %= len(self.ours.param_groups)
        return self.ours.param_groups[index], self.theirs.param_groups[index]

    @rule(
        shapes=st.lists(st.sampled_from(SHAPES), max_size=4),
        layout=st.sampled_from(LAYOUTS),
        dtype=st.sampled_from([torch.float32, torch.float64]),
        data=st.data(),
        other=st.booleans(),
    )
    def add_group(self, shapes, layout, dtype, data, other):
        values = [tensor(shape, layout, dtype, self.generator) for shape in shapes]
        options = data.draw(self.options)
        if self.ours_class is FusedSGD:
            options["nesterov"] = other and options["momentum"] > 0
        else:
            options["amsgrad"] = other
        for optimizer in (self.ours, self.theirs):
            params = [nn.Parameter(torch.empty_strided(v.shape, v.stride(), dtype=dtype).copy_(v)) for v in values]
            optimizer.add_param_group({"params": params, **options})

    @rule(
        layout=st.sampled_from(["as parameter", *LAYOUTS]),
        missing=st.sampled_from([0, 0, 2, 3]),
        steps=st.integers(1, 3),
    )
    def step(self, layout, missing, steps):
        for _ in range(steps):
            for i, (p, q) in enumerate(self.pairs()):
                p.grad = q.grad = None
                if not p.requires_grad or (missing and i % missing == 0):
                    continue
                if layout == "as parameter":
                    p.grad = torch.empty_like(p).copy_(torch.randn(p.shape, dtype=p.dtype, generator=self.generator))
                else:
                    p.grad = tensor(p.shape, layout, p.dtype, self.generator)
                q.grad = p.grad.clone()
            self.ours.step()
            self.theirs.step()

    @rule(index=st.integers(0, 9), data=st.data())
    def change(self, index, data):
        options = data.draw(self.options)
        for group in self.both_groups(index):
            if group["lr"] != 0:
                group.update(options)
                if self.ours_class is FusedSGD:
                    group["nesterov"] = False

    @rule(index=st.integers(0, 9))
    def freeze(self, index):
        """As FreezeOut does; torch leaves out what has no gradient."""
        for optimizer, group in zip((self.ours, self.theirs), self.both_groups(index), strict=True):
            group.update(lr=0, frozen=True)
            for p in group["params"]:
                p.requires_grad_(False)
                p.grad = None
                optimizer.state.pop(p, None)

    @rule(index=st.integers(0, 9))
    def thaw(self, index):
        for group in self.both_groups(index):
            group.update(lr=0.1, frozen=False)
            for p in group["params"]:
                p.requires_grad_(True)

    @rule(index=st.integers(0, 9))
    def swap_storage(self, index):
        pairs = self.pairs()
        if pairs:
            for p in pairs[index % len(pairs)]:
                p.data = p.data.clone() * 2

    @rule(crosswise=st.booleans())
    def reload(self, crosswise):
        ours, theirs = copy.deepcopy(self.ours.state_dict()), copy.deepcopy(self.theirs.state_dict())
        self.ours.load_state_dict(theirs if crosswise else ours)
        self.theirs.load_state_dict(ours if crosswise else theirs)

    @precondition(lambda self: len(self.ours.param_groups) > 1)
    @rule(index=st.integers(0, 9))
    def remove_group(self, index):
        index %= len(self.ours.param_groups)
        for optimizer in (self.ours, self.theirs):
            for p in optimizer.param_groups.pop(index)["params"]:
                optimizer.state.pop(p, None)

    @invariant()
    def equal(self):
        for p, q in self.pairs():
            assert torch.equal(p, q)
            assert (p in self.ours.state) == (q in self.theirs.state)
            if p in self.ours.state:
                a, b = self.ours.state[p], self.theirs.state[q]
                assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class AdamWAgainstTorch(AgainstTorch):
    ours_class, theirs_class, options = FusedAdamW, torch.optim.AdamW, OF_ADAM


class AdamAgainstTorch(AgainstTorch):
    ours_class, theirs_class, options = FusedAdam, torch.optim.Adam, OF_ADAM


@pytest.mark.usefixtures("exact_square_roots")
@pytest.mark.parametrize("machine", [AgainstTorch, AdamWAgainstTorch, AdamAgainstTorch])
def test_random_operations_give_what_torch_gives(machine):
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=250 if machine is AgainstTorch else 120,
            stateful_step_count=20, deadline=None, derandomize=True, database=None,
        ),
    )  # fmt: skip
