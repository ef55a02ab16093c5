"""Measured over predicted saving of a step, after each transition, for one small net of each family.

    python bench/bench_engagement.py --out bench/results/engagement.json

The prediction comes from forward and backward of each layer (freezeout_ext.planner). The measured steps are
FreezeOut's own. One repetition measures both in turn, on new copies of the net, so that what slows the machine slows
both. With one thread the clock is that thread's CPU time.
Each number is the median over the repetitions. The number's error is the standard deviation of that median.
A saving below three times its error gets no ratio.
The nets share --minutes, and each net takes at least five repetitions.
"""

import argparse
import json
import random
import time
from pathlib import Path
from statistics import median

import torch
from torch.nn import functional

from freezeout_ext import FreezeOut, FusedSGD
from freezeout_ext.models import build_model
from freezeout_ext.planner import median_error
from freezeout_ext.planner.layer_bench import LayerBench, cpu_clock
from freezeout_ext.text import table
from freezeout_ext.training.engagement import judged
from freezeout_ext.training.malloc import keep_freed_memory
from freezeout_ext.training.measure import conditions
from freezeout_ext.training.tables import saving_cells

NETS = ("wrn-16-1", "densenet-22-12", "vgg-11-x0.25")
LEAST_REPETITIONS = 5
SETTLING_STEPS = 2  # after a change of what is frozen: momentum, tables, the prefix


class FrozenSteps:
    """Steps of a new net with FreezeOut, at any number of frozen layers."""

    def __init__(self, name: str, inputs: torch.Tensor, targets: torch.Tensor) -> None:
        self.inputs, self.targets = inputs, targets
        self.clock = cpu_clock()
        model = build_model(name, 100, image_size=inputs.shape[-1]).train()
        self.model = model.to(memory_format=torch.channels_last)
        self.optimizer = FusedSGD(self.model.parameters(), lr=0.0, momentum=0.9, nesterov=True, weight_decay=1e-4)
        self.freezeout = FreezeOut(self.model, self.optimizer, total_steps=10**6, t_0=0.5, how_scale="linear")
        self.freezeout.skip_order_check()  # in a real run the check ends with the first step

    def seconds(self, steps: int) -> list[float]:
        """Seconds of a step with k layers frozen, k = 0 .. L: medians of `steps` steps, of twice as many for k = 0."""
        order = list(range(len(self.freezeout.layers)))
        random.shuffle(order)
        found = {k: [] for k in order}
        for k in [0, *order]:
            self._freeze(k)
            for _ in range(SETTLING_STEPS):
                self._step()
            for _ in range(steps):
                start = self.clock()
                self._step()
                found[k].append(self.clock() - start)
        return [median(found[k]) for k in range(len(order))]

    def _freeze(self, k: int) -> None:
        step = 0 if k == 0 else int(self.freezeout.schedule.milestone(k - 1)) + 1
        self.freezeout.load_state_dict({**self.freezeout.state_dict(), "step": step})
        assert self.freezeout.num_frozen == k

    def _step(self) -> None:
        functional.cross_entropy(self.model(self.inputs), self.targets).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def engagement(name: str, *, batch_size: int, image_size: int, seconds: float, steps: int) -> dict:
    torch.manual_seed(0)
    random.seed(0)
    inputs = torch.randn(batch_size, 3, image_size, image_size).contiguous(memory_format=torch.channels_last)
    targets = torch.randint(100, (batch_size,))
    net = build_model(name, 100, image_size=image_size).to(memory_format=torch.channels_last)
    bench = LayerBench(net, inputs, targets, functional.cross_entropy)
    measured: list[list[float]] = []
    end = time.perf_counter() + seconds
    bench.round()  # warms up: what a process does once, and the memory that the process will need
    FrozenSteps(name, inputs, targets).seconds(1)
    bench.forget()
    while len(measured) < LEAST_REPETITIONS or time.perf_counter() < end:
        bench.round()
        measured.append(FrozenSteps(name, inputs, targets).seconds(steps))
    costs = bench.costs()
    rows = []
    for k in range(1, len(costs.layers)):
        savings = [1 - times[k] / times[0] for times in measured]
        rows.append(
            judged(
                {
                    "num_frozen": k,
                    "milliseconds": 1000 * median(times[k] for times in measured),
                    "predicted_saving": costs.saving(k),
                    "predicted_error": costs.saving_error[k],
                    "measured_saving": median(savings),
                    "measured_error": median_error(savings),
                }
            )
        )
    return {
        "net": name,
        "batch_size": batch_size,
        "image_size": image_size,
        "repetitions": len(measured),
        "clock": bench.clock.__name__,
        "milliseconds": 1000 * median(times[0] for times in measured),
        "closure_error": costs.closure_error,
        "transitions": rows,
        "costs": costs.to_dict(),
    }


def rows_of(result: dict) -> list[tuple[str, ...]]:
    rows = [("frozen", "ms/step", "predicted", "measured", "engagement")]
    rows.append(("0", f"{result['milliseconds']:.2f}", "", "", ""))
    return rows + [
        (str(row["num_frozen"]), f"{row['milliseconds']:.2f}", *saving_cells(row)) for row in result["transitions"]
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", nargs="+", default=NETS)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--minutes", type=float, default=5.5, help="for all nets together (5.5)")
    parser.add_argument("--steps", type=int, default=3, help="at each number of frozen layers, a repetition (3)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("engagement.json"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    found = []
    for name in args.nets:
        seconds = 60 * args.minutes / len(args.nets)
        result = engagement(
            name, batch_size=args.batch_size, image_size=args.image_size, seconds=seconds, steps=args.steps
        )
        found.append(result)
        print(
            f"{name}: {result['repetitions']} repetitions, parts add up to {100 * result['closure_error']:+.1f} % of a"
            f" step\n{table(rows_of(result))}\n",
            flush=True,
        )
        args.out.write_text(json.dumps({"conditions": conditions(torch.device("cpu")), "nets": found}, indent=1))


if __name__ == "__main__":
    main()
