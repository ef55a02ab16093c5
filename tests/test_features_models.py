"""Kept features in timm's and Transformers' nets and a U-Net: keyword arguments, tuples, padding, several frontiers."""

import copy

import pytest
import torch
from feature_cases import Pictures
from timm_models import MISSING, importable_timm
from torch import nn

from freezeout_ext import FeatureCache, FreezeOut

CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def run(model, dataset, loss_of, *, cached, epochs=4, batch_size=4, views=1, collate_fn=None, **freezing):
    """-> (losses, cache) of a run whose views are the same with and without the cache."""
    torch.manual_seed(3)
    cache = FeatureCache(dataset, views=views, measure=False)
    loader = cache.loader(batch_size, collate_fn=collate_fn)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01, momentum=0.9)
    freezing = {"start_frozen": 2, "t_0": 0.7, "max_transitions": 2, "scale_lr": False, **freezing}
    freezeout = FreezeOut(model, optimizer, total_steps=epochs * len(loader), cache=cache, **freezing)
    losses = []
    model.train()
    for _ in range(epochs):
        for batch in loader:
            keys = batch.pop("keys") if isinstance(batch, dict) else batch[-1]
            if cached:
                with cache.samples(keys):
                    loss = loss_of(model, batch)
            else:
                loss = loss_of(model, batch)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            freezeout.step()
            losses.append(loss.item())
    return losses, cache


def compare(model, dataset, loss_of, **arguments):
    ours = copy.deepcopy(model)
    cached, cache = run(ours, dataset, loss_of, cached=True, **arguments)
    ever, _ = run(model, dataset, loss_of, cached=False, **arguments)
    report = cache.report()
    assert report.hits + report.pushed > len(cached), str(report)
    assert not [note for note in report.notes if "not kept" in note], str(report)
    torch.testing.assert_close(torch.tensor(cached), torch.tensor(ever), **CLOSE)
    for (name, a), b in zip(ours.state_dict().items(), model.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, **CLOSE, msg=lambda m, name=name: f"{name}: {m}")
    return report


def classify(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


@pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
@pytest.mark.parametrize("name", ["tf_efficientnet_lite0", "vit_tiny_patch16_224", "resnet18"])
def test_timm_nets(name):
    torch.manual_seed(0)
    arguments = {"img_size": 32, "depth": 4, "patch_size": 8} if "vit" in name else {}
    with importable_timm() as timm:
        model = timm.create_model(name, num_classes=4, **arguments)
        report = compare(model, Pictures(12, (3, 32, 32)), classify, start_frozen=3)
    assert report.samples_skipped


class Sentences(torch.utils.data.Dataset):
    """Token lists of 3 to 9 tokens."""

    def __init__(self, count=16, *, longest=9):
        generator = torch.Generator(device="cpu").manual_seed(2)
        lengths = torch.randint(3, longest + 1, (count,), generator=generator).tolist()
        self.tokens = [torch.randint(1, 50, (n,), generator=generator).tolist() for n in lengths]

    def __len__(self):
        return len(self.tokens)

    def __getitem__(self, i):
        return {"input_ids": self.tokens[i], "labels": i % 2}


def padded(items):
    length = max(len(item["input_ids"]) for item in items)
    ids = torch.tensor([item["input_ids"] + [0] * (length - len(item["input_ids"])) for item in items])
    return {
        "input_ids": ids,
        "attention_mask": (ids != 0).long(),
        "labels": torch.tensor([item["labels"] for item in items]),
    }


def transformers_model(kind, *, use_cache=False, embd_pdrop=0.0):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    small = {"num_labels": 2}
    if kind == "bert":
        config = transformers.BertConfig(
            vocab_size=50, hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=32, **small
        )
        return transformers.BertForSequenceClassification(config)
    if kind == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=50,
            n_embd=16,
            n_layer=4,
            n_head=2,
            n_positions=32,
            pad_token_id=0,
            use_cache=use_cache,
            embd_pdrop=embd_pdrop,
            **small,
        )
        return transformers.GPT2ForSequenceClassification(config)
    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=16,
        patch_size=4,
        **small,
    )
    return transformers.ViTForImageClassification(config)


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_transformers_text_in_padded_batches_of_different_lengths(kind):
    model = transformers_model(kind)
    compare(model, Sentences(), lambda model, batch: model(**batch).loss, collate_fn=padded, start_frozen=3)


def without_needless_mask(items):
    batch = padded(items)
    return batch if bool((batch["attention_mask"] == 0).any()) else batch | {"attention_mask": None}


def test_a_batch_with_none_for_its_mask_is_read_whole():
    model = transformers_model("bert")
    loss_of = lambda model, batch: model(**batch).loss  # noqa: E731
    compare(model, Sentences(longest=4), loss_of, collate_fn=without_needless_mask, start_frozen=3)


def test_a_batch_without_a_mask_is_not_kept_where_the_first_one_was_padded():
    model, losses = transformers_model("bert"), {}
    for cached in (True, False):
        losses[cached], cache = run(
            copy.deepcopy(model), Sentences(longest=4), lambda model, batch: model(**batch).loss, cached=cached,
            collate_fn=without_needless_mask, batch_size=2, start_frozen=3,
        )  # fmt: skip
        assert not cached or any("no attention_mask" in note for note in cache.report().notes)
    torch.testing.assert_close(torch.tensor(losses[True]), torch.tensor(losses[False]), **CLOSE)


def test_what_frozen_layers_may_not_do_is_refused_by_name_and_with_what_helps():
    model = transformers_model("gpt2", use_cache=True, embd_pdrop=0.1)
    _, cache = run(model, Sentences(), lambda model, batch: model(**batch).loss, cached=True, collate_fn=padded)
    note = next(note for note in cache.report().notes if "not kept" in note)
    assert cache.report().kept == ("transformer.wte",)  # what froze first is still read back
    assert "set p = 0 in transformer.drop" in note and "model.config.use_cache = False" in note


def test_transformers_vit_and_its_pictures_are_not_decoded_again():
    class Named(Pictures):
        def __getitem__(self, i):
            x, y = super().__getitem__(i)
            return {"pixel_values": x, "labels": y % 2}

    model, dataset = transformers_model("vit"), Named(12, (3, 16, 16))
    report = compare(model, dataset, lambda model, batch: model(**batch).loss, start_frozen=2)
    assert report.samples_skipped > 12


class UNet(nn.Module):
    """Two levels down and up; what was frozen on the way down is read on the way up."""

    def __init__(self):
        super().__init__()
        self.down = nn.ModuleList([self._block(3, 4), self._block(4, 6)])
        self.middle = self._block(6, 6)
        self.up = nn.ModuleList([self._block(12, 4), self._block(8, 4)])
        self.head = nn.Conv2d(4, 2, 1)

    @staticmethod
    def _block(inputs, outputs):
        return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU())

    def forward(self, x):
        skips = []
        for block in self.down:
            x = block(x)
            skips.append(x)
            x = nn.functional.max_pool2d(x, 2)
        x = self.middle(x)
        for block, skip in zip(self.up, reversed(skips), strict=True):
            x = block(torch.cat([nn.functional.interpolate(x, scale_factor=2), skip], 1))
        return self.head(x)


class Segments(Pictures):
    def __getitem__(self, i):
        x, _ = super().__getitem__(i)
        return x, (x[0] > 0).long()


def test_a_u_net_keeps_several_frozen_outputs_and_its_masks():
    torch.manual_seed(0)
    model = UNet()
    layers = ["down.0", "down.1", "middle", "up.0", ["up.1", "head"]]
    report = compare(model, Segments(12, (3, 8, 8)), classify, layers=layers, start_frozen=3, t_0=1.0)
    assert set(report.kept) == {"down.0", "down.1", "middle"} and report.samples_skipped
