"""A run with kept features that is stopped within an epoch goes on as the run that never stopped."""

import copy

import pytest
import torch
from feature_cases import Pictures, small_net
from torch import nn

from freezeout_ext import FeatureCache, FreezeOut

# In memory nothing outlives the process: what is computed anew in other batches is equal within rounding.
WITHIN_ROUNDING = {"rtol": 1e-4, "atol": 1e-5}
STORES = pytest.mark.parametrize("store", ["memory", "folder"])


def cache_of(dataset, store, tmp_path, name):
    where = tmp_path / f"kept-{name}" if store == "folder" else "host"
    return FeatureCache(dataset, views=2, store=where, measure=False)


def assert_same(model, other, store):
    for (name, a), b in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        close = {"rtol": 0, "atol": 0} if store == "folder" else WITHIN_ROUNDING
        torch.testing.assert_close(a, b, **close, msg=lambda m, name=name: f"{name}: {m}")


class Killed(BaseException):
    pass


@STORES
@pytest.mark.parametrize("stop", [3, 8, 12, 18])
def test_a_plain_loop(tmp_path, store, stop):
    """4 batches an epoch: stopped within one, at an end, and once all is kept."""
    torch.manual_seed(0)
    start, dataset, found = small_net(), Pictures(32), []
    for name, parts in (("whole", (24,)), ("parts", (stop, 24))):
        state = None
        for last in parts:
            model, cache = copy.deepcopy(start), cache_of(dataset, store, tmp_path, name)
            loader, optimizer = cache.loader(8), torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
            freezeout = FreezeOut(
                model, optimizer, total_steps=24, start_frozen=1, t_0=1.0, scale_lr=False, cache=cache
            )
            everything = model, freezeout, optimizer, cache, loader
            for what, saved in zip(everything, state or [], strict=False):
                what.load_state_dict(saved)
            while freezeout.step_count < last:
                for inputs, targets, keys in loader:
                    with cache.samples(keys):
                        nn.functional.cross_entropy(model(inputs), targets).backward()
                    optimizer.step()
                    optimizer.zero_grad()
                    freezeout.step()
                    if freezeout.step_count == last:
                        break
            state = [copy.deepcopy(what.state_dict()) for what in everything]
            cache.close()
        found.append(model)
    assert_same(*found, store)
    if store == "folder" and stop >= 8:  # all 64 views lie there; the batch that is watched is computed again
        assert cache.report().misses <= 8 and cache.report().hits >= 8 * (24 - stop - 1)


def test_a_loader_says_where_it_is_and_goes_on_there():
    loader, numbers = FeatureCache(Pictures(21), views=2).loader(4), []
    assert loader.state_dict() == {"epoch": 0, "step": 0}
    for i, batch in enumerate(loader):
        numbers.append(batch[2].tolist())
        assert loader.state_dict() == ({"epoch": 0, "step": i + 1} if i < 5 else {"epoch": 1, "step": 0})
    other = FeatureCache(Pictures(21), views=2).loader(4)
    other.load_state_dict({"epoch": 0, "step": 4})
    assert other.state_dict() == {"epoch": 0, "step": 4}
    other.set_epoch(0)  # as trainers do
    assert [batch[2].tolist() for batch in other] == numbers[4:]
    assert len([*other]) == 6  # the next epoch is whole
    other.load_state_dict({"epoch": 0, "step": 4})
    other.set_epoch(3)
    assert len([*other]) == 6
    for state in ({"epoch": -1, "step": 0}, {"epoch": 0, "step": 7}):
        with pytest.raises(ValueError, match="state_dict must be of epochs of 6 batches"):
            other.load_state_dict(state)


@STORES
@pytest.mark.parametrize("accumulation", [1, 2])
def test_transformers_trainer(tmp_path, store, accumulation):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    from test_features_models import Sentences, padded, transformers_model

    from freezeout_ext.integrations.transformers import add_freezeout

    model, dataset, found = transformers_model("bert"), Sentences(20), []

    class StopAt(transformers.TrainerCallback):
        def __init__(self, step):
            self.step = step

        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == self.step:
                raise Killed

    for name, parts in (("whole", (None,)), ("parts", (8, None))):  # 5 batches an epoch
        for i, stop in enumerate(parts):
            cache = cache_of(dataset, store, tmp_path, name)
            trainer = transformers.Trainer(
                model=copy.deepcopy(model), train_dataset=dataset, data_collator=padded,
                args=transformers.TrainingArguments(
                    output_dir=str(tmp_path / name), per_device_train_batch_size=4, num_train_epochs=6,
                    learning_rate=1e-3, gradient_accumulation_steps=accumulation, save_steps=7, report_to=[],
                    use_cpu=True, disable_tqdm=True, seed=1,
                ),
                callbacks=[StopAt(stop)],
            )  # fmt: skip
            callback = add_freezeout(trainer, start_frozen=3, t_0=0.9, cache=cache)
            if stop is None:
                trainer.train(resume_from_checkpoint=str(tmp_path / name / "checkpoint-7") if i else None)
            else:
                with pytest.raises(Killed):
                    trainer.train()
            cache.close()
        found.append(trainer.model)
        assert callback.freezeout.step_count == {1: 30, 2: 18}[accumulation]
        assert cache.report().hits
    assert_same(*found, store)


@STORES
@pytest.mark.parametrize("saved", [6, 8])  # within an epoch of 4 batches, and at its last batch
@pytest.mark.filterwarnings("ignore")
def test_lightning(tmp_path, store, saved):
    pl = pytest.importorskip("lightning.pytorch")
    from freezeout_ext.integrations.lightning import FreezeOutCallback

    class Module(pl.LightningModule):
        def __init__(self, net, stop):
            super().__init__()
            self.net, self.stop, self.keys = net, stop, []

        def training_step(self, batch, _):
            if self.global_step == self.stop:
                raise Killed
            self.keys.append(batch[2].tolist())
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)

    torch.manual_seed(0)
    net, dataset, found = small_net(), Pictures(32), []
    for name, parts in (("whole", (None,)), ("parts", (10, None))):
        keys = []
        for i, stop in enumerate(parts):
            cache = cache_of(dataset, store, tmp_path, name)
            module = Module(copy.deepcopy(net), stop)
            saves = pl.callbacks.ModelCheckpoint(tmp_path / name, every_n_train_steps=saved, save_top_k=-1)
            trainer = pl.Trainer(
                max_epochs=6, callbacks=[FreezeOutCallback(start_frozen=1, scale_lr=False, cache=cache), saves],
                accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
                default_root_dir=tmp_path,
            )  # fmt: skip
            path = tmp_path / name / f"epoch=1-step={saved}.ckpt"
            if stop is None:
                trainer.fit(module, cache.loader(8), ckpt_path=path if i else None)
            else:
                with pytest.raises(Killed):
                    trainer.fit(module, cache.loader(8))
            keys = keys[:saved] + module.keys
            cache.close()
        found.append((module, keys))
        assert trainer.global_step == 24 and cache.report().hits + cache.report().pushed
    assert found[0][1] == found[1][1]
    assert_same(found[0][0], found[1][0], store)


@STORES
def test_accelerate(tmp_path, store):
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state(True)
    torch.manual_seed(0)
    net, dataset, found = small_net(), Pictures(32), []
    for name, parts in (("whole", (24,)), ("parts", (6, 24))):  # 4 batches an epoch
        saved = None
        for last in parts:
            accelerator, cache = accelerate.Accelerator(cpu=True), cache_of(dataset, store, tmp_path, name)
            model = copy.deepcopy(net)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
            freezeout = FreezeOut(model, optimizer, total_steps=24, start_frozen=1, scale_lr=False, cache=cache)
            loader, prepared, optimizer = accelerator.prepare(cache.loader(8), model, optimizer)
            accelerator.register_for_checkpointing(freezeout, cache)
            if saved:
                accelerator.load_state(saved)
            begun = freezeout.step_count
            for epoch in range(begun // 4, 6):
                loader.set_epoch(epoch)
                skipped = begun % 4 if epoch == begun // 4 else 0
                for inputs, targets, keys in accelerator.skip_first_batches(loader, skipped) if skipped else loader:
                    with cache.samples(keys):
                        loss = nn.functional.cross_entropy(prepared(inputs), targets)
                    accelerator.backward(loss)
                    optimizer.step()
                    optimizer.zero_grad()
                    freezeout.step()
                    if freezeout.step_count == last:
                        break
                if freezeout.step_count == last:
                    break
            saved = accelerator.save_state(str(tmp_path / f"state-{name}"))
            cache.close()
        found.append(model)
    assert_same(*found, store)
