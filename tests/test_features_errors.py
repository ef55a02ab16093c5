"""What a cache refuses, each by name."""

import pytest
import torch
from feature_cases import Pictures, small_net, train
from torch import nn

from freezeout_ext import FeatureCache, FreezeOut
from freezeout_ext.features import keys_in


def frozen(dataset=None, **arguments):
    """-> (cache, model) with one layer frozen and all of 8 samples kept."""
    dataset = dataset or Pictures(8)
    cache = FeatureCache(dataset, views=1, measure=False, **arguments)
    model = small_net()
    FreezeOut(model, torch.optim.SGD(model.parameters(), lr=0.1), total_steps=9, start_frozen=1, cache=cache)
    for inputs, _, keys in cache.loader(8, shuffle=False):
        with cache.samples(keys):
            model(inputs)
    return cache, model


def test_keys():
    cache, model = frozen()
    for keys, words in (
        ([1, 1, 2], r"\[1\] more than once"),
        ([0, 8], "0?8..7, got 8|in -8..7, got 8"),
        ([-9], "got -9"),
        (torch.zeros(2, 2), "got shape"),
        ([], "got shape"),
    ):
        with pytest.raises(ValueError, match=words), cache.samples(keys):
            pass
    with pytest.raises(ValueError, match="got 3 for a batch of 4"), cache.samples([0, 1, 2]):
        model(torch.zeros(4, 3, 8, 8))
    with pytest.raises(TypeError, match="got a str"), cache.samples("keys"):
        pass
    cache.close()
    with pytest.raises(RuntimeError, match="after close"), cache.samples([0]):
        pass


@pytest.mark.parametrize("batch", [(torch.zeros(2), torch.zeros(2)), {"inputs": torch.zeros(2)}, torch.zeros(2)])
def test_a_batch_without_keys_says_where_to_take_them_from(batch):
    with pytest.raises(ValueError, match=r"keys of their views: take them from cache\.loader"):
        keys_in(batch)


def test_data_sets_and_arguments():
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(())

    with pytest.raises(TypeError, match="iterable data has no samples to name"):
        FeatureCache(Stream())
    for arguments, words in (
        ({"views": 0}, "views must be"),
        ({"views": 1.5}, "views must be"),
        ({"dtype": torch.float64}, "dtype must be"),
        ({"limit": 0}, "limit must be"),
    ):
        with pytest.raises((ValueError, TypeError), match=words):
            FeatureCache(Pictures(), **arguments)
    with pytest.raises(ValueError, match="batch_size"):
        FeatureCache(Pictures()).loader(0)
    with pytest.raises(ValueError, match="the cache makes its own"):
        FeatureCache(Pictures()).loader(4, sampler=None)
    with pytest.raises(RuntimeError, match=r"FreezeOut\(cache"), FeatureCache(Pictures()).samples([0]):
        pass
    cache, _ = frozen()
    model = small_net()
    with pytest.raises(ValueError, match="cache must be of one FreezeOut"):
        FreezeOut(model, torch.optim.SGD(model.parameters(), lr=0.1), total_steps=9, cache=cache)


def test_a_generator_of_the_data_sets_own_is_found_before_the_first_batch():
    class Own(Pictures):
        generator = torch.Generator(device="cpu").manual_seed(0)

        def __getitem__(self, i):
            x, y = super().__getitem__(i)
            return x + torch.randn((), generator=self.generator), y

    with pytest.raises(ValueError, match="generator of its own"):
        frozen(Own(8))


def test_mixup_of_inputs_ends_the_cache_with_an_error_that_names_it():
    model, cache = small_net(), FeatureCache(Pictures(16), views=1, measure=False)
    FreezeOut(model, torch.optim.SGD(model.parameters(), lr=0.1), total_steps=9, start_frozen=1, cache=cache)
    with pytest.raises(RuntimeError, match="mixup"):
        for _ in range(4):
            for inputs, _, keys in cache.loader(8):
                with cache.samples(keys):
                    model(0.7 * inputs + 0.3 * inputs[torch.randperm(len(inputs))])
    assert cache.bytes == 0
    model(torch.zeros(2, 3, 8, 8))


def test_too_little_memory_is_said_with_the_bytes_before_anything_is_kept(monkeypatch):
    from freezeout_ext.features import room

    monkeypatch.setattr(room, "_free", lambda *_: 10_000)
    with pytest.raises(MemoryError, match=r"need 12,288 bytes on host memory, 8,000 .*limit="):
        frozen()


def test_another_data_set_or_other_views_than_the_folders(tmp_path):
    cache, _ = frozen(store=tmp_path)
    cache.close()
    other = Pictures(8)
    other.images += 1
    for dataset, views, words in ((other, 1, "sample"), (Pictures(9), 1, "samples"), (Pictures(8), 2, "views")):
        with pytest.raises(ValueError, match=f"differs in .*{words}"):
            FeatureCache(dataset, views=views, store=tmp_path)
    with pytest.raises(ValueError, match="of the same views"):
        FeatureCache(Pictures(8), views=1).load_state_dict({"samples": 8, "views": 2, "seed": 0})


def test_a_folder_of_other_weights_is_emptied_and_says_so(tmp_path):
    cache, _ = frozen(store=tmp_path)
    cache.close()
    torch.manual_seed(99)
    cache, _ = frozen(store=tmp_path)
    assert [note for note in cache.report().notes if "other weights" in note]
    assert cache.report().misses == 8 and cache.report().hits == 0
    cache.close()


def test_hooks_on_frozen_modules_and_compiled_blocks_are_refused_by_name():
    def hooked(model):
        model[1].register_forward_hook(lambda *_: None)

    def compiled(model):
        model[6].compile(backend="eager")

    for change, words in ((hooked, "hook is registered on 1"), (compiled, "6 is compiled")):
        model, cache = small_net(), FeatureCache(Pictures(8), views=1)
        FreezeOut(model, torch.optim.SGD(model.parameters(), lr=0.1), total_steps=9, start_frozen=1, cache=cache)
        change(model)
        for inputs, _, keys in [*cache.loader(8), *cache.loader(8)]:
            with cache.samples(keys):
                model(inputs)
        assert any(words in note for note in cache.report().notes) and cache.report().hits == 0


class Early(nn.Module):
    """Counts its forwards, or reads a parameter that trains, before a frozen module runs."""

    def __init__(self, counts):
        super().__init__()
        self.counts, self.first, self.head = counts, nn.Linear(6, 6), nn.Linear(6, 4)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        shift = self.calls if self.counts else self.head.bias.tanh()
        if self.counts:
            self.calls += 1
        return self.head(self.first(x).tanh()) + shift


@pytest.mark.parametrize("counts", [False, True])
def test_what_runs_in_front_of_a_frozen_output_and_is_no_part_of_it_is_refused(counts):
    data = torch.utils.data.TensorDataset(torch.randn(8, 6), torch.arange(8) % 4)
    model, cache = Early(counts), FeatureCache(data, views=1, measure=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    FreezeOut(model, optimizer, total_steps=9, start_frozen=1, t_0=1.0, layers=["first", "head"], cache=cache)
    for _ in range(2):
        for inputs, _, keys in cache.loader(8):
            with cache.samples(keys):
                model(inputs)
    (note,) = cache.report().notes
    assert "runs in front of first" in note and cache.report().hits == 0 and model.calls == 2 * counts


def test_what_float16_cannot_hold_is_not_kept_and_said():
    data = Pictures(8)
    data.images *= 1e8
    losses = []
    for cached in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(192, 4), nn.Linear(4, 4))
        found, cache, _ = train(
            model, data, cached=cached, views=1, lr=1e-12, t_0=0.9, cache_arguments={"dtype": torch.float16}
        )
        losses.append(found)
        assert not cached or "above 65504" in str(cache.report().notes)
    torch.testing.assert_close(torch.tensor(losses[0]), torch.tensor(losses[1]))
