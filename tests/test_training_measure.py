"""What is said to be measured, against counts by hand."""

import io
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from freezeout_ext.memory import SavedBytes, held_memory
from freezeout_ext.tasks import built_in
from freezeout_ext.training import measure
from freezeout_ext.training import trainer as trainer_module
from freezeout_ext.training.config import TrainConfig
from freezeout_ext.training.measure import (
    Phase,
    StepTimer,
    conditions,
    steps_error,
    threads_wait,
    transitions_measured,
)
from freezeout_ext.training.reporters import LineReporter
from freezeout_ext.training.run import Run


@pytest.fixture
def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))


def saved_bytes(net):
    saved = SavedBytes(net)
    with saved.watch():
        net(torch.ones(5, 4)).sum().backward()
    return saved.total


def test_saved_bytes_by_hand(net):
    # The input [5, 4] for the first weight's gradient; ReLU's result [5, 3], which the second Linear saves too; the
    # second weight is a parameter.
    assert saved_bytes(net) == 4 * (5 * 4 + 5 * 3)
    net[0].requires_grad_(False)
    assert saved_bytes(net) == 4 * (5 * 3)
    net.requires_grad_(False)[2].bias.requires_grad_(True)
    assert saved_bytes(net) == 0


def test_saved_bytes_do_not_change_the_gradients(net):
    net(torch.ones(5, 4)).sum().backward()
    plain = net[0].weight.grad.clone()
    net.zero_grad()
    saved_bytes(net)
    assert torch.equal(net[0].weight.grad, plain)


def test_held_memory_by_hand(net):
    net.register_buffer("count", torch.zeros(6, dtype=torch.float64))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    parameters = 4 * (4 * 3 + 3 + 3 * 2 + 2)
    assert held_memory(net, [optimizer], None).held == 48 + 2 * parameters
    net(torch.ones(5, 4)).sum().backward()
    optimizer.step()
    assert held_memory(net, [optimizer], None).held == 48 + 3 * parameters
    first = list(net[0].parameters())
    for p in first:
        p.requires_grad_(False)
        del optimizer.state[p]
    assert held_memory(net, [optimizer], None).held == 48 + 3 * parameters - 2 * 4 * (4 * 3 + 3)


def test_step_timer_times_what_lies_between_marks(monkeypatch):
    clock = iter([10.0, 10.5, 12.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    timer = StepTimer(torch.device("cpu"))
    for _ in range(3):
        timer.mark()
    assert timer.seconds() == [0.5, 1.5]


def test_cpu_time_stands_still_while_others_run():
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = StepTimer(torch.device("cpu"))
        torch.set_num_threads(2)
        several = StepTimer(torch.device("cpu"))
        for timer in (alone, several):
            timer.mark()
        time.sleep(0.2)
        for timer in (alone, several):
            timer.mark()
    finally:
        torch.set_num_threads(threads)
    assert alone.seconds()[0] >= 0.2 > 0.1 > alone.cpu_seconds()[0]
    assert several.cpu_seconds() == []


def test_transitions_lie_between_their_phases():
    phases = [
        Phase(0, 0, 5, [1.0, 3.0, 2.0], memory=30),
        Phase(2, 5, 3, [], memory=20),
        Phase(3, 8, 2, [0.5], memory=10),
    ]
    transitions = [{"step": step} for step in (5, 8, 10)]  # the last one came with the last step
    names = [f"{what}_{side}" for what in ("seconds_per_step", "memory_bytes") for side in ("before", "after")]
    assert [tuple(map(row.get, names)) for row in transitions_measured(transitions, phases)] == [
        (2.0, None, 30, 20),
        (None, 0.5, 20, 10),
        (0.5, None, 10, None),
    ]
    assert phases[0].summary() == {
        "num_frozen": 0,
        "first_step": 0,
        "steps": 5,
        "seconds_per_step": 2.0,
        "seconds_per_step_mean": 2.0,
        "seconds_error": pytest.approx(1.2533 * 1.0 / 3**0.5),
        "cpu_seconds_per_step": None,
        "cpu_seconds_per_step_mean": None,
        "cpu_seconds_error": None,
        "memory_bytes": 30,
    }


def test_the_error_of_a_phase_knows_that_neighbours_slow_down_together():
    assert steps_error([1.0, 1.2] * 50) == 0  # ten stretches, all of median 1.1
    # Of their medians half are 1.0: the median is 1.1, and every deviation from it 0.1.
    drifting = [1.0] * 20 + [1.2] * 30 + [1.0] * 30 + [1.2] * 20
    assert steps_error(drifting) == pytest.approx(1.2533 * 1.4826 * 0.1 / 10**0.5)


def test_conditions_name_this_machine():
    found = conditions(torch.device("cpu"))
    assert found["device"] == "cpu" and found["torch"] == torch.__version__
    assert found["threads"] == torch.get_num_threads()
    assert found["cpu"]


def test_commit_is_that_of_the_checkout_alone(monkeypatch, tmp_path):
    # Installed within some other project's checkout: its commit says nothing about this package.
    root = Path(measure.__file__).resolve().parents[2]
    answers = {"rev-parse --show-toplevel": str(root), "rev-parse HEAD": "abc", "status": " M file"}

    def git(command, **_):
        key = next(key for key in answers if " ".join(command[3:]).startswith(key))
        return type("Done", (), {"stdout": answers[key] + "\n"})

    monkeypatch.setattr(measure.subprocess, "run", git)
    assert measure._commit() == "abc+"
    answers["rev-parse --show-toplevel"] = str(tmp_path)
    assert measure._commit() is None


def test_threads_that_wait_for_each_other_are_told_of():
    quiet, busy = [0.070, 0.074, 0.090] * 7, [0.39, 1.4, 6.4] * 7
    assert threads_wait([*quiet, 3.0], 2) is None  # one hiccup is none
    assert threads_wait(quiet, 2) is None and threads_wait(busy, 1) is None and threads_wait(busy[:9], 2) is None
    assert threads_wait(busy, 2).startswith("steps take from 390 to 6400 ms: the 2 threads wait for each other")


def test_a_run_says_so_once(tmp_path, monkeypatch):
    monkeypatch.setattr(Run, "told_of_threads", False)
    monkeypatch.setattr(trainer_module, "threads_wait", lambda seconds, threads: f"{len(seconds)} steps on {threads}")
    stream = io.StringIO()
    config = TrainConfig(model="wrn-10-1", epochs=2, batch_size=256, threads=1, device="cpu", method="full")
    for name in ("a", "b"):
        run = Run.prepare(config, tmp_path / name, task=built_in("digits", "wrn-10-1"))
        run.train(LineReporter(stream))
    assert stream.getvalue().count("note: 4 steps on 1\n") == 1
