"""A run on kept features is the run on the same views without them, step by step."""

import copy
import gc
import itertools
import weakref
from contextlib import nullcontext

import pytest
import torch
from feature_cases import Pictures, small_net, train
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from freezeout_ext import FeatureCache, FreezeOut
from freezeout_ext.models import build_model

# The order of summation in a convolution or a product may differ with the number of samples.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def pair(model, dataset, **arguments):
    """-> (losses cached, losses as ever, cache), the models' weights compared."""
    ours, theirs = copy.deepcopy(model), model
    torch.manual_seed(5)
    cached, cache, _ = train(ours, dataset, cached=True, **arguments)
    torch.manual_seed(5)
    ever, _, _ = train(theirs, dataset, cached=False, **arguments)
    for (name, a), b in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, **CLOSE, msg=lambda m, name=name: f"{name}: {m}")
    return cached, ever, cache


@pytest.mark.parametrize("name", ["vgg-11-x0.125", "wrn-10-1", "densenet-10-12", "resnet-18-x0.125"])
def test_the_papers_nets_train_as_without_the_cache(name):
    try:
        model = build_model(name, 4)
    except ValueError:
        pytest.skip(f"{name} is not a name of this version")
    cached, ever, cache = pair(model, Pictures(16, (3, 32, 32)), epochs=6, lr=0.01, max_transitions=2)
    torch.testing.assert_close(torch.tensor(cached), torch.tensor(ever), **CLOSE)
    report = cache.report()
    assert report.hits > 0 and report.samples_skipped > 0 and not any("not kept" in note for note in report.notes)


@given(
    views=st.integers(1, 3),
    batch_size=st.sampled_from([4, 5, 11]),
    start_frozen=st.integers(0, 2),
    t_0=st.sampled_from([0.2, 0.5, 1.0]),
    store=st.sampled_from(["device", "host", "disk"]),
    rows=st.sampled_from([None, 3, 8]),
    dropout=st.sampled_from([0.0, 0.4]),
    moves=st.lists(st.tuples(st.integers(1, 8), st.integers(0, 3)), max_size=3),
)
@settings(max_examples=12)
def test_any_run_with_the_cache_is_the_run_without(
    tmp_path_factory, views, batch_size, start_frozen, t_0, store, rows, dropout, moves
):
    moves = dict(moves)

    def on_batch(step, freezeout):
        if step in moves:
            n = moves[step]
            (freezeout.freeze_to if n >= freezeout.num_frozen else freezeout.thaw_to)(n)

    def arguments():
        where = str(tmp_path_factory.mktemp("store")) if store == "disk" else store
        return {"store": where, "limit": None if rows is None else rows * 8 * 8 * 6 * 4}

    torch.manual_seed(0)
    model = small_net(dropout=dropout)
    dataset = Pictures(11)
    ours, theirs = copy.deepcopy(model), model
    common = {
        "epochs": 3,
        "batch_size": batch_size,
        "views": views,
        "start_frozen": start_frozen,
        "t_0": t_0,
        "on_batch": on_batch,
    }
    torch.manual_seed(5)
    cached, cache, _ = train(ours, dataset, cached=True, cache_arguments=arguments(), **common)
    torch.manual_seed(5)
    ever, _, _ = train(theirs, dataset, cached=False, **common)
    torch.testing.assert_close(torch.tensor(cached), torch.tensor(ever), **CLOSE)
    if rows is not None:
        assert cache.bytes <= rows * 8 * 8 * 6 * 4 + 11 * 3 * 8
    cache.close()


def test_nothing_is_decoded_once_all_is_kept():
    dataset = Pictures(24)
    decoded = []
    _, cache, _ = train(
        small_net(), dataset, epochs=14, views=2, start_frozen=2, t_0=1.0,
        on_epoch=lambda *_: decoded.append(dataset.decoded),
    )  # fmt: skip
    by_epoch = [after - before for before, after in itertools.pairwise(decoded)]
    # The first epochs read all, and one sample thrice to see that views are views; later ones only for spot checks.
    assert by_epoch[:2] == [27, 24]
    assert by_epoch.count(0) >= 6 and sum(by_epoch[2:]) <= 8 * 6
    assert cache.report().checks >= 3 and cache.report().largest_difference <= 1
    assert cache.report().samples_skipped >= 200


def test_views_take_turns_and_are_a_function_of_seed_sample_and_view():
    seen = {}
    for workers in (0, 2):
        dataset = Pictures(10)
        cache = FeatureCache(dataset, views=3, seed=7)
        model = small_net()
        FreezeOut(model, torch.optim.SGD(model.parameters(), lr=0.1), total_steps=9, start_frozen=1, cache=cache)
        for epoch in range(6):
            views = set()
            for inputs, targets, keys in cache.loader(4, num_workers=workers).batches(epoch):
                for x, y, key in zip(inputs, targets.tolist(), keys.tolist(), strict=True):
                    assert y == dataset.labels[key // 3]
                    assert torch.equal(seen.setdefault(key, x), x)
                    views.add(key % 3)
            assert views == {0, 1, 2}
    assert len(seen) == 30
    assert len({float(x.sum()) for x in seen.values()}) == 30


def test_before_the_first_freeze_each_epoch_is_fresh_and_the_users_generators_go_on():
    dataset, model = Pictures(10), small_net()
    cache = FeatureCache(dataset, views=2)
    FreezeOut(model, torch.optim.SGD(model.parameters(), lr=0.1), total_steps=100, cache=cache)
    before = torch.get_rng_state()
    epochs = [torch.cat([x for x, _, _ in cache.loader(4, shuffle=False).batches(e)]) for e in range(4)]
    assert len({float(x.sum()) for x in epochs}) == 4
    assert all(int(k.tensor.max()) < 0 for _, _, k in cache.loader(4))
    assert torch.equal(torch.cat([x for x, _, _ in cache.loader(4, shuffle=False).batches(2)]), epochs[2])
    # The loader itself draws one number, as every DataLoader does.
    torch.set_rng_state(before)


def test_an_evaluation_in_between_neither_reads_nor_fills():
    model, dataset = small_net(), Pictures()

    def evaluate(epoch, freezeout, cache):
        rows, hits = cache.report().rows, cache.report().hits
        model.eval()
        with torch.no_grad(), cache.samples(range(0, 16, 2)):
            first = model(dataset.images[:8])
        assert torch.equal(first, copy.deepcopy(model)(dataset.images[:8]))
        model.train()
        assert (cache.report().rows, cache.report().hits) == (rows, hits)

    train(model, dataset, on_epoch=evaluate)


def test_changed_weights_empty_the_store_and_say_so():
    model, changes = small_net(), []

    def change(epoch, freezeout, cache):
        if epoch == 2:
            with torch.no_grad():
                model[0].weight.mul_(1.5)
            changes.append(cache.report().rows)
        if epoch == 3:
            model[0].weight.data = model[0].weight.data.clone()  # other memory, the same values
            changes.append(cache.report().rows)

    _, cache, _ = train(model, Pictures(), epochs=5, start_frozen=1, t_0=1.0, on_epoch=change)
    assert changes[0] == 64
    assert [n for n in cache.report().notes if "0.weight was changed" in n]
    assert cache.report().rows == 64


def test_weights_changed_behind_torchs_back_are_found_before_the_next_epoch():
    def change(epoch, freezeout, cache):
        if epoch == 3:  # whose first batches are not due for a spot check
            weight = freezeout.model[0].weight
            weight.data.copy_(weight.data * 1.5)  # same address, same version

    cached, ever, cache = pair(small_net(), Pictures(), epochs=5, start_frozen=1, t_0=1.0, on_epoch=change)
    torch.testing.assert_close(torch.tensor(cached), torch.tensor(ever), **CLOSE)
    assert [n for n in cache.report().notes if "0.weight was changed" in n]


@pytest.mark.parametrize("measure", [False, True])
def test_what_the_package_itself_puts_on_frozen_modules_is_no_change(measure):
    """A prefix puts forwards on modules and takes them away, some steps behind a transition."""
    model = build_model("wrn-10-1", 4)
    _, cache, freezeout = train(
        model, Pictures(16, (3, 16, 16)), epochs=12, lr=0.01, t_0=0.2, start_frozen=0, max_transitions=2,
        measure_prefix=measure,
    )  # fmt: skip
    assert len(freezeout.transitions) == 2
    assert not any("changed" in note for note in cache.report().notes), str(cache.report())


def test_three_caches_and_many_transitions_leave_no_memory():
    stores = []
    for _ in range(3):
        model = small_net()

        def move(step, freezeout):
            n = (step * 2 + 1) % 3
            (freezeout.freeze_to if n >= freezeout.num_frozen else freezeout.thaw_to)(n)
            stores.extend(weakref.ref(g.store) for g in freezeout.cache._kept)

        _, cache, freezeout = train(model, Pictures(), epochs=5, on_batch=move)
        cache.close()
        freezeout.close()
        assert cache.bytes == 0 and "forward" not in vars(model)
        assert all("forward" not in vars(m) for m in model.modules())
        copy.deepcopy(model)
    del cache, freezeout, model, move
    gc.collect()
    assert len(stores) > 20 and not any(store() for store in stores)


def test_gradient_accumulation_and_a_smaller_last_batch():
    dataset, losses = Pictures(21), {}
    for cached in (False, True):
        torch.manual_seed(1)
        model = small_net()
        cache = FeatureCache(dataset, views=1, measure=False)
        loader = cache.loader(8)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        freezeout = FreezeOut(model, optimizer, total_steps=20, start_frozen=1, t_0=0.5, cache=cache)
        losses[cached] = []
        for _ in range(6):
            for i, (inputs, targets, keys) in enumerate(loader):
                if cached:
                    with cache.samples(keys):
                        loss = nn.functional.cross_entropy(model(inputs), targets)
                else:
                    loss = nn.functional.cross_entropy(model(inputs), targets)
                loss.backward()
                losses[cached].append(loss.item())
                if i % 2:
                    optimizer.step()
                    optimizer.zero_grad()
                    freezeout.step()
    torch.testing.assert_close(torch.tensor(losses[True]), torch.tensor(losses[False]), **CLOSE)
    assert cache.report().hits


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int8])
def test_smaller_dtypes_train_nearly_the_same(dtype):
    torch.manual_seed(0)
    model = small_net()
    ours, theirs = copy.deepcopy(model), model
    arguments = {"epochs": 6, "views": 1, "start_frozen": 2, "t_0": 1.0}
    cached, cache, _ = train(ours, Pictures(), cache_arguments={"dtype": dtype}, **arguments)
    ever, _, _ = train(theirs, Pictures(), cached=False, **arguments)
    torch.testing.assert_close(torch.tensor(cached), torch.tensor(ever), rtol=0.05, atol=0.02)
    assert cached != ever and cache.report().checks


def test_autocast_is_part_of_what_is_kept():
    model, dataset = small_net(), Pictures(16)
    cache = FeatureCache(dataset, views=1, measure=False)
    loader = cache.loader(8, shuffle=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    FreezeOut(model, optimizer, total_steps=100, start_frozen=1, t_0=1.0, cache=cache)
    for _ in range(3):
        for inputs, targets, keys in loader:
            with cache.samples(keys), torch.autocast("cpu", dtype=torch.bfloat16):
                loss = nn.functional.cross_entropy(model(inputs), targets)
            loss.backward()
            assert all(p.grad is not None for p in model[3:].parameters())
            optimizer.zero_grad()
    assert cache.report().hits == 32
    assert cache._kept.latest.store.columns[0].dtype == torch.bfloat16
    with cache.samples(keys), pytest.raises(RuntimeError, match=r"were not read.* another autocast .*one autocast"):
        model(inputs)  # which was not read
    assert [n for n in cache.report().notes if "another autocast" in n]


@pytest.mark.parametrize("num_frozen", [0, 1])
def test_thawing_between_a_batch_and_its_forward_is_an_error(num_frozen):
    model, dataset = small_net(), Pictures(16)
    cache = FeatureCache(dataset, views=1, measure=False)
    loader = cache.loader(8, shuffle=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    freezeout = FreezeOut(model, optimizer, total_steps=100, start_frozen=2, t_0=1.0, cache=cache)
    for _ in range(3):
        for inputs, _targets, keys in loader:
            with cache.samples(keys):
                model(inputs)
    assert inputs.isnan().all()  # its features are kept
    freezeout.thaw_to(num_frozen)
    with cache.samples(keys), pytest.raises(RuntimeError, match="were not read"):
        model(inputs)
    for inputs, _targets, keys in loader:  # the next batch has what it needs
        with cache.samples(keys):
            assert model(inputs).isfinite().all()


class Gated(nn.Module):
    """The second block reads an input of its own."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, 6), nn.Bilinear(6, 3, 6), nn.Linear(6, 4)

    def forward(self, x, gate):
        return self.head(self.second(self.first(x).tanh(), gate).tanh())


class Gates(Pictures):
    def __getitem__(self, i):
        return {"x": self.images[i].flatten()[:6], "gate": self.images[i].flatten()[6:9], "label": int(self.labels[i])}


def test_an_input_that_is_needed_again_after_a_thaw_is_read_again():
    torch.manual_seed(0)
    model, found = Gated(), []
    for cached in (True, False):
        ours, cache = copy.deepcopy(model), FeatureCache(Gates(16), views=1, measure=False)
        loader, optimizer = cache.loader(4), torch.optim.SGD(ours.parameters(), lr=0.1)
        freezeout = FreezeOut(ours, optimizer, total_steps=40, start_frozen=1, t_0=1.0, cache=cache, prefix="off")
        losses = []
        for _ in range(6):
            for batch in loader:
                with cache.samples(batch["keys"]) if cached else nullcontext():
                    loss = nn.functional.cross_entropy(ours(x=batch["x"], gate=batch["gate"]), batch["label"])
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                losses.append(loss.item())
                if len(losses) == 9:
                    freezeout.freeze_to(2)
                if len(losses) == 11:  # not all rows have moved on
                    freezeout.thaw_to(1)
        found.append(losses)
    torch.testing.assert_close(torch.tensor(found[0]), torch.tensor(found[1]), **CLOSE)


def test_a_copy_made_inside_samples_is_a_plain_model():
    model, dataset = small_net(), Pictures(8)
    cache = FeatureCache(dataset, views=1)
    FreezeOut(model, torch.optim.SGD(model.parameters(), lr=0.1), total_steps=9, start_frozen=1, cache=cache)
    for inputs, _, keys in cache.loader(8):
        with cache.samples(keys):
            model(inputs)
            other = copy.deepcopy(model)
    rows = cache.report().misses, cache.report().hits
    with torch.no_grad():
        other[-1].bias += 1.0
    torch.testing.assert_close(other.eval()(inputs), model.eval()(inputs) + 1.0)
    assert rows == (cache.report().misses, cache.report().hits)
