"""One AdamW step: torch's for-loop, foreach and fused against FusedAdamW, and the time memory needs for the bytes.

pytest bench/bench_fused_adamw.py --benchmark-json=bench/results/fused_adamw.json

Rivals take turns in one process. Times are medians and minima in microseconds. `ratio` is torch fused over FusedAdamW.
A step moves 28 bytes a parameter: it reads p, the gradient and both moments, and writes p and both moments.
"add" moves as many bytes by a.add_(b), which reads two thirds of them.
On one CPU thread times are that thread's CPU time, which other processes hardly change.
Where torch sees a GPU the benchmark runs there, and each time includes the wait for the device.
"""

import fused_cases as cases
import pytest
import torch

from freezeout_ext import FusedAdamW

SECONDS = 2.0  # of measuring, for each case
OPTIONS = {"lr": 1e-3, "weight_decay": 0.05}
RIVALS = {
    "FusedAdamW": lambda groups: FusedAdamW(groups, **OPTIONS),
    "torch for-loop": lambda groups: torch.optim.AdamW(groups, **OPTIONS, foreach=False),
    "torch foreach": lambda groups: torch.optim.AdamW(groups, **OPTIONS, foreach=True),
    "torch fused": lambda groups: torch.optim.AdamW(groups, **OPTIONS, fused=True),
}
NETS = ("densenet-76-12", "wrn-40-4", "resnet-50", "vit-s", "465 tensors")


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("grouping", cases.GROUPINGS)
@pytest.mark.parametrize("net", NETS)
def test_step(benchmark, net, grouping, threads):
    cases.measure(benchmark, RIVALS, net, grouping, bytes_each=28, cold=False, threads=threads, seconds=SECONDS)


@pytest.mark.parametrize("net", NETS)
def test_step_with_cold_caches(benchmark, net):
    cases.measure(benchmark, RIVALS, net, "one group a layer", bytes_each=28, cold=True, threads=1, seconds=SECONDS)
