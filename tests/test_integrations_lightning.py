"""FreezeOutCallback on a real Lightning fit, and the same fit stopped and resumed from Lightning's own checkpoint."""

import pytest
import torch
import torch.nn.functional as F

pl = pytest.importorskip("lightning.pytorch", reason="Lightning is not installed: pip install freezeout_ext[lightning]")

from freezeout_ext.freezeout import FreezeOut  # noqa: E402
from freezeout_ext.integrations.lightning import FreezeOutCallback  # noqa: E402
from freezeout_ext.models import build_model  # noqa: E402

BATCHES, EPOCHS = 4, 4
pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's advice on loggers, workers and modules in eval mode


class Module(pl.LightningModule):
    def __init__(self, scheduler=False):
        super().__init__()
        torch.manual_seed(0)
        self.net = build_model("wrn-10-1", in_channels=1, image_size=8)
        self.scheduler = scheduler

    def training_step(self, batch, _):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        if self.scheduler:
            return [optimizer], [torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.5**epoch)]
        return optimizer


def loader():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(8 * BATCHES, 1, 8, 8, generator=generator)
    return torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(inputs, torch.randint(0, 10, (8 * BATCHES,), generator=generator)), batch_size=8
    )


def fit(folder, net=None, epochs=EPOCHS, checkpoint=None, accumulate=1, **arguments):
    net = net or Module()
    callback = FreezeOutCallback(**{"t_0": 0.5, **arguments})
    trainer = pl.Trainer(
        max_epochs=epochs,
        callbacks=[callback],
        accumulate_grad_batches=accumulate,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer.fit(net, loader(), ckpt_path=checkpoint)
    return net, callback, trainer


def by_hand():
    module = Module()
    optimizer = module.configure_optimizers()
    freezeout = FreezeOut(module.net, optimizer, total_steps=BATCHES * EPOCHS, t_0=0.5)
    for _ in range(EPOCHS):
        for batch in loader():
            optimizer.zero_grad()
            module.training_step(batch, 0).backward()
            optimizer.step()
            freezeout.step()
    return module, freezeout


def assert_same(mine, theirs):
    for name, value in theirs.state_dict().items():
        assert torch.equal(mine.state_dict()[name], value), name


def test_a_fit_is_the_plain_loop(tmp_path):
    module, callback, _ = fit(tmp_path)
    expected, freezeout = by_hand()
    assert callback.freezeout.step_count == BATCHES * EPOCHS == callback.freezeout.schedule.total_steps
    assert [t.step for t in callback.freezeout.transitions] == [t.step for t in freezeout.transitions]
    assert callback.freezeout.num_frozen == 4
    assert_same(module, expected)


def test_a_resumed_fit_is_bit_identical(tmp_path):
    expected, _, _ = fit(tmp_path, total_steps=BATCHES * EPOCHS)
    _, callback, trainer = fit(tmp_path, epochs=2, total_steps=BATCHES * EPOCHS)
    assert 0 < callback.freezeout.num_frozen < 4
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    resumed, resumed_callback, _ = fit(tmp_path, checkpoint=tmp_path / "half.ckpt", total_steps=BATCHES * EPOCHS)
    assert len(resumed_callback.freezeout.transitions) == 4
    assert_same(resumed, expected)


def test_accumulation_counts_optimizer_steps(tmp_path):
    _, callback, trainer = fit(tmp_path, accumulate=2)
    assert callback.freezeout.step_count == trainer.global_step == BATCHES * EPOCHS // 2
    assert callback.freezeout.schedule.total_steps == BATCHES * EPOCHS // 2


def test_without_annealing_the_users_own_scheduler_stays(tmp_path):
    module, callback, trainer = fit(tmp_path, Module(scheduler=True), anneal=False, t_0=0.3, how_scale="linear")
    assert 0 < callback.freezeout.num_frozen == 4
    plain = Module(scheduler=True)
    (optimizer,), (scheduler,) = plain.configure_optimizers()
    freezeout = FreezeOut(
        plain.net, optimizer, total_steps=BATCHES * EPOCHS, t_0=0.3, how_scale="linear",
        anneal=False, schedulers=[scheduler],
    )  # fmt: skip
    for epoch in range(EPOCHS):
        assert freezeout.learning_rates()[-1] == 0.1 * 0.5**epoch
        for batch in loader():
            optimizer.zero_grad()
            plain.training_step(batch, 0).backward()
            optimizer.step()
            freezeout.step()
        scheduler.step()
    assert_same(module, plain)
    kept = trainer.lr_scheduler_configs[0].scheduler
    assert len(kept.base_lrs) == len(kept.lr_lambdas) == len(kept.optimizer.param_groups) == 5
    callback.freezeout.close()
    assert len(kept.base_lrs) == len(kept.lr_lambdas) == len(kept.optimizer.param_groups) == 1


class Adversaries(pl.LightningModule):
    """The second optimizer steps at every batch, the first at every second one."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.automatic_optimization = False
        self.net = torch.nn.ModuleDict({name: build_model("wrn-10-1", in_channels=1, image_size=8) for name in "ab"})

    def training_step(self, batch, index):
        for i, optimizer in enumerate(self.optimizers()):
            if i or index % 2:
                optimizer.zero_grad()
                self.manual_backward(F.cross_entropy(self.net["ab"[i]](batch[0]), batch[1]))
                optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.SGD(net.parameters(), lr=0.1) for net in self.net.values()]


def test_optimizers_that_step_unequally_often_end_the_schedule_with_the_run(tmp_path):
    _, callback, trainer = fit(tmp_path, Adversaries(), module="net.a")
    assert trainer.global_step == 1.5 * BATCHES * EPOCHS
    assert callback.freezeout.step_count == callback.freezeout.schedule.total_steps == BATCHES * EPOCHS
    assert callback.freezeout.learning_rates() == pytest.approx([0.0] * 5)


def test_an_lr_scheduler_and_an_endless_run_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"must return no LR scheduler: .* FreezeOutCallback\(anneal=False"):
        fit(tmp_path, Module(scheduler=True))
    with pytest.raises(ValueError, match="must have max_steps or max_epochs"):
        fit(tmp_path, epochs=-1)


def test_a_module_that_is_no_submodule_is_named(tmp_path):
    with pytest.raises(TypeError, match="module must be the name of a submodule or None, got Linear"):
        FreezeOutCallback(module=torch.nn.Linear(1, 1), t_0=0.5)
    with pytest.raises(ValueError, match="module must be a submodule of the LightningModule, got 'nobody'"):
        fit(tmp_path, Module(), module="nobody")
