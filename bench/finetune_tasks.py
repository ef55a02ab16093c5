"""What bench_finetune.py trains.

classes: a net pretrained on 50 classes of CIFAR-100, drawn by the seed, learns the other 50 from 2,000 images.
pretrained: EfficientNet-Lite0 with its ImageNet weights learns CIFAR-10 from 2,000 images at 64 pixels.
scratch-vgg, scratch-wrn: 10,000 images of CIFAR-100, from scratch.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from freezeout_ext.models import build_model
from freezeout_ext.tasks import Task
from freezeout_ext.tasks.images import Split, load_data
from freezeout_ext.tasks.nets import find_net
from freezeout_ext.training.config import OWN_MODEL, TrainConfig
from freezeout_ext.training.trainer import Trainer


@dataclass(frozen=True)
class Experiment:
    """What is trained.

    task: seed -> the task.
    config: of full training, the arm of length 1.
    timed: (steps of the yardstick, seconds between).
    """

    task: Callable[[int], Task]
    config: TrainConfig
    timed: tuple[int, float]
    data: str


FULL = TrainConfig(model=OWN_MODEL, method="full", device="cpu", threads=1)
SGD = replace(FULL, batch_size=32)


def between_classes(data_dir: Path, work: Path) -> Experiment:
    data = load_data("cifar100", data_dir)

    def halves(seed: int) -> tuple[Tensor, Tensor]:
        return torch.randperm(100, generator=torch.Generator().manual_seed(seed)).split(50)

    def of_classes(split: Split, classes: Tensor, a_class: int | None = None, seed: int = 0) -> Split:
        where = [(split.labels == name).nonzero()[:, 0] for name in classes.tolist()]
        if a_class is not None:
            where = drawn(where, a_class, 1000 + seed)
        labels = [torch.full((len(found),), label) for label, found in enumerate(where)]
        return replace(split, images=split.images[torch.cat(where)], labels=torch.cat(labels))

    def pretrained_state(seed: int) -> dict[str, Tensor]:
        path = work / f"pretrained-{seed}.pt"
        if not path.exists():
            first = halves(seed)[0]
            task = Task(
                make_model=lambda: build_model("vgg-11-x0.125", 50),
                train=of_classes(data.train, first).dataset(augment=True),
                evaluation=of_classes(data.test, first).dataset(),
            )
            trainer = Trainer(replace(SGD, epochs=5, seed=seed).resolved(), task)
            for _ in range(trainer.epochs):
                trainer.train_epoch()
            accuracy = trainer.evaluate("test", task.evaluation)["test_accuracy"]
            print(f"pretrained {path.name}: {100 * accuracy:.2f} % on its own classes", flush=True)
            torch.save(trainer.model.state_dict(), path)
        return torch.load(path, weights_only=True)

    def task(seed: int) -> Task:
        state = pretrained_state(seed)

        def make_model() -> nn.Module:
            model = build_model("vgg-11-x0.125", 50)
            last = f"classifier.{len(model.classifier) - 1}."
            model.load_state_dict({k: v for k, v in state.items() if not k.startswith(last)}, strict=False)
            return model

        return Task(
            make_model=make_model,
            train=of_classes(data.train, halves(seed)[1], 40, seed).dataset(augment=True),
            evaluation=of_classes(data.test, halves(seed)[1]).dataset(),
        )

    about = f"{data.conditions}; 25,000 images of 50 classes for 5 epochs, then 2,000 of the other 50, by the seed"
    return Experiment(task, replace(SGD, epochs=8), (10, 1.5), about)


def pretrained(data_dir: Path, work: Path) -> Experiment:
    data = load_data("cifar10", data_dir)
    net = find_net("efficientnet-lite0", 10, image_size=64, weights="pretrained")

    def normalised(split: Split) -> Split:
        return replace(split, mean=net.mean, std=net.std)

    test = normalised(data.test).dataset(size=64)

    def task(seed: int) -> Task:
        chosen = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(1000 + seed))[:2000]
        images = replace(data.train, images=data.train.images[chosen], labels=data.train.labels[chosen])
        train = normalised(images).dataset(augment=True, size=64)
        return Task(make_model=net.make, train=train, evaluation=test)

    config = replace(FULL, epochs=4, batch_size=50, optimizer="adamw", lr=1e-3, weight_decay=0.01)
    return Experiment(task, config, (1, 8.0), f"{data.conditions}; 2,000 training images drawn by the seed")


def from_scratch(name: str, epochs: int, timed: tuple[int, float]) -> Callable[[Path, Path], Experiment]:
    def make(data_dir: Path, work: Path) -> Experiment:
        data = load_data("cifar100", data_dir)
        chosen = torch.cat(drawn([(data.train.labels == k).nonzero()[:, 0] for k in range(100)], 100, 0))
        images = replace(data.train, images=data.train.images[chosen], labels=data.train.labels[chosen])
        task = Task(
            make_model=lambda: build_model(name, 100),
            train=images.dataset(augment=True),
            evaluation=data.test.dataset(),
        )
        about = f"{data.conditions}; 10,000 training images, 100 a class, the same for all seeds"
        return Experiment(lambda seed: task, replace(SGD, epochs=epochs), timed, about)

    return make


def drawn(where: list[Tensor], count: int, seed: int) -> list[Tensor]:
    """`count` of each of the lists of indices, drawn by the seed."""
    generator = torch.Generator().manual_seed(seed)
    return [found[torch.randperm(len(found), generator=generator)[:count]] for found in where]


EXPERIMENTS = {
    "classes": between_classes,
    "pretrained": pretrained,
    "scratch-vgg": from_scratch("vgg-11-x0.125", 4, (10, 3.0)),
    "scratch-wrn": from_scratch("wrn-10-1", 3, (5, 5.0)),
}
