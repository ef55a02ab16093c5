"""Spot checks: no correct run is ended by one, whatever rows were rounded to and passed through; faults are found."""

import pytest
import torch
from feature_cases import Pictures, train
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from freezeout_ext.features import spot

DTYPES = [None, torch.bfloat16, torch.float16, torch.int8]


@pytest.fixture(autouse=True)
def every_batch(monkeypatch):
    """Each cached batch is checked."""
    monkeypatch.setattr(spot.Schedule, "due", lambda self: True)


class Amplifying(nn.Module):
    """y = gain * (W x + b) with b = -W m, m the mean input: small differences of large numbers, one of them large."""

    def __init__(self, inputs, outputs, mean, gain, generator):
        super().__init__()
        weight = torch.randn(outputs, inputs, generator=generator) / inputs**0.5
        weight[0, 0] = 3.0
        self.linear = nn.Linear(inputs, outputs)
        with torch.no_grad():
            self.linear.weight.copy_(gain * weight)
            self.linear.bias.copy_(gain * (0.1 - weight.sum(1) * mean))

    def forward(self, x):
        return self.linear(x).tanh() + 1


def net(gains, seed):
    generator = torch.Generator().manual_seed(seed)
    sizes = [48, *[16] * len(gains)]
    blocks = [
        Amplifying(a, b, 1.0 if i else 0.0, gain, generator)
        for i, (a, b, gain) in enumerate(zip(sizes, sizes[1:], gains, strict=False))
    ]
    return nn.Sequential(nn.Flatten(), *blocks, nn.Linear(16, 4))


@given(
    dtype=st.sampled_from(DTYPES),
    gains=st.lists(st.sampled_from([0.5, 3.0, 30.0]), min_size=3, max_size=4),
    moves=st.lists(st.tuples(st.integers(1, 20), st.integers(0, 3)), max_size=4),
    views=st.integers(1, 2),
    batch_size=st.sampled_from([5, 8]),
    rows=st.sampled_from([None, 9]),
    disk=st.booleans(),
    seed=st.integers(0, 3),
)
@settings(max_examples=40)
def test_no_correct_run_is_ended(tmp_path_factory, dtype, gains, moves, views, batch_size, rows, disk, seed):
    moves = dict(moves)

    def on_batch(step, freezeout):
        n = min(moves.get(step, freezeout.num_frozen), len(gains))
        (freezeout.freeze_to if n >= freezeout.num_frozen else freezeout.thaw_to)(n)

    store = str(tmp_path_factory.mktemp("store")) if disk else "device"
    losses, cache, _ = train(
        net(gains, seed), Pictures(18, (3, 4, 4)), epochs=7, views=views, batch_size=batch_size, lr=1e-5,
        start_frozen=1, t_0=0.4, on_batch=on_batch, layers=[str(i + 1) for i in range(len(gains) + 1)],
        cache_arguments={"dtype": dtype, "store": store, "limit": None if rows is None else rows * 16 * 4},
    )  # fmt: skip
    assert all(loss == loss for loss in losses)
    assert not [note for note in cache.report().notes if "not kept" in note], str(cache.report())
    cache.close()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fault", ["mixup", "foreign view"])
def test_a_fault_is_found_also_in_rows_that_passed_through_several_frontiers(dtype, fault):
    torch.manual_seed(0)
    dataset, faulty = Pictures(16), []

    class Wrong(Pictures):
        def __getitem__(self, i):
            x, y = super().__getitem__(i)
            return (x + 0.5 * torch.randn(x.shape, generator=own) if faulty and fault == "foreign view" else x), y

    own = torch.Generator().manual_seed(3)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 6, 3, padding=1), nn.ReLU(),
        nn.Conv2d(6, 6, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4),
    )  # fmt: skip
    if fault == "mixup":
        model.register_forward_pre_hook(
            lambda module, given: (0.6 * given[0] + 0.4 * given[0].flip(0),) if faulty else None
        )
    else:
        dataset = Wrong(16)
    with pytest.raises(RuntimeError, match="computed anew"):
        train(
            model, dataset, epochs=8, views=1, start_frozen=1, milestones=[0.1, 0.2, 1.0], t_0=0.8,
            cache_arguments={"dtype": dtype}, on_epoch=lambda epoch, *_: faulty.append(1) if epoch == 5 else None,
        )  # fmt: skip


class WritesItsInput(nn.Linear):
    def forward(self, x):
        return super().forward(x.mul_(0.5))


def test_rows_are_what_was_computed_where_what_trains_writes_to_its_input():
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 8), WritesItsInput(8, 8), nn.Linear(8, 4))
    _, cache, _ = train(model, Pictures(8, (3, 4, 4)), epochs=4, views=1, start_frozen=1, t_0=1.0)
    assert cache.report().checks == 3 and not cache.report().notes


def test_a_row_is_rounded_as_it_would_be_read_back():
    from freezeout_ext.features.columns import Column
    from freezeout_ext.features.store import Store

    generator = torch.Generator().manual_seed(0)
    batch = torch.randn(6, 3, 4, 4, generator=generator).to(memory_format=torch.channels_last)
    text, lengths = torch.randn(6, 7, 5, generator=generator), torch.tensor([7, 2, 3, 7, 1, 5])
    for dtype in DTYPES:
        columns = [Column.like(batch, dtype), Column.like(text, dtype, padded=True)]
        store = Store(columns, 6, 6, "cpu", positions=42)
        store.put(torch.arange(6), [batch, text], lengths)
        kept = store.gather(torch.arange(6), length=7)
        for a, b in zip(kept, store.rounded([batch, text], lengths), strict=True):
            assert torch.equal(a, b), dtype
        assert store.is_lossy == (dtype is not None)
