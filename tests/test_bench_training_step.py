"""bench/bench_training_step.py on the CPU: tiny nets, one turn, a short epoch."""

import json

import pytest
import torch
from load_script import BENCH, load_script


@pytest.fixture(scope="module")
def bench():
    load_script(BENCH / "turns.py")
    module = load_script(BENCH / "bench_training_step.py")
    module.WARM_UP_STEPS = module.COMPARED_STEPS + 1
    return module


def case(bench, net, frozen):
    return bench.Case(net, frozen, batch=4, image=8, device=torch.device("cpu"), amp=None)


@pytest.mark.parametrize("net", ["wrn-10-1", "densenet-10-4"])
def test_all_arms_train_the_same(bench, net):
    found, arms = bench.measure(case(bench, net, 0.5), rounds=2, steps=1)
    ours = {"ours", "ours, exact", "ours, bf16", "graph, off", "graph, exact", "graph, bf16"}
    assert found["milliseconds"].keys() == {"authors"} | ours and found["over_authors"]["authors"] == 1
    assert all(value > 0 for value in found["milliseconds"].values())
    # Plain freezing in both: nothing but the update's last bits.
    assert found["losses"]["ours"] == pytest.approx(found["losses"]["authors"], rel=1e-5)
    assert len(set(found["losses"]["authors"])) == bench.COMPARED_STEPS
    authors, layers = arms["authors"], bench.find_layers(authors_model := bench.build_model(net))
    trainable = {name: p.requires_grad for name, p in arms["authors"].model.named_parameters()}
    names = {p: name for name, p in authors_model.named_parameters()}
    trained = [all(trainable[names[p]] for p in layer.parameters.values()) for layer in layers]
    assert trained == [i >= len(layers) // 2 for i in range(len(layers))]
    assert len(authors.optimizer.param_groups) == sum(trained)
    assert arms["ours, exact"].freezeout.num_frozen == len(layers) // 2
    assert found["frozen"] == f"{len(layers) // 2} of {len(layers)}"
    json.dumps(found, allow_nan=False)
    split = bench.images_of_an_epoch(12, authors.case)
    assert bench.epoch_seconds(authors, split, 4) > 0


def test_nothing_frozen(bench):
    found, _ = bench.measure(case(bench, "wrn-10-1", 0.0), rounds=1, steps=1)
    assert found["milliseconds"].keys() == {"authors", "ours", "graph, off"} and found["frozen"].startswith("0 of")


def test_arms_that_train_something_else_are_refused(bench, monkeypatch):
    step = bench.Ours.step
    monkeypatch.setattr(bench.Ours, "step", lambda self, x, y: step(self, x * 0.5, y))
    with pytest.raises(AssertionError, match=r"ours: loss .* in step 0, the authors'"):
        bench.measure(case(bench, "wrn-10-1", 0.0), rounds=1, steps=1)
