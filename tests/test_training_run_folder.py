"""What a run leaves on disk: a stop at any moment loses nothing, and what is damaged is one sentence."""

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
from test_training_run import CONFIG, Stop, assert_same_run, run, task_of

from freezeout_ext.tasks.images import load_data
from freezeout_ext.training import run_folder
from freezeout_ext.training.config import BadInput
from freezeout_ext.training.reporters import Reporter
from freezeout_ext.training.run import Run
from freezeout_ext.training.run_folder import RunFolder

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
