"""How the runs of bench_finetune.py differ: the arms of each experiment."""

from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class Arm:
    """How a run differs from full training.

    Attributes:
        length: of the run and its cosine, over full training's.
        changes: of full training's TrainConfig.
        adapt: passes over the data before training, in which the pretrained net's batch norms learn its statistics.
    """

    length: float = 1.0
    changes: dict = field(default_factory=dict)
    adapt: int = 0

    @property
    def is_rival(self) -> bool:
        """Whether this is full training, of whatever length."""
        return self == Arm(length=self.length)

    def keeping(self, views: int, dtype: str = "bf16") -> "Arm":
        """The same with so many views of each image kept."""
        return replace(self, changes=self.changes | {"cache": "device", "views": views, "cache_dtype": dtype})


def frozen(start: int, *, how_scale: str = "linear", t_0: float = 1.0, length: float = 1.0) -> Arm:
    """So many layers are frozen before the first step, and the others by the rule; all rates follow one cosine."""
    changes = {"method": "no-anneal", "start_frozen": start, "how_scale": how_scale, "t_0": t_0}
    return Arm(length, changes)


# Between the classes: the first 4 layers, or 2 or 4 and then the others one by one, or 6 of the 9.
RULES = {
    "first 4": frozen(4),
    "first 2, rest from 0.2": frozen(2, t_0=0.2),
    "first 4, rest from 0.4": frozen(4, t_0=0.4),
    "first 6": frozen(6),
}
CLASSES = {
    "full": Arm(),
    **{f"short {percent} %": Arm(length=percent / 100) for percent in (80, 60, 40, 25, 12)},
    **{f"{name}, paid": arm for name, arm in RULES.items()},
    **{f"{name}, K={k}": arm.keeping(k) for name, arm in RULES.items() for k in (1, 2, 4)},
    **{f"{name}, K=4, int8": arm.keeping(4, "int8") for name, arm in RULES.items()},
}
# Of EfficientNet-Lite0's 19 layers: the stem and 6 or 12 of the 16 blocks.
PRETRAINED = {
    **{f"full {epochs} epochs": Arm(length=epochs / 4) for epochs in (1, 2, 4, 6)},
    **{
        f"{blocks} blocks, {epochs} epochs, K={k}": frozen(blocks + 1, length=epochs / 4).keeping(k)
        for blocks, epochs, k in ((6, 2, 1), (6, 4, 2), (12, 4, 1), (12, 8, 2), (12, 16, 4), (6, 8, 4))
    },
    "12 blocks, 4 epochs, K=1, norms adapted": replace(frozen(13).keeping(1), adapt=1),
}
CUBIC, LINEAR = frozen(0, how_scale="cubic", t_0=0.8), frozen(0, t_0=0.5)
SCRATCH = {
    "full": Arm(),
    **{f"short {percent} %": Arm(length=percent / 100) for percent in (85, 70, 55)},
    **{
        name: arm
        for rule, plain in (("cubic 0.8", CUBIC), ("linear 0.5", LINEAR))
        for name, arm in (
            (f"{rule}, annealed", Arm(changes=plain.changes | {"method": "freezeout"})),
            (rule, plain),
            *((f"{rule}, K={k}", plain.keeping(k)) for k in (1, 2, 4)),
        )
    },
}
ARMS = {"classes": CLASSES, "pretrained": PRETRAINED, "scratch-vgg": SCRATCH, "scratch-wrn": SCRATCH}
SCRATCH_PAIRS = [
    (f"{name}, {how}", name) for name in ("cubic 0.8", "linear 0.5") for how in ("annealed", "K=1", "K=2", "K=4")
]
# Further arms that are compared run by run: (arm, the arm that it is compared with).
PAIRS = {
    "classes": [
        *((f"{name}, K={k}", f"{name}, paid") for name in RULES for k in (1, 2, 4)),
        *((f"{name}, K=4, int8", f"{name}, K=4") for name in RULES),
    ],
    "pretrained": [("12 blocks, 4 epochs, K=1, norms adapted", "12 blocks, 4 epochs, K=1")],
    "scratch-vgg": SCRATCH_PAIRS,
    "scratch-wrn": SCRATCH_PAIRS,
}
