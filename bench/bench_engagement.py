"""Measured over predicted saving of a step, after each transition, for one small net of each family.

    python bench/bench_engagement.py --out bench/results/engagement.json

The prediction comes from forward and backward of each layer (freezeout_ext.planner); the measured steps are FreezeOut's
own. Both are measured in turn, round by round, so that what slows the machine slows all. With one thread the clock is
that thread's CPU time, which does not run while other programs have the core.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch.nn import functional

from freezeout_ext import FreezeOut, FusedSGD
from freezeout_ext.models import build_model
from freezeout_ext.planner import StepCosts
from freezeout_ext.planner.measuring import LayerBench
from freezeout_ext.training.engagement import LEAST_PREDICTED
from freezeout_ext.training.measure import conditions
from freezeout_ext.training.report import table

NETS = ("wrn-16-1", "densenet-22-12", "vgg-11-x0.25")


class FrozenSteps:
    """Steps of a net with FreezeOut, at any number of frozen layers."""

    def __init__(self, name: str, inputs: torch.Tensor, targets: torch.Tensor, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.inputs, self.targets = inputs, targets
        self.model = build_model(name, 100, image_size=inputs.shape[-1]).train()
        self.optimizer = FusedSGD(self.model.parameters(), lr=0.0, momentum=0.9, nesterov=True, weight_decay=1e-4)
        self.freezeout = FreezeOut(self.model, self.optimizer, total_steps=10**6, t_0=0.5, how_scale="linear")
        self.seconds: list[list[float]] = [[] for _ in self.freezeout.layers]

    def measure(self, k: int, steps: int) -> None:
        state = self.freezeout.state_dict()
        step = 0 if k == 0 else int(self.freezeout.schedule.milestone(k - 1)) + 1
        self.freezeout.load_state_dict({**state, "step": step})
        assert self.freezeout.num_frozen == k
        self.step()  # momentum, tables
        for _ in range(steps):
            start = self.clock()
            self.step()
            self.seconds[k].append(self.clock() - start)

    def step(self) -> None:
        functional.cross_entropy(self.model(self.inputs), self.targets).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def engagement(name: str, *, batch_size: int, image_size: int, rounds: int, steps: int) -> dict:
    torch.manual_seed(0)
    inputs = torch.randn(batch_size, 3, image_size, image_size)
    targets = torch.randint(100, (batch_size,))
    # The backward pass of a CPU graph runs in the thread that calls it.
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    frozen = FrozenSteps(name, inputs, targets, clock)
    model = build_model(name, 100, image_size=image_size)
    bench = LayerBench(model, inputs, targets, functional.cross_entropy, clock=clock)
    order = list(range(len(frozen.seconds)))
    for round_ in range(rounds + 1):
        bench.round()
        for k in order if round_ % 2 else reversed(order):
            frozen.measure(k, steps)
        if round_ == 0:  # warm-up
            bench.forget()
            frozen.seconds = [[] for _ in order]
    costs = StepCosts(layers=tuple(layer.name for layer in bench.layers), **bench.medians())
    whole = median(frozen.seconds[0])
    rows = []
    for k in order[1:]:
        measured, predicted = 1 - median(frozen.seconds[k]) / whole, costs.saving(k)
        rows.append(
            {
                "num_frozen": k,
                "milliseconds": 1000 * median(frozen.seconds[k]),
                "predicted_saving": predicted,
                "measured_saving": measured,
                "engagement": measured / predicted if predicted >= LEAST_PREDICTED else None,
            }
        )
    return {
        "net": name,
        "batch_size": batch_size,
        "image_size": image_size,
        "rounds": rounds,
        "clock": clock.__name__,
        "milliseconds": 1000 * whole,
        "closure_error": costs.closure_error,
        "transitions": rows,
        "costs": costs.to_dict(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", nargs="+", default=NETS)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=2, help="measured at each number of frozen layers, a round")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("engagement.json"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    found = []
    for name in args.nets:
        result = engagement(
            name, batch_size=args.batch_size, image_size=args.image_size, rounds=args.rounds, steps=args.steps
        )
        found.append(result)
        rows = [("frozen", "ms/step", "predicted", "measured", "engagement")]
        rows.append(("0", f"{result['milliseconds']:.2f}", "", "", ""))
        rows += [
            (
                str(row["num_frozen"]),
                f"{row['milliseconds']:.2f}",
                f"{100 * row['predicted_saving']:.1f} %",
                f"{100 * row['measured_saving']:.1f} %",
                "-" if row["engagement"] is None else f"{row['engagement']:.2f}",
            )
            for row in result["transitions"]
        ]
        print(f"{name}: parts add up to {100 * result['closure_error']:+.1f} %\n{table(rows)}\n", flush=True)
        args.out.write_text(json.dumps({"conditions": conditions(torch.device("cpu")), "nets": found}, indent=1))


if __name__ == "__main__":
    main()
