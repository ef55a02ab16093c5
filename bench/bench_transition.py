"""What one transition costs, and freezeout.step() when nothing is due.

pytest bench/bench_transition.py --benchmark-json=bench/results/transition.json
"""

import pytest
import torch

from freezeout_ext import FreezeOut, FusedSGD
from freezeout_ext.models import build_model
from freezeout_ext.training.measure import conditions

NETS = ("wrn-40-4", "densenet-76-12", "vgg-16")
THREADS = 1


def trained(name: str, total_steps: int) -> tuple[FreezeOut, FusedSGD]:
    """A net whose optimizer holds its momentum, and its FreezeOut."""
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    model = build_model(name, 100)
    optimizer = FusedSGD(model.parameters(), lr=1e-3, momentum=0.9, nesterov=True)
    freezeout = FreezeOut(model, optimizer, total_steps=total_steps, t_0=0.5, how_scale="linear")
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    optimizer.zero_grad()
    return freezeout, optimizer


@pytest.mark.parametrize("name", NETS)
def test_transition_of_one_layer(benchmark, name):
    freezeout, optimizer = trained(name, total_steps=10_000)
    state, momentum = freezeout.state_dict(), optimizer.state_dict()
    k = len(freezeout.layers) // 2
    due = next(step for step in range(10_000) if freezeout.schedule.num_frozen(step) > k)

    def setup() -> None:
        freezeout.load_state_dict(state)  # thaws
        optimizer.load_state_dict(momentum)
        freezeout.load_state_dict({**state, "step": due - 1})
        assert freezeout.num_frozen == k

    benchmark.pedantic(freezeout.step, setup=setup, rounds=30, warmup_rounds=2)
    assert freezeout.num_frozen == k + 1 and freezeout.transitions[-1].state_bytes_freed > 0
    benchmark.extra_info |= {"layers": len(freezeout.layers), **conditions(torch.device("cpu"))}


@pytest.mark.parametrize("name", NETS)
def test_step_when_nothing_is_due(benchmark, name):
    freezeout, optimizer = trained(name, total_steps=10**9)
    freezeout.step()
    benchmark.pedantic(freezeout.step, rounds=200, iterations=10, warmup_rounds=20)
    assert freezeout.num_frozen == 0 and freezeout.step_count > 2000
    factor = freezeout.schedule.lr_factor(0, freezeout.step_count)
    assert optimizer.param_groups[0]["lr"] == 1e-3 * factor
    benchmark.extra_info |= {"layers": len(freezeout.layers), **conditions(torch.device("cpu"))}
