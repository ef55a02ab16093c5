"""Fine-tuning a tiny randomly initialised BERT with Transformers' Trainer, and Accelerate's wrappers."""

import pytest
import torch

transformers = pytest.importorskip(
    "transformers", reason="Transformers is not installed: pip install freezeout_ext[transformers]"
)
accelerate = pytest.importorskip(
    "accelerate", reason="Accelerate is not installed: pip install freezeout_ext[transformers]"
)

from freezeout_ext.freezeout import FreezeOut  # noqa: E402
from freezeout_ext.integrations.transformers import add_freezeout  # noqa: E402

STEPS, WARMUP = 24, 3


def model():
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
        num_labels=2,
    )
    return transformers.BertForSequenceClassification(config)


def examples(count=64):
    ids = torch.randint(0, 50, (count, 8), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": int(row[0] >= 25)} for row in ids]


def trainer(folder, **arguments):
    return transformers.Trainer(
        model=model(),
        train_dataset=examples(),
        args=transformers.TrainingArguments(
            output_dir=str(folder),
            per_device_train_batch_size=8,
            max_steps=STEPS,
            learning_rate=3e-3,
            warmup_steps=WARMUP,
            save_steps=14,
            logging_steps=1,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            seed=1,
            **arguments,
        ),
    )


def test_fine_tuning_freezes_on_schedule_and_resumes_bit_identically(tmp_path):
    whole = trainer(tmp_path)
    callback = add_freezeout(whole, t_0=0.6)
    whole.train()
    freezeout = callback.freezeout
    assert freezeout.step_count == freezeout.schedule.total_steps == STEPS
    assert [layer.name for layer in freezeout.layers] == [
        "bert.embeddings", *(f"bert.encoder.layer.{i}" for i in range(3)), "bert.pooler", "classifier",
    ]  # fmt: skip
    assert freezeout.num_frozen == 5 and not freezeout.schedule.scale_lr  # AdamW
    rates = [entry["learning_rate"] for entry in whole.state.log_history if "learning_rate" in entry]
    assert rates == pytest.approx([3e-3 * freezeout.schedule.lr_factor(5, step) for step in range(STEPS)])

    frozen_at_save = freezeout.schedule.num_frozen(14)
    assert 0 < frozen_at_save < 5
    resumed = trainer(tmp_path)
    callback = add_freezeout(resumed, t_0=0.6)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-14"))
    assert callback.freezeout.num_frozen == 5
    assert [t.layers for t in callback.freezeout.transitions] == [t.layers for t in freezeout.transitions]
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name


def test_frozen_layers_stay_in_eval_mode_though_the_trainer_calls_train_each_step(tmp_path):
    run = trainer(tmp_path, save_strategy="no", gradient_accumulation_steps=2)
    callback = add_freezeout(run, t_0=0.6)
    run.train()
    assert callback.freezeout.step_count == STEPS  # optimizer steps, not batches
    run.model.train()
    assert not any(module.training for layer in callback.freezeout.layers[:5] for module in layer.submodules)


def test_without_annealing_the_trainers_own_scheduler_stays(tmp_path):
    run = trainer(tmp_path, save_strategy="no")
    callback = add_freezeout(run, t_0=0.6, anneal=False)
    run.train()
    assert isinstance(run.lr_scheduler, torch.optim.lr_scheduler.LambdaLR)
    assert callback.freezeout.num_frozen == 5


def test_training_twice_starts_anew(tmp_path):
    run = trainer(tmp_path, save_strategy="no")
    callback = add_freezeout(run, t_0=0.6)
    run.train()
    run.train()
    assert callback.freezeout.step_count == STEPS and len(callback.freezeout.transitions) == 5


def test_a_trainer_with_a_scheduler_is_refused(tmp_path):
    run = trainer(tmp_path)
    run.create_optimizer_and_scheduler(STEPS)
    with pytest.raises(ValueError, match="must not have an LR scheduler"):
        add_freezeout(run)


def test_accelerate_prepares_and_checkpoints_what_freezeout_holds(tmp_path):
    def run(steps, load=None):
        net = model()
        optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
        freezeout = FreezeOut(net, optimizer, total_steps=STEPS, t_0=0.6, warmup_steps=WARMUP)
        accelerate.state.AcceleratorState._reset_state(True)  # another test's may be on a GPU
        accelerator = accelerate.Accelerator(cpu=True)
        net, optimizer = accelerator.prepare(net, optimizer)
        accelerator.register_for_checkpointing(freezeout)
        if load:
            accelerator.load_state(str(load))
        net.train()
        for step in range(freezeout.step_count, steps):
            row = examples()[step : step + 8]
            batch = {key: torch.stack([torch.as_tensor(one[key]) for one in row]) for key in row[0]}
            accelerator.backward(net(**batch).loss)
            optimizer.step()
            optimizer.zero_grad()
            freezeout.step()
        return accelerator, net, freezeout

    torch.manual_seed(1)
    accelerator, net, freezeout = run(14)
    assert 0 < freezeout.num_frozen < 5
    accelerator.save_state(str(tmp_path / "half"))
    seed = torch.get_rng_state()
    _, resumed, _ = run(STEPS, load=tmp_path / "half")
    torch.set_rng_state(seed)
    net.train()
    for step in range(14, STEPS):
        row = examples()[step : step + 8]
        batch = {key: torch.stack([torch.as_tensor(one[key]) for one in row]) for key in row[0]}
        net(**batch).loss.backward()
        freezeout.optimizer.step()
        freezeout.optimizer.zero_grad()
        freezeout.step()
    for name, value in net.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
