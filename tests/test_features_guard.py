"""Whatever changes of a frozen module, of the samples or of the folder, kept features are not read on in silence."""

import json
import random
import types

import numpy as np
import pytest
import torch
from feature_cases import Pictures, train
from torch import nn

from freezeout_ext import FeatureCache, FreezeOut


class Block(nn.Module):
    def __init__(self, channels, out):
        super().__init__()
        self.conv, self.norm, self.gain = nn.Conv2d(channels, out, 3, padding=1), nn.BatchNorm2d(out), 1.0
        self.config = types.SimpleNamespace(shift=[0.0])

    def forward(self, x):
        return self.norm(self.conv(x)).relu() * self.gain + self.config.shift[0]


def net():
    torch.manual_seed(0)
    return nn.Sequential(Block(3, 6), Block(6, 6), Block(6, 6), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4))


class Fixed(Pictures):
    """Without augmentation: where nothing can be kept any more each epoch shows fresh views."""

    def __getitem__(self, i):
        return self.images[i], int(self.labels[i])


def doubled(module, args, output):
    return output * 2 if isinstance(module, nn.BatchNorm2d) else None


CHANGES = {
    "attribute": lambda b: setattr(b, "gain", 2.0),
    "list in a config": lambda b: b.config.shift.__setitem__(0, 0.5),
    "eps": lambda b: setattr(b.norm, "eps", 2.0),
    "forward": lambda b: setattr(b, "forward", lambda x: Block.forward(b, x) * 2),
    "inner forward": lambda b: setattr(b.norm, "forward", lambda x: x),
    "activation": lambda b: setattr(b, "norm", nn.Identity()),
    "mode": lambda b: setattr(b.norm, "training", True),
    "hook": lambda b: b.norm.register_forward_hook(doubled),
    "hook in front": lambda b: b.register_forward_pre_hook(lambda module, args: (args[0] * 2,)),
    "global hook": lambda b: nn.modules.module.register_module_forward_hook(doubled),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_of_a_frozen_module_is_noticed_before_the_next_batch(name):
    losses = []
    for cached in (False, True):
        random.seed(0), np.random.seed(0), torch.manual_seed(0)
        handles = []

        def change(count, freezeout, handles=handles):
            if count == 10:  # all views are kept after 4 steps
                handles.append(CHANGES[name](freezeout.model[0]))

        try:
            found, cache, _ = train(
                net(), Fixed(), cached=cached, views=1, start_frozen=2, t_0=0.9, prefix="off", on_batch=change
            )
        finally:
            for handle in handles:
                if hasattr(handle, "remove"):
                    handle.remove()
        losses.append(found)
        assert not cached or (cache.report().hits and "was dropped" in str(cache.report().notes)), cache.report()
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-4, atol=1e-5)  # kernels may sum by the batch's size


def test_a_change_between_a_batch_and_its_forward_is_an_error_that_names_the_change():
    model, cache = net(), FeatureCache(Fixed(8), views=1, measure=False)
    optimizer, loader = torch.optim.SGD(model.parameters(), lr=0.01), cache.loader(8)
    FreezeOut(model, optimizer, total_steps=99, start_frozen=2, prefix="off", cache=cache)
    for _ in range(2):
        for inputs, _, keys in loader:
            with cache.samples(keys):
                model(inputs)
    ((inputs, _, keys),) = loader
    model[0].gain = 2.0
    with cache.samples(keys), pytest.raises(RuntimeError, match=r"not read.* attribute .*was changed; change frozen"):
        model(inputs)


class Widths(Pictures):
    """Samples of different width, which a batch pads."""

    def __getitem__(self, i):
        return self.images[i, :, :, : 5 + i % 4], int(self.labels[i])


def padded(samples):
    width = max(x.shape[-1] for x, _ in samples)
    images = [nn.functional.pad(x, (0, width - x.shape[-1])) for x, _ in samples]
    return torch.stack(images), torch.tensor([y for _, y in samples])


def test_a_batch_of_another_shape_runs_as_ever():
    dataset = Widths(count=8)
    model = net()
    cache = FeatureCache(dataset, views=1, measure=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    FreezeOut(model, optimizer, total_steps=10, start_frozen=2, t_0=0.9, prefix="off", cache=cache)
    for places in ([3, 7, 1, 2], [0, 1, 2, 4], [3, 7, 1, 2], [1, 2]):
        images, _ = padded([dataset[i] for i in places])
        expected = model.eval()(images)
        model.train()
        model[2].eval()  # its statistics are the same then
        with cache.samples(places):
            found = model(images)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert "of another shape" in str(cache.report().notes)


class TwoWide(Pictures):
    """Two samples are wide. By these seeds the first epochs have one in each batch."""

    def __getitem__(self, i):
        return self.images[i, :, :, : 5 + 3 * (i % 4 == 0)], int(self.labels[i])


@pytest.mark.parametrize(("dataset", "seed"), [(Widths(24), 0), (TwoWide(8), 4)])
def test_samples_that_a_collate_function_pads_are_always_read(dataset, seed):
    losses = []
    for cached in (False, True):
        found, cache, _ = train(
            net(), dataset, cached=cached, views=1, epochs=8, batch_size=4, start_frozen=2, t_0=0.9,
            loader_arguments={"collate_fn": padded, "seed": seed},
        )  # fmt: skip
        losses.append(found)
    assert cache.report().hits and not cache.report().samples_skipped
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-4, atol=1e-5)


def test_a_data_set_that_has_become_longer_is_an_error():
    dataset = Pictures()

    def grow(epoch, freezeout, cache):
        if epoch == 2:
            dataset.images = torch.cat([dataset.images, dataset.images])

    with pytest.raises(ValueError, match="dataset must keep its length, it had 32 samples and has 64 now"):
        train(net(), dataset, on_epoch=grow)


def test_targets_that_have_changed_are_an_error_once_they_are_read_again():
    dataset = Pictures()

    def relabel(epoch, freezeout, cache):
        if epoch == 3:
            dataset.labels = 3 - dataset.labels

    with pytest.raises(RuntimeError, match=r"kept targets .* differ from the same view read anew"):
        train(net(), dataset, on_epoch=relabel, epochs=12, views=1, start_frozen=2, t_0=0.9)


@pytest.mark.parametrize("data", ["inf", "nan"])
def test_features_that_are_not_finite_are_no_error_of_the_order(data):
    dataset = Pictures()
    dataset.images[3] = float(data)
    cache = train(net(), dataset, epochs=2)[1]
    assert "not finite" in str(cache.report().notes)


@pytest.mark.parametrize("content", ["", "{", "[1]", "null", '"x"', b"\xff\xfe"])
@pytest.mark.parametrize("name", ["views.json", "frozen-2/store.json"])
def test_a_damaged_description_of_a_folder_is_named(name, content, tmp_path):
    folder = tmp_path / "store"
    keep = {"views": 1, "start_frozen": 2, "t_0": 0.9, "epochs": 2, "cache_arguments": {"store": folder}}
    train(net(), Pictures(), **keep)[1].close()
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=r"store must hold what was written there, .*json is damaged"):
        train(net(), Pictures(), **keep)


@pytest.mark.parametrize("name", ["frozen-2", "items"])
@pytest.mark.parametrize("length", [0, 100, None])
def test_a_folder_whose_copy_was_cut_off_is_emptied(name, length, tmp_path):
    folder = tmp_path / "store"
    keep = {"views": 1, "start_frozen": 2, "t_0": 0.9, "epochs": 3, "cache_arguments": {"store": folder}}
    random.seed(0), np.random.seed(0)
    losses, cache, _ = train(net(), Pictures(), **keep)
    cache.close()
    column = folder / name / "column-0"
    if length is None:
        column.unlink()
    else:
        column.write_bytes(column.read_bytes()[:length])
    again, cache, _ = train(net(), Pictures(), **keep)
    cache.close()
    torch.testing.assert_close(again, losses, rtol=1e-4, atol=1e-5)
    assert json.loads((folder / name / "store.json").read_text())


def test_an_empty_path_is_no_store(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match='store must be "device", "host" or a path, got an empty one'):
        FeatureCache(Pictures(), store="")
    assert not list(tmp_path.iterdir())
