"""Training runs on a GPU as the command line makes them: eager, graphed, prefixes, precisions, a stop and a resume."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("sklearn", reason="the digits are scikit-learn's")

from freezeout_ext.tasks.images import image_task, load_data
from freezeout_ext.training.arms import make_arms
from freezeout_ext.training.compare import Comparison
from freezeout_ext.training.config import TrainConfig
from freezeout_ext.training.measure import CUDA_MEMORY
from freezeout_ext.training.reporters import Reporter
from freezeout_ext.training.run import Run

pytestmark = pytest.mark.cuda
# 14 steps an epoch; 4 of the 5 layers freeze on the way.
CONFIG = TrainConfig(
    model="wrn-10-1", epochs=6, batch_size=96, lr=0.05, t_0=0.5, how_scale="cubic", amp="off", threads=1,
    deterministic=True,
)  # fmt: skip


@pytest.fixture(autouse=True)
def settings():
    """A run sets torch's own; later tests want theirs."""
    yield
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


@pytest.fixture(scope="module")
def digits():
    return load_data("digits", device="cuda")


def train(config, out, digits, *, resume=False, reporter=None):
    task = image_task(digits, config.model)
    return Run.prepare(config, out, resume=resume, task=task).train(reporter or Reporter())


@pytest.mark.parametrize(
    ("graph", "prefix"), [(False, "off"), (False, "exact"), (False, "bf16"), (True, "exact"), (True, "bf16")]
)
def test_a_run_learns_the_digits(graph, prefix, digits, tmp_path):
    config = replace(CONFIG, device="cuda", graph=graph, prefix=prefix)
    result = train(config, tmp_path / "run", digits)
    assert result["test_accuracy"] > 0.6
    assert len(result["transitions"]) == 4 and result["memory_measured"] == CUDA_MEMORY
    phases = result["phases"]
    assert [phase["num_frozen"] for phase in phases] == [0, 1, 2, 3, 4]
    assert all(phase["memory_bytes"] > 0 for phase in phases)
    assert result["peak_memory_bytes"] == max(phase["memory_bytes"] for phase in phases)
    assert result["conditions"]["device"] == torch.cuda.get_device_name()


@pytest.mark.parametrize("store", ["device", "host"])
def test_a_captured_step_takes_kept_features_and_learns_what_the_eager_one_does(store, digits, tmp_path):
    config = replace(CONFIG, device="cuda", method="no-anneal", start_frozen=2, t_0=0.9, how_scale="linear")
    config, task = replace(config, cache=store, views=2), image_task(digits, config.model)
    found = []
    for graph in (False, True):
        run = Run.prepare(replace(config, graph=graph), tmp_path / str(graph), task=task)
        result = run.train(Reporter())
        features, step = result["features"], run.trainer.train_step
        assert features["hits"] > features["misses"] and features["pushed"]
        assert (step.replays > 20 and step.captures > 0) == graph
        assert not [note for note in features["notes"] if "not kept" in note]
        found.append(run.trainer.model.state_dict())
    for (name, a), b in zip(found[0].items(), found[1].values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


# SGD without a scaler is in test_graphed.py.
@pytest.mark.parametrize(
    ("amp", "optimizer"), [("bf16", "adamw"), ("fp16", "fused-sgd"), ("fp16", "sgd"), ("fp16", "adamw")]
)
def test_graphed_mixed_precision(amp, optimizer, digits, tmp_path):
    config = replace(CONFIG, device="cuda", graph=True, amp=amp, optimizer=optimizer, lr=None)
    assert train(config, tmp_path / "run", digits)["test_accuracy"] > 0.6


class Stop(Reporter):
    def __init__(self, epochs):
        self.epochs = epochs

    def epoch(self, row):
        if row["epoch"] == self.epochs:
            raise KeyboardInterrupt


@pytest.mark.parametrize("graph", [False, True])
def test_a_stopped_run_ends_in_the_same_weights(graph, digits, tmp_path):
    config = replace(CONFIG, device="cuda", graph=graph, prefix="exact")
    train(config, tmp_path / "whole", digits)
    for epoch in (1, 4):
        with pytest.raises(KeyboardInterrupt):
            train(config, tmp_path / "parts", digits, resume=True, reporter=Stop(epoch))
    train(config, tmp_path / "parts", digits, resume=True)
    whole, parts = (torch.load(tmp_path / name / "checkpoint.pt", map_location="cpu") for name in ("whole", "parts"))
    for (name, a), b in zip(whole["model"].items(), parts["model"].values(), strict=True):
        # A graph's rates are cos^2 of half the angle, an eager step's (1 + cos) / 2 in the host's arithmetic; after a
        # resume other steps are eager. Both come from the device's counter with FusedSGD, so they are the same.
        assert torch.equal(a, b), name


def test_compare_on_a_gpu(digits, tmp_path):
    base = replace(CONFIG, device="cuda", epochs=3)
    arms = make_arms(["full", "freezeout", "short"], [0.5], ["cubic"])
    task = image_task(digits, base.model)
    summary = Comparison(base, tmp_path / "out", arms=arms, seeds=[0], task=task).run(
        lambda title: Reporter(), say=lambda text: None
    )
    assert [arm["kind"] for arm in summary["arms"]] == ["full", "freezeout", "short"]
    assert all(arm["peak_memory_bytes"] > 0 for arm in summary["arms"])
