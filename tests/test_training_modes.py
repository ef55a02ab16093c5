"""--graph and --compile: the same training by other means."""

import json
from dataclasses import replace

import pytest
import torch
from test_freezeout import assert_same

from freezeout_ext.tasks.images import image_task, load_data
from freezeout_ext.training.config import TrainConfig
from freezeout_ext.training.optimizer import make_optimizer
from freezeout_ext.training.reporters import Reporter
from freezeout_ext.training.run import Run
from freezeout_ext.training.tables import as_text, run_blocks

BASE = TrainConfig(model="wrn-10-1", steps=14, batch_size=128, t_0=0.4, threads=1, device="cpu")


@pytest.fixture(scope="module")
def digits():
    return load_data("digits")


def task_of(data):
    return image_task(data, BASE.model)


def weights(trainer):
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def test_a_graphed_step_is_the_same_step_on_a_cpu(digits, tmp_path):
    runs = []
    for graph in (False, True):
        run = Run.prepare(replace(BASE, graph=graph), tmp_path / str(graph), task=task_of(digits))
        result = run.train(Reporter())
        runs.append((weights(run.trainer), [phase["num_frozen"] for phase in result["phases"]], result["test_loss"]))
    assert runs[1][1:] == runs[0][1:] and len(runs[0][1]) > 1
    assert_same(runs[1][0], runs[0][0])
    assert run.trainer.train_step.eager_steps == 14


@pytest.mark.parametrize(
    ("name", "place", "expected"),
    [
        ("sgd", "torch.optim.SGD", {"fused": True}),
        ("adamw", "torch.optim.AdamW", {"fused": True, "capturable": True}),
        ("fused-sgd", "freezeout_ext.training.optimizer.FusedSGD", {}),
    ],
)
def test_optimizers_of_a_graph_on_cuda_keep_their_rates_on_the_device(name, place, expected, monkeypatch):
    made = {}
    monkeypatch.setattr(place, lambda parameters, **options: made.update(options))
    make_optimizer(replace(BASE, graph=True, lr=0.1, device="cuda", optimizer=name), None, [])
    assert {key: made[key] for key in ("fused", "capturable") if key in made} == expected


def test_compiled_runs_have_few_transitions_and_say_how_many_graphs(digits, tmp_path, monkeypatch):
    assert replace(BASE, compile=True).resolved().max_transitions == 4
    assert replace(BASE, compile=True, max_transitions=2).resolved().max_transitions == 2
    # Dynamo and its guards are those of a real run; only the code generator is left out, which takes minutes.
    original = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: original(f, **{**options, "backend": "eager"}))
    torch._dynamo.reset()
    for method in ("freezeout", "full"):
        config = replace(BASE, method=method, compile=True, max_transitions=2)
        run = Run.prepare(config, tmp_path / method, task=task_of(digits))
        result = run.train(Reporter())
        expected = Run.prepare(replace(config, compile=False), tmp_path / f"{method}-eager", task=task_of(digits))
        expected.train(Reporter())
        assert_same(weights(run.trainer), weights(expected.trainer))
        graphs = json.loads((tmp_path / method / "result.json").read_text())["graphs_compiled"]
        assert sum(graphs.values()) > 0
        assert set(graphs) == {str(phase["num_frozen"]) for phase in result["phases"]}
        assert "graphs compiled: " in as_text(run_blocks(result))
