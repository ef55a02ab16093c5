"""Training runs: what they log, that their config decides the weights, that a stop at any moment loses nothing."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import zipfile
from dataclasses import replace

import pytest
import torch

from freezeout_ext import FreezeOut, FusedSGD, Schedule
from freezeout_ext.tasks.images import image_task, load_data
from freezeout_ext.training import run_folder
from freezeout_ext.training.config import BadInput, TrainConfig
from freezeout_ext.training.reporters import Reporter
from freezeout_ext.training.run import Run
from freezeout_ext.training.run_folder import RunFolder
from freezeout_ext.training.trainer import Trainer, TrainingFailed

# 96 images: 6 steps an epoch, 5 layers.
CONFIG = TrainConfig(model="wrn-10-1", epochs=3, batch_size=16, t_0=0.6, how_scale="cubic", threads=1, device="cpu")
TIMES = {"seconds_per_step", "seconds_per_step_mean", "examples_per_second", "train_seconds"}


@pytest.fixture(scope="module")
def digits():
    return small("digits")


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


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory, digits):
    """CONFIG trained without a stop: (folder, result)."""
    out = tmp_path_factory.mktemp("run") / "whole"
    return out, run(CONFIG, out, digits)


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


KILLED = """
import os, signal, sys
from freezeout_ext.training import cli, commands
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
def step(self, step):
    if step == 5:
        os.kill(os.getpid(), getattr(signal, sys.argv[1]))
commands.LineReporter.step = step
sys.exit(cli.main(sys.argv[2:]))
"""
# 3 steps an epoch.
KILLED_FLAGS = "train --model wrn-10-1 --epochs 2 --batch-size 448 --t0 0.6 --threads 1 --device cpu"


def test_killed_within_an_epoch_goes_on_to_the_same_weights(tmp_path):
    config = replace(CONFIG, epochs=2, batch_size=448)
    data = load_data("digits")
    whole = run(config, tmp_path / "whole", data)
    for name, status in (("SIGKILL", -signal.SIGKILL), ("SIGINT", 130)):
        out = tmp_path / name
        killed = subprocess.run(
            [sys.executable, "-c", KILLED, name, *KILLED_FLAGS.split(), "--out", str(out)],
            capture_output=True,
            text=True,
            timeout=300,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert killed.returncode == status, killed.stderr
        if name == "SIGINT":
            assert len(killed.stderr.strip().splitlines()) == 1 and "--resume" in killed.stderr
        assert len(RunFolder(out).read_log()) == 1
        result = run(config, out, data, resume=True)
        assert_same_run(tmp_path / "whole", out)
        assert result["test_accuracy"] == whole["test_accuracy"]


class Stop(BaseException):
    pass


STOPS = [
    *((os, name, call) for name in ("fsync", "replace") for call in (1, 2, 3, 4)),
    *((RunFolder, name, call) for name in ("append_log", "save_checkpoint") for call in (1, 2)),
    (RunFolder, "save_result", 1),
]


@pytest.mark.parametrize(("owner", "name", "call"), STOPS, ids=[f"{name}-{call}" for _, name, call in STOPS])
def test_stopped_while_writing_goes_on_to_the_same_weights(owner, name, call, whole_run, tmp_path, digits, monkeypatch):
    calls = []

    def stop(*args):
        calls.append(args)
        if len(calls) == call:
            raise Stop
        return original(*args)

    original = getattr(owner, name)
    monkeypatch.setattr(owner, name, stop)
    with pytest.raises(Stop):
        run(CONFIG, tmp_path / "run", digits)
    monkeypatch.undo()
    run(CONFIG, tmp_path / "run", digits, resume=True)
    assert_same_run(whole_run[0], tmp_path / "run")


def test_a_file_is_old_or_new_never_half(tmp_path):
    path = tmp_path / "file"

    def tear(file):
        file.write(b"half")
        file.flush()
        raise Stop

    run_folder.write_atomically(path, lambda file: file.write(b"old"))
    with pytest.raises(Stop):
        run_folder.write_atomically(path, tear)
    assert path.read_bytes() == b"old"
    run_folder.write_atomically(path, lambda file: file.write(b"new"))
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_log_is_cut_back_to_the_checkpoint(whole_run, tmp_path, digits):
    out = tmp_path / "run"

    class StopAfterLog(Reporter):
        def step(self, step):
            if step == 14:
                raise Stop

    with pytest.raises(Stop):
        run(CONFIG, out, digits, reporter=StopAfterLog())
    log = out / "log.jsonl"
    rows = RunFolder(out).read_log()
    assert len(rows) == 2
    with log.open("a") as file:
        file.write(json.dumps(rows[1] | {"epoch": 3, "train_loss": -1.0}) + '\n{"epoch": 4, "tr')
    run(CONFIG, out, digits, resume=True)
    assert_same_run(whole_run[0], out)


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
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


def test_resume_refuses_another_config_by_the_field(whole_run, digits):
    out, _ = whole_run
    with pytest.raises(BadInput, match=r"another one: lr is 0\.1 there, 0\.2 here$"):
        run(replace(CONFIG, lr=0.2), out, digits, resume=True)
    with pytest.raises(BadInput, match="out must not hold a run yet"):
        run(CONFIG, out, digits)


def test_checkpoint_of_another_run_and_broken_ones(whole_run, tmp_path, digits):
    folder = RunFolder(tmp_path)
    folder.create(CONFIG.resolved())
    folder.unlock()
    whole = (whole_run[0] / "checkpoint.pt").read_bytes()
    for content in (b"", b"not a checkpoint", whole[:1000], whole[: len(whole) // 2]):
        folder.checkpoint_path.write_bytes(content)
        with pytest.raises(BadInput, match=r"checkpoint\.pt is not a checkpoint that can be read"):
            run(CONFIG, tmp_path, digits, resume=True)
    state = torch.load(whole_run[0] / "checkpoint.pt")
    state["config"]["seed"] = 7
    folder.save_checkpoint(state)
    with pytest.raises(BadInput, match=r"checkpoint\.pt is of another run: seed is 7 there, 0 here$"):
        run(CONFIG, tmp_path, digits, resume=True)


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


def damaged(state, change):
    return {**state, **change(state)} if callable(change) else change


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda state: {"step": -5}, "epoch 3 does not end at step -5"),
        (lambda state: {"epoch": -1}, "epoch -1 does not end at step 18"),
        (lambda state: {"epoch": "x"}, "cannot be gone on from: TypeError"),
        (lambda state: {"model": {}}, "Missing key"),
        (lambda state: {"optimizer": {"state": {}, "param_groups": []}}, "cannot be gone on from"),
        (lambda state: {"freezeout": {}}, "cannot be gone on from"),
        (lambda state: {"phases": state["phases"][1:]}, "its phases do not add up to step 18"),
        (lambda state: {"phases": [{"odd": 1}]}, "cannot be gone on from: TypeError"),
        (torch.zeros(3), "it must hold a dict, got Tensor"),
        ({"config": {}}, "it lacks epoch, freezeout, model"),
    ],
)
def test_a_readable_checkpoint_with_something_wrong_is_one_sentence(change, sentence, whole_run, tmp_path, digits):
    shutil.copytree(whole_run[0], tmp_path / "run")
    state = torch.load(tmp_path / "run" / "checkpoint.pt")
    torch.save(damaged(state, change), tmp_path / "run" / "checkpoint.pt")
    with pytest.raises(BadInput, match=f"checkpoint.pt.*{sentence}"):
        run(CONFIG, tmp_path / "run", digits, resume=True)


def test_a_flipped_bit_anywhere_in_the_weights_is_refused(whole_run, tmp_path, digits):
    shutil.copytree(whole_run[0], tmp_path / "run")
    path = tmp_path / "run" / "checkpoint.pt"
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        entries = [info for info in archive.infolist() if "/data/" in info.filename and info.file_size > 8]
    for info in entries[::3]:
        blob = bytearray(whole)
        # A local header has 30 bytes, the name and what the two bytes at 28 say.
        header = info.header_offset
        start = header + 30 + len(info.filename) + int.from_bytes(blob[header + 28 : header + 30], "little")
        blob[start + info.file_size // 2] ^= 0x10
        path.write_bytes(blob)
        with pytest.raises(BadInput, match="not a checkpoint that can be read"):
            run(CONFIG, tmp_path / "run", digits, resume=True)


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"[]\n{}\n", b"[" * 100_000])
def test_a_damaged_log_is_one_sentence(content, whole_run, tmp_path, digits):
    shutil.copytree(whole_run[0], tmp_path / "run")
    (tmp_path / "run" / "log.jsonl").write_bytes(content)
    with pytest.raises(BadInput, match="must have a row for each of the checkpoint's 3 epochs, it has 0"):
        run(CONFIG, tmp_path / "run", digits, resume=True)
    assert (tmp_path / "run" / "log.jsonl").read_bytes() == content


def test_a_folder_in_use_is_refused_and_free_again_after_a_kill(tmp_path, digits):
    out = tmp_path / "run"
    prepared = Run.prepare(CONFIG, out, task=task_of(CONFIG, digits))
    with pytest.raises(BadInput, match="out must not be in use, another process is training"):
        run(CONFIG, out, digits, resume=True)
    prepared.train(Reporter())
    run(CONFIG, out, digits, resume=True)
    # A child of fork, such as a loader's worker that outlives a killed process, does not hold the lock.
    code = (
        "import os, signal, sys, time\n"
        "from freezeout_ext.training.run_folder import RunFolder\n"
        "folder = RunFolder(sys.argv[1])\n"
        "folder.lock()\n"
        "if os.fork() == 0:\n"
        "    print(os.getpid(), flush=True)\n"
        "    time.sleep(60)\n"
        "    os._exit(0)\n"
        "time.sleep(0.5)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    killed = subprocess.Popen([sys.executable, "-c", code, str(out)], stdout=subprocess.PIPE, text=True)
    child = int(killed.stdout.readline())
    try:
        assert killed.wait(timeout=60) == -signal.SIGKILL
        os.kill(child, 0)  # it lives
        folder = RunFolder(out)
        folder.lock()
        folder.unlock()
    finally:
        os.kill(child, signal.SIGKILL)


def test_what_cannot_be_written_leaves_nothing_half_and_goes_on_later(tmp_path, digits, monkeypatch):
    out = tmp_path / "run"
    save = torch.save

    def no_room(state, file):
        file.write(b"half")
        raise RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0") from OSError(
            errno.ENOSPC, "No space left on device"
        )

    monkeypatch.setattr(torch, "save", no_room)
    with pytest.raises(OSError, match="No space left on device"):
        run(CONFIG, out, digits)
    monkeypatch.setattr(torch, "save", save)
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "log.jsonl"]
    run(CONFIG, out, digits, resume=True)
    assert [row["epoch"] for row in RunFolder(out).read_log()] == [1, 2, 3]
