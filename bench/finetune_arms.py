"""How the runs of bench_finetune.py differ: the arms of each experiment."""

from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class Arm:
    """How a run differs from full training.

    Attributes:
        length: of the run and its cosine, over full training's.
        start: how many layers are frozen before the first step.
        rule: (how_scale, t_0) by which the other layers freeze; None: the other layers train to the end.
        anneal: each layer follows its own cosine, as in the paper; else all layers follow the run's.
        views: K, how many views of each image are kept; None: nothing is kept and each view is fresh.
        kept: dtype of what is kept; None: as computed.
        rate: factor of the learning rate.
        rate_after: further factor, once the rule has frozen a layer.
        adapt: passes over the data before training, in which the pretrained net's batch norms learn its statistics.
        thaw: (fraction of the run, layers that stay frozen from there on, further factor of the rate).
    """

    length: float = 1.0
    start: int = 0
    rule: tuple[str, float] | None = None
    anneal: bool = False
    views: int | None = None
    kept: torch.dtype | None = None
    rate: float = 1.0
    rate_after: float = 1.0
    adapt: int = 0
    thaw: tuple[float, int, float] | None = None

    @property
    def freezes(self) -> bool:
        return bool(self.start or self.rule)

    @property
    def is_rival(self) -> bool:
        """Whether this is full training, of whatever length."""
        return self == Arm(length=self.length)


BF16, INT8 = torch.bfloat16, torch.int8
# Between the classes: the first 4 layers, or 2 or 4 and then the others one by one, or 6 of the 9.
RULES = {
    "first 4": Arm(start=4),
    "first 2, rest from 0.2": Arm(start=2, rule=("linear", 0.2)),
    "first 4, rest from 0.4": Arm(start=4, rule=("linear", 0.4)),
    "first 6": Arm(start=6),
}
CLASSES = {
    "full": Arm(),
    **{f"short {percent} %": Arm(length=percent / 100) for percent in (80, 60, 40, 25, 12)},
    **{f"{name}, paid": arm for name, arm in RULES.items()},
    **{f"{name}, K={k}": replace(arm, views=k, kept=BF16) for name, arm in RULES.items() for k in (1, 2, 4)},
    **{f"{name}, K=4, int8": replace(arm, views=4, kept=INT8) for name, arm in RULES.items()},
    **{f"full, rate x{rate:g}": Arm(rate=rate) for rate in (0.5, 2)},
    **{f"first 4, K=4, rate x{rate:g}": Arm(start=4, views=4, kept=BF16, rate=rate) for rate in (0.5, 2)},
    **{f"first 6, K=4, rate x{rate:g}": Arm(start=6, views=4, kept=BF16, rate=rate) for rate in (0.5, 2)},
    **{
        f"first 4, rest from 0.4, K=4, x{rate:g} after": replace(
            RULES["first 4, rest from 0.4"], views=4, kept=BF16, rate_after=rate
        )
        for rate in (0.5, 2)
    },
    **{f"{name}, paid, norms adapted": replace(RULES[name], adapt=1) for name in ("first 4", "first 6")},
    "full, norms adapted": Arm(adapt=1),
}
# Arms whose tail thaws: from some part of the run on all layers train, at what is left of the one cosine.
TAILED = {
    "12 blocks, 6 epochs, K=2": Arm(length=6 / 4, start=13, views=2, kept=BF16),
    "12 blocks, 8 epochs, K=2": Arm(length=8 / 4, start=13, views=2, kept=BF16),
    "6 blocks, 6 epochs, K=2": Arm(length=6 / 4, start=7, views=2, kept=BF16),
}
# Of EfficientNet-Lite0's 19 layers: the stem and 6 or 12 of the 16 blocks.
PRETRAINED = {
    **{f"full {epochs} epochs": Arm(length=epochs / 4) for epochs in (1, 2, 4, 6, 8)},
    "6 blocks, 2 epochs, K=1": Arm(length=2 / 4, start=7, views=1, kept=BF16),
    "6 blocks, 4 epochs, K=2": Arm(length=4 / 4, start=7, views=2, kept=BF16),
    "12 blocks, 4 epochs, K=1": Arm(length=4 / 4, start=13, views=1, kept=BF16),
    **TAILED,
    "12 blocks, 16 epochs, K=4": Arm(length=16 / 4, start=13, views=4, kept=BF16),
    "6 blocks, 8 epochs, K=4": Arm(length=8 / 4, start=7, views=4, kept=BF16),
    "12 blocks, 10 epochs, K=2, all thawed for 2": Arm(length=10 / 4, start=13, views=2, kept=BF16, thaw=(0.8, 0, 3.0)),
    "12 blocks, 10 epochs, K=2, thawed to 6 for 3": Arm(
        length=10 / 4, start=13, views=2, kept=BF16, thaw=(0.7, 7, 2.0)
    ),
    **{
        f"{name}, all thawed at {part:g}": replace(arm, thaw=(part, 0, 1.0))
        for name, arm in TAILED.items()
        for part in (0.67, 0.8)
    },
    "6 blocks, 2 epochs, K=1, norms adapted": Arm(length=2 / 4, start=7, views=1, kept=BF16, adapt=1),
    "12 blocks, 4 epochs, K=1, norms adapted": Arm(length=4 / 4, start=13, views=1, kept=BF16, adapt=1),
}
CUBIC, LINEAR = Arm(rule=("cubic", 0.8)), Arm(rule=("linear", 0.5))
SCRATCH = {
    "full": Arm(),
    **{f"short {percent} %": Arm(length=percent / 100) for percent in (85, 70, 55)},
    "cubic 0.8, annealed": replace(CUBIC, anneal=True),
    "cubic 0.8": CUBIC,
    "linear 0.5, annealed": replace(LINEAR, anneal=True),
    "linear 0.5": LINEAR,
    "cubic 0.8, K=1": replace(CUBIC, views=1, kept=BF16),
    "cubic 0.8, K=4": replace(CUBIC, views=4, kept=BF16),
    "linear 0.5, K=1": replace(LINEAR, views=1, kept=BF16),
    "linear 0.5, K=2": replace(LINEAR, views=2, kept=BF16),
}
ARMS = {"classes": CLASSES, "pretrained": PRETRAINED, "scratch-vgg": SCRATCH, "scratch-wrn": SCRATCH}
SCRATCH_PAIRS = [
    (f"{name}, {how}", name)
    for name in ("cubic 0.8", "linear 0.5")
    for how in ("annealed", "K=1", "K=2", "K=4")
    if f"{name}, {how}" in SCRATCH
]
# Further arms that are compared run by run: (arm, the arm that it is compared with).
PAIRS = {
    "classes": [
        *((f"{name}, K={k}", f"{name}, paid") for name in RULES for k in (1, 2, 4)),
        *((f"{name}, K=4, int8", f"{name}, K=4") for name in RULES),
        *((f"{name}, paid, norms adapted", f"{name}, paid") for name in ("first 4", "first 6")),
        *((f"{name}, K=4, rate x{rate}", f"{name}, K=4") for name in ("first 4", "first 6") for rate in (0.5, 2)),
        *((f"first 4, rest from 0.4, K=4, x{rate} after", "first 4, rest from 0.4, K=4") for rate in (0.5, 2)),
        *((f"full, rate x{rate}", "full") for rate in (0.5, 2)),
        ("full, norms adapted", "full"),
    ],
    "pretrained": [
        ("6 blocks, 2 epochs, K=1, norms adapted", "6 blocks, 2 epochs, K=1"),
        ("12 blocks, 4 epochs, K=1, norms adapted", "12 blocks, 4 epochs, K=1"),
        *((f"{name}, all thawed at {part:g}", name) for name in TAILED for part in (0.67, 0.8)),
    ],
    "scratch-vgg": SCRATCH_PAIRS,
    "scratch-wrn": SCRATCH_PAIRS,
}
