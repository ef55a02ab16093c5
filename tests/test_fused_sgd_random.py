"""Random groups, shapes, layouts, dtypes, freezes and reloads in random order: always what torch.optim.SGD gives."""

import copy

import hypothesis.strategies as st
import torch
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from torch import nn

from freezeout_ext import FusedSGD

SHAPES = [(), (0,), (1,), (3,), (17,), (4, 5), (2, 3, 3, 3), (300,), (8193,)]
LAYOUTS = ["contiguous", "reversed", "strided", "offset"]
OPTIONS = st.fixed_dictionaries(
    {
        "lr": st.sampled_from([0.0, 0.01, 0.5]),
        "momentum": st.sampled_from([0, 0.5, 0.9]),
        "weight_decay": st.sampled_from([0, 0.1]),
        "maximize": st.booleans(),
    }
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
    def __init__(self):
        super().__init__()
        self.generator = torch.Generator().manual_seed(0)
        first = torch.randn(5, generator=self.generator)
        self.ours = FusedSGD([nn.Parameter(first.clone())], lr=0.1)
        self.theirs = torch.optim.SGD([nn.Parameter(first.clone())], lr=0.1, foreach=False)

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
        options=OPTIONS,
        nesterov=st.booleans(),
    )
    def add_group(self, shapes, layout, dtype, options, nesterov):
        values = [tensor(shape, layout, dtype, self.generator) for shape in shapes]
        options = {**options, "nesterov": nesterov and options["momentum"] > 0}
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

    @rule(index=st.integers(0, 9), options=OPTIONS)
    def change(self, index, options):
        for group in self.both_groups(index):
            if group["lr"] != 0:
                group.update(options, nesterov=False)

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
                assert torch.equal(a["momentum_buffer"], b["momentum_buffer"])


AgainstTorch.TestCase.settings = settings(
    max_examples=250, stateful_step_count=20, deadline=None, derandomize=True, database=None
)
TestAgainstTorch = AgainstTorch.TestCase
