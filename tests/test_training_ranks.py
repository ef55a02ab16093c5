"""torchrun -m freezeout_ext train: a rank killed mid-run ends the run, --resume finishes it; what is refused."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from freezeout_ext.training.config import TrainConfig
from freezeout_ext.training.ranks import Ranks

ARGUMENTS = [
    "--data", "digits", "--model", "wrn-10-1", "--epochs", "6", "--threads", "1", "--t0", "0.5", "--device", "cpu",
]  # fmt: skip


@pytest.fixture
def torchrun(tmp_path):
    started = []

    def start(*arguments):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        command += ["-m", "freezeout_ext", "train", *ARGUMENTS, *arguments, "--out", str(tmp_path / "run")]
        started.append(
            subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
        )
        return started[-1]

    yield start
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def workers(process) -> dict[int, int]:
    """rank -> process id of the children of torchrun."""
    found = {}
    for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
        for entry in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
            if entry.startswith(b"RANK="):
                found[int(entry[5:])] = int(pid)
    return found


@pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="this torch has no gloo backend")
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds the worker to kill through /proc")
def test_a_killed_rank_ends_the_run_and_resume_finishes_it(torchrun, tmp_path):
    first = torchrun()
    log = tmp_path / "run" / "log.jsonl"
    deadline = time.monotonic() + 90
    while not (log.exists() and log.read_text().count("\n") >= 1):
        assert first.poll() is None and time.monotonic() < deadline, first.communicate()[0]
        time.sleep(0.05)
    os.kill(workers(first)[1], signal.SIGKILL)
    output, _ = first.communicate(timeout=60)
    assert first.returncode != 0 and "Signal 9 (SIGKILL)" in output
    assert not (tmp_path / "run" / "result.json").exists()

    output, _ = (second := torchrun("--resume")).communicate(timeout=90)
    assert second.returncode == 0, output
    assert "KiB of gradients a step" in output
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    assert [row["epoch"] for row in rows] == list(range(1, 7))
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["processes"] == 2 and result["test_accuracy"] > 0.8  # one process reaches 0.95
    assert result["traffic"][-1]["num_frozen"] == 4
    assert result["traffic"][-1]["gradient_bytes"] < result["traffic"][0]["gradient_bytes"] / 50


def test_what_several_processes_refuse():
    with pytest.raises(ValueError, match="multiple of the 3 processes"):
        Ranks(0, 3).check(TrainConfig(batch_size=64))
    with pytest.raises(ValueError, match="graph must be off"):
        Ranks(0, 2).check(TrainConfig(graph=True))
    Ranks().check(TrainConfig(graph=True, batch_size=7))
