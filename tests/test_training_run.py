"""Training runs: what they log, that their config decides the weights, and that a run goes on where it stopped."""

import json
from dataclasses import replace

import pytest
import torch

from freezeout_ext import FreezeOut, FusedSGD, Schedule
from freezeout_ext.tasks import Task
from freezeout_ext.tasks.images import image_task, load_data
from freezeout_ext.training.config import TrainConfig
from freezeout_ext.training.reporters import Reporter
from freezeout_ext.training.run import Run
from freezeout_ext.training.run_folder import RunFolder
from freezeout_ext.training.trainer import Trainer, TrainingFailed

# 96 images: 6 steps an epoch, 5 layers.
CONFIG = TrainConfig(model="wrn-10-1", epochs=3, batch_size=16, t_0=0.6, how_scale="cubic", threads=1, device="cpu")
TIMES = {"seconds_per_step", "seconds_per_step_mean", "examples_per_second", "train_seconds"}


def small(name, **options):
    """The first 96 training and 100 test images."""
    data = load_data(name, **options)

    def head(split, count):
        return replace(split, images=split.images[:count], labels=split.labels[:count])

    return replace(data, train=head(data.train, 96), test=head(data.test, 100))


def task_of(config, data):
    return image_task(data, config.model, augment=config.augment)


def trainer_of(config, data):
    return Trainer(config.resolved(), task_of(config, data))


def run(config, out, digits, *, resume=False, reporter=None):
    return Run.prepare(config, out, resume=resume, task=task_of(config, digits)).train(reporter or Reporter())


def untimed(rows):
    rows = [{k: v for k, v in row.items() if k not in TIMES} for row in rows]
    for row in rows:
        row["transitions"] = [
            {k: v for k, v in transition.items() if "seconds" not in k} for transition in row["transitions"]
        ]
    return rows


def assert_equal_states(a, b):
    """Every tensor and number, bit for bit."""
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a.keys() - {"train_seconds", "seconds", "cpu_seconds"}:
            assert_equal_states(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_equal_states(x, y)
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    else:
        assert a == b


def assert_same_run(a, b):
    config = RunFolder(a).load_config()
    assert_equal_states(*(RunFolder(folder).load_checkpoint(config) for folder in (a, b)))
    assert untimed(RunFolder(a).read_log()) == untimed(RunFolder(b).read_log())


def test_log_has_a_line_an_epoch(whole_run):
    out, result = whole_run
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    assert [row["step"] for row in rows] == [6, 12, 18]
    schedule = Schedule(5, 18, t_0=0.6, how_scale="cubic")
    for row in rows:
        step = row["step"]
        assert row["num_frozen"] == schedule.num_frozen(step)
        assert row["learning_rates"] == [0.1 * schedule.lr_factor(i, step) for i in range(5)]
        assert row["seconds_per_step"] > 0
        assert row["examples_per_second"] == pytest.approx(16 / row["seconds_per_step_mean"], rel=1e-9)
        for name in ("train_loss", "train_accuracy", "test_loss", "test_accuracy", "peak_memory_bytes"):
            assert row[name] > 0
    assert result["test_accuracy"] == rows[-1]["test_accuracy"]
    assert RunFolder(out).load_result() == json.loads(json.dumps(result))


def test_phases_and_transitions_fit_the_schedule(whole_run):
    _, result = whole_run
    schedule = Schedule(5, 18, t_0=0.6, how_scale="cubic")
    starts = [min(s for s in range(18) if schedule.num_frozen(s) == n) for n in range(5)]
    assert [(p["first_step"], p["num_frozen"]) for p in result["phases"]] == list(zip(starts, range(5), strict=True))
    assert sum(p["steps"] for p in result["phases"]) == 18
    assert [t["step"] for t in result["transitions"]] == starts[1:]
    for k, transition in enumerate(result["transitions"]):
        assert transition["seconds_per_step_before"] == result["phases"][k]["seconds_per_step"]
        assert transition["seconds_per_step_after"] == result["phases"][k + 1]["seconds_per_step"]
        assert transition["memory_bytes_after"] == result["phases"][k + 1]["memory_bytes"]
    # What is frozen saves nothing for backward and has neither gradient nor momentum.
    memory = [p["memory_bytes"] for p in result["phases"]]
    assert memory == sorted(memory, reverse=True)
    assert len(set(memory)) == 5


def test_equal_configs_end_in_equal_weights_and_the_seed_matters(whole_run, tmp_path, digits):
    out, _ = whole_run
    run(CONFIG, tmp_path / "again", digits)
    assert_same_run(out, tmp_path / "again")
    run(replace(CONFIG, seed=1), tmp_path / "other", digits)
    a, b = (torch.load(folder / "checkpoint.pt")["model"] for folder in (out, tmp_path / "other"))
    assert not torch.equal(a["stem.weight"], b["stem.weight"])


class Stop(BaseException):
    pass


@pytest.mark.parametrize(
    "change",
    [
        {"optimizer": "sgd", "amp": "bf16", "channels_last": True},
        {"optimizer": "adamw", "method": "full", "val_fraction": 0.1},
        {"optimizer": "fused-adamw"},
        {"method": "no-anneal", "amp": "fp16", "warmup_steps": 2},
        {"model": "densenet-10-4", "max_transitions": 2, "how_scale": 1.5, "augment": False, "steps": 14},
    ],
    ids=lambda change: "-".join(map(str, change)),
)
def test_resume_is_bit_identical_whatever_the_options(change, tmp_path, digits):
    config = replace(CONFIG, **change)
    data = small("digits", val_fraction=config.val_fraction) if config.val_fraction else digits

    class StopAt(Reporter):
        def step(self, step):
            if step == 9:
                raise Stop

    run(config, tmp_path / "whole", data)
    with pytest.raises(Stop):
        run(config, tmp_path / "stopped", data, reporter=StopAt())
    run(config, tmp_path / "stopped", data, resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")
    assert ("val_accuracy" in RunFolder(tmp_path / "whole").load_result()) == bool(config.val_fraction)
    assert (tmp_path / "whole" / "best.pt").exists() == bool(config.val_fraction)


def test_a_finished_run_stays_as_it_is(whole_run, digits):
    out, result = whole_run
    before = (out / "log.jsonl").read_text(), (out / "checkpoint.pt").read_bytes()
    again = run(CONFIG, out, digits, resume=True)
    assert ((out / "log.jsonl").read_text(), (out / "checkpoint.pt").read_bytes()) == before
    assert again["test_accuracy"] == result["test_accuracy"] and again["phases"] == result["phases"]


def test_steps_ends_within_an_epoch(tmp_path, digits):
    result = run(replace(CONFIG, steps=8), tmp_path / "run", digits)
    rows = RunFolder(tmp_path / "run").read_log()
    assert [row["step"] for row in rows] == [6, 8]
    assert result["total_steps"] == 8
    # The cosine ends where the run does.
    assert rows[-1]["learning_rates"] == [0.0] * 5


def test_options_reach_where_they_act(digits):
    trainer = trainer_of(replace(CONFIG, max_transitions=2, channels_last=True, weight_decay=0.01), digits)
    assert trainer.freezeout.schedule == Schedule(5, 18, t_0=0.6, how_scale="cubic", max_transitions=2)
    # Of more than one channel: else it is in both formats.
    convs = [p for p in trainer.model.parameters() if p.dim() == 4 and p.shape[1] > 1]
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in convs)
    for group in trainer.optimizer.param_groups:
        assert (group["momentum"], group["nesterov"], group["weight_decay"]) == (0.9, True, 0.01)
    plain = trainer_of(replace(CONFIG, optimizer="sgd", momentum=0.0, method="full"), digits)
    assert type(trainer.optimizer) is FusedSGD and type(plain.optimizer) is torch.optim.SGD
    assert (plain.optimizer.defaults["momentum"], plain.optimizer.defaults["nesterov"]) == (0.0, False)
    adam = trainer_of(replace(CONFIG, optimizer="adamw", weight_decay=0.01), digits)
    assert (type(adam.optimizer), adam.freezeout.schedule.scale_lr) == (torch.optim.AdamW, False)
    assert adam.optimizer.defaults["weight_decay"] == 0.01


def test_augment_moves_the_images(digits):
    def images(augment):
        trainer = trainer_of(replace(CONFIG, augment=augment), digits)
        return torch.cat([inputs for inputs, _ in trainer.train_batches()])

    # In another order the same pixels; digits' corners are black, so that shifts lose some of the others.
    pixels = (digits.train.images.float() - 255 * digits.train.mean[0]) / (255 * digits.train.std[0])
    # float32 sums of 6,144 values of size 1, in two orders.
    assert images(False).sum().item() == pytest.approx(pixels.sum().item(), abs=0.01)
    assert abs(images(True).sum().item() - pixels.sum().item()) > 10


def test_steps_are_of_whole_batches(digits):
    trainer = trainer_of(replace(CONFIG, batch_size=36, epochs=2), digits)
    assert [len(targets) for _, targets in trainer.train_batches()] == [36, 36]
    assert (trainer.length.steps_per_epoch, trainer.total_steps) == (2, 4)
    trainer = trainer_of(replace(CONFIG, batch_size=100, epochs=2), digits)
    assert [len(targets) for _, targets in trainer.train_batches()] == [96]
    assert trainer.total_steps == 2


def weights_after(config, digits):
    trainer = trainer_of(config, digits)
    while trainer.epoch < trainer.epochs:
        trainer.train_epoch()
    return trainer.model.state_dict()


def test_full_training_is_freezeout_that_never_freezes(digits):
    full = weights_after(replace(CONFIG, method="full", epochs=2), digits)
    never = weights_after(replace(CONFIG, t_0=1.0, epochs=2), digits)
    assert_equal_states(full, never)


def test_no_anneal_freezes_at_the_milestones_on_one_cosine(digits):
    trainer = trainer_of(replace(CONFIG, method="no-anneal"), digits)
    full = trainer_of(replace(CONFIG, method="full"), digits)
    assert trainer.learning_rates() == full.learning_rates() == [0.1] * 5
    trainer.train_epoch()
    full.train_epoch()
    frozen = trainer.num_frozen
    assert frozen == Schedule(5, 18, t_0=0.6, how_scale="cubic").num_frozen(6) > 0
    assert trainer.learning_rates() == [0.0] * frozen + full.learning_rates()[frozen:]


def test_batches_are_shuffled_anew_in_each_epoch(digits):
    trainer = trainer_of(replace(CONFIG, augment=False), digits)

    def labels():
        return [label for _, targets in trainer.train_batches() for label in targets.tolist()]

    first, in_order = labels(), digits.train.labels.tolist()
    assert labels() == first
    trainer.epoch = 1
    second = labels()
    assert len({str(order) for order in (first, second, in_order)}) == 3
    assert sorted(first) == sorted(second) == sorted(in_order)


def test_random_numbers_of_a_step_depend_on_seed_and_epoch_alone(digits):
    def drawn(seed, disturb):
        trainer, draws = trainer_of(replace(CONFIG, seed=seed), digits), []
        for _ in range(2):
            torch.rand(disturb)
            trainer.train_epoch(lambda step: draws.append(torch.rand(1).item()))
        return draws

    first = drawn(0, 0)
    assert drawn(0, 5) == first
    # Draws of 24 bits: all differ.
    assert len({*first, *drawn(1, 0)}) == 24


def test_first_rates_are_those_of_freezeout(digits):
    trainer = trainer_of(replace(CONFIG, warmup_epochs=0.5), digits)
    assert isinstance(trainer.freezeout, FreezeOut)
    assert trainer.freezeout.schedule == Schedule(5, 18, t_0=0.6, how_scale="cubic", warmup_steps=3)
    assert trainer.learning_rates() == [0.1 * trainer.freezeout.schedule.lr_factor(i, 0) for i in range(5)]


def test_evaluate_against_one_batch(digits):
    trainer = trainer_of(CONFIG, digits)
    found = trainer.evaluate("test", trainer.task.evaluation)
    loss, accuracy = found["test_loss"], found["test_accuracy"]
    images = (digits.test.images.float() / 255 - digits.test.mean[0]) / digits.test.std[0]
    with torch.no_grad():
        logits = trainer.model.eval()(images)
    # A sum of losses in another order, of inputs that another formula normalised; that may turn one image.
    assert loss == pytest.approx(torch.nn.functional.cross_entropy(logits, digits.test.labels).item(), rel=1e-5)
    assert accuracy == pytest.approx((logits.argmax(1) == digits.test.labels).double().mean().item(), abs=0.0101)


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_last_checkpoint(tmp_path, digits):
    with pytest.raises(TrainingFailed, match="loss became nan in epoch 1: lower the learning rate"):
        run(replace(CONFIG, lr=1e9), tmp_path / "run", digits)
    assert RunFolder(tmp_path / "run").read_log() == []


@pytest.mark.parametrize("what", ["test_loss", "test_accuracy"])
def test_an_evaluation_that_is_not_finite_ends_the_run_in_so_many_words(what, tmp_path, digits, monkeypatch):
    found = (float("nan"), 1.0) if what == "test_loss" else (1.0, float("nan"))
    monkeypatch.setattr(Task, "evaluate", lambda task, model, batches: found)
    with pytest.raises(TrainingFailed, match=f"{what} became nan in epoch 1"):
        run(CONFIG, tmp_path / "run", digits)
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


def test_deterministic_runs_choose_nothing_by_the_clock(digits, tmp_path, monkeypatch):
    """The engine of a folded prefix is used, however long it takes; two runs then end in the same bits."""
    config = replace(CONFIG, prefix="folded", deterministic=True)
    weights = []
    try:
        for k in range(2):
            trained = Run.prepare(config, tmp_path / str(k), task=task_of(config, digits))
            # What it is timed against would seem to take no time.
            monkeypatch.setattr("freezeout_ext.prefix.judge.median", lambda times: 0.0)
            trained.train(Reporter())
            report = trained.trainer.freezeout.prefix_report()
            assert report.fused and report.eager_ms is None
            weights.append(trained.trainer.model.state_dict())
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
