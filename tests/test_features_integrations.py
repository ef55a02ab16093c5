"""Kept features in Lightning, Transformers' Trainer, Accelerate, and two processes under DistributedDataParallel."""

import copy

import pytest
import torch
from feature_cases import Pictures, small_net
from torch import nn

from freezeout_ext import FeatureCache, FreezeOut

CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.mark.filterwarnings("ignore")
def test_lightning(tmp_path):
    pl = pytest.importorskip("lightning.pytorch")
    from freezeout_ext.integrations.lightning import FreezeOutCallback

    class Module(pl.LightningModule):
        def __init__(self, net):
            super().__init__()
            self.net, self.losses = net, []

        def training_step(self, batch, _):
            inputs, targets, _ = batch
            loss = nn.functional.cross_entropy(self.net(inputs), targets)
            self.losses.append(loss.item())
            return loss

        def validation_step(self, batch, _):
            self.net(batch[0])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.05)

    torch.manual_seed(0)
    net, dataset, losses = small_net(), Pictures(16), []
    validation = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(dataset.images), batch_size=8)
    for cached in (True, False):
        cache = FeatureCache(dataset, views=2, measure=False)
        callback = FreezeOutCallback(start_frozen=1, t_0=0.5, scale_lr=False, cache=cache)
        if not cached:
            callback.on_train_batch_start = lambda *_: None
        module = Module(copy.deepcopy(net))
        trainer = pl.Trainer(
            max_epochs=6, callbacks=[callback], accelerator="cpu", logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
        )  # fmt: skip
        trainer.fit(module, cache.loader(8), validation)
        losses.append(module.losses)
        assert bool(cache.report().hits) == cached
        assert len(module.losses) == 12 == callback.freezeout.step_count
    torch.testing.assert_close(torch.tensor(losses[0]), torch.tensor(losses[1]), **CLOSE)


def test_transformers_trainer(tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    from test_features_models import Sentences, padded, transformers_model

    from freezeout_ext.integrations.transformers import add_freezeout

    class WithNumbers(Sentences):
        def __getitem__(self, i):
            return super().__getitem__(i) | {"number": i}  # which the model does not take

    def with_numbers(items):
        numbers = {"number": torch.tensor([item["number"] for item in items])} if "number" in items[0] else {}
        return padded(items) | numbers

    model, dataset, losses = transformers_model("bert"), WithNumbers(16), []
    for cached in (True, False):
        cache = FeatureCache(dataset, views=1, measure=False)
        trainer = transformers.Trainer(
            model=copy.deepcopy(model), train_dataset=dataset, data_collator=with_numbers,
            args=transformers.TrainingArguments(
                output_dir=str(tmp_path), per_device_train_batch_size=4, num_train_epochs=5, learning_rate=1e-3,
                logging_steps=1, report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no", seed=1,
            ),
        )  # fmt: skip
        callback = add_freezeout(trainer, start_frozen=3, t_0=0.6, cache=cache)
        if not cached:
            step = trainer.training_step
            cache.samples = lambda keys: torch.enable_grad()
            assert step is not None
        trainer.train()
        losses.append([row["loss"] for row in trainer.state.log_history if "loss" in row])
        assert callback.freezeout.step_count == 20
        assert bool(cache.report().hits) == cached
    torch.testing.assert_close(torch.tensor(losses[0]), torch.tensor(losses[1]), rtol=1e-3, atol=2e-4)  # rounded logs


def test_accelerate():
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state(True)
    torch.manual_seed(0)
    net, dataset, losses = small_net(), Pictures(16), []
    for cached in (True, False):
        accelerator = accelerate.Accelerator(cpu=True)
        cache = FeatureCache(dataset, views=1, measure=False)
        loader = accelerator.prepare(cache.loader(8))
        model, optimizer = copy.deepcopy(net), None
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        freezeout = FreezeOut(model, optimizer, total_steps=10, start_frozen=1, scale_lr=False, cache=cache)
        prepared, optimizer = accelerator.prepare(model, optimizer)
        found = []
        for _ in range(5):
            for inputs, targets, keys in loader:
                if cached:
                    with cache.samples(keys):
                        loss = nn.functional.cross_entropy(prepared(inputs), targets)
                else:
                    loss = nn.functional.cross_entropy(prepared(inputs), targets)
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
                freezeout.step()
                found.append(loss.item())
        losses.append(found)
        assert bool(cache.report().hits) == cached
    torch.testing.assert_close(torch.tensor(losses[0]), torch.tensor(losses[1]), **CLOSE)


def two_processes(rank, folder, results):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    found = {}
    for cached in (True, False):
        torch.manual_seed(0)
        model = small_net()
        cache = FeatureCache(Pictures(18), views=1, measure=False, store=f"{folder}/store" if cached else "device")
        loader = cache.loader(4)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        freezeout = FreezeOut(model, optimizer, total_steps=100, start_frozen=1, t_0=1.0, cache=cache)
        spread = nn.parallel.DistributedDataParallel(model)
        losses, samples = [], set()
        for _ in range(5):
            for inputs, targets, keys in loader:
                samples |= set(keys.tolist())
                if cached:
                    with cache.samples(keys):
                        loss = nn.functional.cross_entropy(spread(inputs), targets)
                else:
                    loss = nn.functional.cross_entropy(spread(inputs), targets)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                freezeout.step()
                losses.append(loss.item())
        weights = torch.cat([p.detach().flatten() for p in model.parameters()])
        found[cached] = losses, sorted(samples), cache.report().hits, weights
        cache.close()
        del spread
    torch.save(found, f"{results}/{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_two_processes_own_a_part_each_and_train_as_without_the_cache(tmp_path):
    context = torch.multiprocessing.get_context("spawn")
    workers = [context.Process(target=two_processes, args=(rank, str(tmp_path), str(tmp_path))) for rank in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(240)
    assert [worker.exitcode for worker in workers] == [0, 0]
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for found in ranks:
        torch.testing.assert_close(torch.tensor(found[True][0]), torch.tensor(found[False][0]), **CLOSE)
        assert found[True][2] > 0 and found[True][1] == found[False][1]
    assert not set(ranks[0][True][1]) & set(ranks[1][True][1])
    assert torch.equal(ranks[0][True][3], ranks[1][True][3])
    assert (tmp_path / "store" / "rank-1-of-2").is_dir()
