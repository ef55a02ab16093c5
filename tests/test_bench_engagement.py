"""bench/bench_engagement.py with a tiny net: what is timed, what is written, and what is in the noise."""

import json
import sys

import pytest
import torch
from load_script import BENCH, load_script


@pytest.fixture
def bench(monkeypatch):
    module = load_script(BENCH / "bench_engagement.py")
    monkeypatch.setattr(module, "keep_freed_memory", lambda: None)  # for the whole process
    return module


def test_each_repetition_times_every_number_of_frozen_layers(bench):
    frozen = bench.FrozenSteps("wrn-10-1", torch.randn(2, 3, 8, 8), torch.tensor([0, 1]))
    seen = []
    frozen._step = lambda: seen.append((frozen.freezeout.num_frozen, frozen.model.stem.weight.requires_grad))
    ticks = iter(range(1000))
    # The clock is read twice a step: each takes one tick.
    frozen.clock = lambda: float(next(ticks))
    assert frozen.seconds(3) == [1.0] * 5
    counts = {k: sum(n == k for n, _ in seen) for k in range(5)}
    assert counts == {0: 10, 1: 5, 2: 5, 3: 5, 4: 5}
    assert all(needs == (k == 0) for k, needs in seen)


def test_writes_savings_with_their_errors(bench, tmp_path, capsys, monkeypatch):
    out = tmp_path / "engagement.json"
    flags = f"--nets wrn-10-1 --batch-size 4 --image-size 8 --minutes 0 --steps 1 --out {out}"
    monkeypatch.setattr(sys, "argv", ["bench", *flags.split()])
    bench.main()
    (net,) = json.loads(out.read_text())["nets"]
    assert net["repetitions"] == bench.LEAST_REPETITIONS and net["clock"] == "thread_time"
    assert [row["num_frozen"] for row in net["transitions"]] == [1, 2, 3, 4]
    shown = capsys.readouterr().out
    for row in net["transitions"]:
        assert row["predicted_error"] > 0 and row["measured_error"] > 0
        noise = (row["predicted_error"] ** 2 + row["measured_error"] ** 2) ** 0.5
        if row["predicted_saving"] > 3 * noise:
            assert row["engagement"] == pytest.approx(row["measured_saving"] / row["predicted_saving"])
            assert f"{row['engagement']:.2f} ± {row['engagement_error']:.2f}" in shown
        else:
            assert row["engagement"] is None and "in the noise" in shown
