"""What is shown: lines, tables, the live bar, TensorBoard."""

import io
import sys

import pytest

from freezeout_ext.text import table
from freezeout_ext.training import reporters, tables
from freezeout_ext.training.reporters import BarReporter, LineReporter, Reporters, TensorBoardReporter

TRANSITION = {
    "step": 12,
    "num_frozen": 1,
    "layers": ["stem"],
    "parameters_frozen": 1440,
    "state_bytes_freed": 5760,
    "seconds": 0.001,
    "seconds_per_step_before": 0.02,
    "seconds_per_step_after": None,
    "memory_bytes_before": 3 * 2**20,
    "memory_bytes_after": 2**20,
}
ROW = {
    "epoch": 2,
    "step": 12,
    "train_loss": 0.51234,
    "train_accuracy": 0.75,
    "test_loss": 0.6,
    "test_accuracy": 0.8125,
    "learning_rates": [0.0, 0.05],
    "num_frozen": 1,
    "seconds_per_step": 0.0123,
    "seconds_per_step_mean": 0.0125,
    "examples_per_second": 5120.4,
    "train_seconds": 0.3,
    "peak_memory_bytes": 3 * 2**20,
    "transitions": [TRANSITION],
}


class FakeTrainer:
    epochs, total_steps, step, layer_names = 10, 60, 6, ("stem", "head")

    class config:
        title = "digits, wrn-10-1"


def test_line_reporter():
    stream = io.StringIO()
    reporter = LineReporter(stream)
    reporter.start(FakeTrainer)
    reporter.step(7)
    reporter.epoch(ROW)
    assert stream.getvalue().splitlines() == [
        "step 12: froze stem (1 of 2 layers; 1,440 parameters, 5,760 bytes of optimizer state freed);"
        " 20.00 ms -> - ms a step",
        "epoch  2/10  loss 0.5123  train 75.00 %  test 81.25 %  frozen 1/2  12.30 ms/step  5,120 samples/s  3.0 MiB",
    ]


def test_val_accuracy_is_shown_where_there_is_one():
    assert "train 75.00 %  val 50.00 %  test" in tables.epoch_line(ROW | {"val_accuracy": 0.5}, 10, 2)


def test_table():
    assert table([("name", "n"), ("a", "12"), ("long one", "3")], left=[0]) == (
        "name       n\n"
        "--------  --\n"
        "a         12\n"
        "long one   3"
    )  # fmt: skip


def test_run_summary_by_hand():
    phase = {"num_frozen": 0, "first_step": 0, "steps": 7, "seconds_per_step": 0.0125, "memory_bytes": 3 * 2**20}
    result = {
        "phases": [phase, phase | {"num_frozen": 1, "first_step": 7, "seconds_per_step": None}],
        "transitions": [{"step": 7, "num_frozen": 1, "layers": ["stem"], "parameters_frozen": 9}],
        "layers": ["stem", "head"],
        "memory_measured": "counted",
        "test_accuracy": 0.5,
        "total_steps": 14,
        "train_seconds": 1.25,
    }
    lines = tables.as_text(tables.run_blocks(result)).splitlines()
    assert lines[2].split() == ["0", "0", "of", "2", "7", "12.50", "3.0"]
    assert lines[3].split() == ["7", "1", "of", "2", "stem", "7", "-", "3.0"]
    assert lines[4:] == ["", "peak memory: counted", "test accuracy 50.00 % after 14 steps, 1.2 s of training"]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_bar_keeps_the_lines_and_shows_where_the_run_is(monkeypatch):
    monkeypatch.setattr(reporters, "REFRESH_SECONDS", 0.0)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")
    stream = Terminal()
    reporter = BarReporter(stream, title="full, seed 0")
    reporter.start(FakeTrainer)
    reporter.step(31)
    reporter.epoch(ROW)
    reporter.close()
    shown = stream.getvalue()
    assert "epoch  2/10  loss 0.5123" in shown and "full, seed 0" in shown and "31/60" in shown


def test_bar_can_leave_out_the_epochs():
    stream = Terminal()
    reporter = BarReporter(stream, epochs=False)
    reporter.start(FakeTrainer)
    reporter.epoch(ROW)
    reporter.close()
    assert "epoch" not in stream.getvalue()


def test_live_bar_needs_a_terminal_and_rich(monkeypatch, capsys):
    assert not reporters.has_live_bar(io.StringIO())
    assert reporters.has_live_bar(Terminal())
    assert capsys.readouterr().err == ""
    monkeypatch.setitem(sys.modules, "rich.progress", None)
    assert not reporters.has_live_bar(Terminal())
    assert capsys.readouterr().err == "no live progress without rich: pip install 'freezeout_ext[train]'\n"


def test_tensorboard_gets_each_number(tmp_path):
    pytest.importorskip("tensorboard", reason="TensorBoard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reporter = Reporters(TensorBoardReporter(tmp_path / "tb"))
    reporter.start(FakeTrainer)
    reporter.epoch(ROW)
    reporter.close()
    events = EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {
        *(name for name in ROW if name not in ("learning_rates", "transitions")),
        "learning_rate/00 stem",
        "learning_rate/01 head",
    }
    (event,) = events.Scalars("test_accuracy")
    assert (event.step, event.value) == (12, 0.8125)


def test_tensorboard_missing_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(
        ValueError, match=r"--tensorboard needs TensorBoard: pip install 'freezeout_ext\[tensorboard\]'"
    ):
        TensorBoardReporter(tmp_path / "tb")
    assert not (tmp_path / "tb").exists()


def test_a_long_evaluation_says_how_far_it_is(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(reporters.time, "perf_counter", lambda: now[0])
    stream = io.StringIO()
    reporter = Reporters(reporters.Reporter(), LineReporter(stream))
    reporter.start(FakeTrainer)
    for done in range(4):
        reporter.evaluating(done, 4)
        now[0] += 1.5
    assert stream.getvalue().splitlines()[-1].endswith("evaluating, batches: 2 of 4, about 3 s left")
