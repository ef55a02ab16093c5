"""Whole training steps, and epochs, at 0, 25, 50 and 75 % of layers frozen: the authors' style and ours.

pytest bench/bench_training_step.py --benchmark-json=bench/results/training_step.json

Batches of 128 images of CIFAR-100's shape, cross-entropy, SGD with Nesterov momentum and weight decay. On a GPU all
arms run channels-last under bfloat16 autocast, on a CPU in float32. Arms:

    authors             eager; torch.optim.SGD with one param group a layer; frozen layers by requires_grad=False, each
                        one's output detached. Unlike theirs, frozen norms run on their running statistics, as ours
                        do, so that losses can be compared: that is less work than batch statistics.
    ours                eager: the Trainer's step with prefix="off", by FusedSGD
    ours, exact|bf16    the same with that prefix
    graph, off|exact|bf16   the same captured; eager on a CPU

First all arms train the same few steps from the same weights, and their losses are compared.
Then the arms take turns in one process. A turn is several steps, and the device is waited for at both of its ends.
Milliseconds are medians over the turns. `over_authors` is the authors' time over an arm's.
Memory is the peak of torch's allocator while the arm is built, trained and captured, less what was in use before.
A graph's memory counts where the graph was captured.
Epochs: 50,000 images cropped and flipped on the device, at half the layers frozen.
"""

import gc
import os
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from statistics import median

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from turns import clock, in_turns

from freezeout_ext.attach import pin
from freezeout_ext.layers import find_layers
from freezeout_ext.models import build_model
from freezeout_ext.tasks import DeviceData, Task, batches
from freezeout_ext.tasks.images import Split
from freezeout_ext.training.config import OWN_MODEL, TrainConfig
from freezeout_ext.training.measure import conditions
from freezeout_ext.training.trainer import Trainer

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NETS = ("densenet-76-12", "wrn-40-4", "vgg-16")
FROZEN = (0.0, 0.25, 0.5, 0.75)
CLASSES = 100
LR = 1e-3
COMPARED_STEPS = 5
# After so many steps an arm's prefix has had its trial, and its step is captured.
WARM_UP_STEPS = 24
TOTAL_STEPS = 10**7  # so many that the rates do not move during the measurement
EPOCH_ARMS = ("authors", "ours", "graph, bf16")
# Largest difference of the losses from the authors', over their size: other kernels sum in another order, bfloat16
# rounds each image, and the steps amplify it.
LOSS_TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2}


@dataclass
class Case:
    """What all arms share."""

    net: str
    frozen: float
    batch: int = 128
    image: int = 32
    device: torch.device = DEVICE
    amp: torch.dtype | None = torch.bfloat16 if DEVICE.type == "cuda" else None
    data: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        for _ in range(4):
            x = torch.randn(self.batch, 3, self.image, self.image, generator=generator).to(self.device)
            self.data.append((x, torch.randint(CLASSES, (self.batch,), generator=generator).to(self.device)))

    def model(self) -> nn.Module:
        """The same weights and running statistics in every arm."""
        torch.manual_seed(0)
        model = build_model(self.net, CLASSES, image_size=self.image).to(self.device).train()
        with torch.no_grad():
            for x, _ in self.data:
                model(x)
        return model

    def num_frozen(self, layers: int) -> int:
        return int(self.frozen * layers)


class Arm:
    """One way to train; step(x, y) -> loss."""

    step: Callable[[Tensor, Tensor], Tensor]

    def __init__(self, case: Case, *, channels_last: bool, amp: torch.dtype | None) -> None:
        self.case, self.channels_last, self.amp, self.steps = case, channels_last, amp, 0

    def next(self) -> Tensor:
        x, y = self.case.data[self.steps % len(self.case.data)]
        self.steps += 1
        return self.step(x.to(memory_format=torch.channels_last) if self.channels_last else x, y)


class Authors(Arm):
    def __init__(self, case: Case, **layout) -> None:
        super().__init__(case, **layout)
        self.model = case.model().to(memory_format=torch.channels_last if self.channels_last else None)
        layers = find_layers(self.model)
        frozen = case.num_frozen(len(layers))
        for layer in layers[:frozen]:
            for p in layer.parameters.values():
                p.requires_grad_(False)
            for module in layer.submodules:
                pin(module)
            for module in layer.modules.values():
                module.register_forward_hook(lambda module, args, output: output.detach())
        groups = [{"params": list(layer.parameters.values())} for layer in layers[frozen:]]
        self.optimizer = torch.optim.SGD(groups, lr=LR, momentum=0.9, nesterov=True, weight_decay=1e-4)

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        with torch.autocast(self.case.device.type, self.amp) if self.amp else nullcontext():
            loss = functional.cross_entropy(self.model(x), y)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()


class Ours(Arm):
    """The Trainer's step, with the first layers frozen from the start."""

    def __init__(self, case: Case, prefix: str, graph: bool, **layout) -> None:
        super().__init__(case, **layout)
        config = TrainConfig(
            model=OWN_MODEL, method="no-anneal", t_0=1.0, steps=TOTAL_STEPS, batch_size=case.batch, lr=LR,
            start_frozen=case.num_frozen(len(find_layers(case.model()))), prefix=prefix, graph=graph,
            amp="bf16" if self.amp else "off", channels_last=self.channels_last, device=case.device.type,
        )  # fmt: skip
        task = Task(make_model=case.model, train=case.data, evaluation=case.data)
        self.trainer = Trainer(config.resolved(), task)
        self.freezeout, self.graphed = self.trainer.freezeout, self.trainer.train_step

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        return self.graphed(x, y)[0]


def arms_of(case: Case) -> dict[str, Callable[[], Arm]]:
    on_gpu = case.device.type == "cuda"
    same = {"channels_last": on_gpu, "amp": case.amp}
    arms: dict[str, Callable[[], Arm]] = {"authors": lambda: Authors(case, **same)}
    prefixes = ("off", "exact", "bf16") if case.num_frozen(len(find_layers(build_model(case.net)))) else ("off",)
    for prefix in prefixes:
        arms["ours" if prefix == "off" else f"ours, {prefix}"] = partial(Ours, case, prefix, False, **same)
    for prefix in prefixes:
        arms[f"graph, {prefix}"] = partial(Ours, case, prefix, True, **same)
    return arms


def prepare(name: str, make: Callable[[], Arm], case: Case) -> tuple[Arm, list[float], dict]:
    """The arm after its warm-up, the losses of its first steps, and what the warm-up took."""
    gc.collect()
    if case.device.type == "cuda":
        before = torch.cuda.memory_allocated(case.device)
        torch.cuda.reset_peak_memory_stats(case.device)
    now = clock(case.device)
    start = now()
    arm = make()
    losses = [arm.next().item() for _ in range(COMPARED_STEPS)]
    for _ in range(WARM_UP_STEPS - COMPARED_STEPS):
        arm.next()
    found: dict = {"preparation_seconds": now() - start}
    if case.device.type == "cuda":
        found["peak_memory_bytes"] = torch.cuda.max_memory_allocated(case.device) - before
    if isinstance(arm, Ours):
        found["prefix"] = str(arm.freezeout.prefix_report())
    if name.startswith("graph") and case.device.type == "cuda":
        assert arm.graphed.captures == 1, f"{name}: {arm.graphed.captures} captures"
    return arm, losses, found


def assert_same_losses(losses: dict[str, list[float]], case: Case) -> None:
    for name, found in losses.items():
        # A bfloat16 prefix rounds images even where the rest is float32.
        allowed = LOSS_TOLERANCE["bfloat16" if case.amp or "bf16" in name else "float32"]
        for step, (a, b) in enumerate(zip(found, losses["authors"], strict=True)):
            assert abs(a - b) <= allowed * abs(b), f"{name}: loss {a} in step {step}, the authors' {b}"


def measure(case: Case, *, rounds: int, steps: int) -> tuple[dict, dict[str, Arm]]:
    """What the benchmark stores for one net and fraction, and the arms, ready to go on."""
    arms, losses, found = {}, {}, {}
    for name, make in arms_of(case).items():
        arms[name], losses[name], found[name] = prepare(name, make, case)
    assert_same_losses(losses, case)
    nexts = {name: arm.next for name, arm in arms.items()}
    times = in_turns(nexts, case.device, rounds=rounds, repeats=steps, before=lambda step: None)
    milliseconds = {name: [1e3 * seconds for seconds in values] for name, values in times.items()}
    medians = {name: median(values) for name, values in milliseconds.items()}
    layers = len(arms["ours"].freezeout.layers)
    return {
        "net": case.net,
        "frozen": f"{case.num_frozen(layers)} of {layers}",
        "batch": case.batch,
        "image": case.image,
        "amp": str(case.amp),
        "milliseconds": medians,
        "milliseconds_least": {name: min(values) for name, values in milliseconds.items()},
        "over_authors": {name: medians["authors"] / value for name, value in medians.items()},
        "losses": losses,
        "arms": found,
        **conditions(case.device),
    }, arms


def epoch_seconds(arm: Arm, images: DeviceData, batch: int) -> float:
    now = clock(arm.case.device)
    start = now()
    for x, y in batches(images, batch, epoch=0, seed=0, shuffle=True, drop_last=True):
        arm.step(x.contiguous(memory_format=torch.channels_last) if arm.channels_last else x, y)
    return now() - start


def images_of_an_epoch(count: int, case: Case) -> DeviceData:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (count, 3, case.image, case.image), dtype=torch.uint8, generator=generator)
    targets = torch.randint(CLASSES, (count,), generator=generator)
    split = Split(images.to(case.device), targets.to(case.device), (0.5,) * 3, (0.25,) * 3, padding=4, flip=True)
    return split.dataset(augment=True)


@pytest.mark.parametrize("frozen", FROZEN)
@pytest.mark.parametrize("net", NETS)
def test_training_step(benchmark, net, frozen):
    if DEVICE.type == "cpu" and not os.environ.get("FREEZEOUT_BENCH_ON_CPU"):
        pytest.skip("no GPU; FREEZEOUT_BENCH_ON_CPU=1 runs it on the CPU all the same (minutes)")
    torch.backends.cudnn.benchmark = True
    found, arms = measure(Case(net, frozen), rounds=5, steps=10)
    if frozen == 0.5:
        images = images_of_an_epoch(50_000, arms["authors"].case)
        seconds = {name: epoch_seconds(arms[name], images, 128) for name in EPOCH_ARMS}
        found["epoch_seconds"] = seconds
        found["epoch_over_authors"] = {name: seconds["authors"] / value for name, value in seconds.items()}
    benchmark.extra_info |= found
    benchmark.pedantic(list(arms.values())[-1].next, rounds=1)
