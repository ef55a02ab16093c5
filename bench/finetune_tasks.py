"""What bench_finetune.py trains.

classes: a net pretrained on 50 classes of CIFAR-100, drawn by the seed, learns the other 50 from 2,000 images.
pretrained: EfficientNet-Lite0 with its ImageNet weights learns CIFAR-10 from 2,000 images at 64 pixels.
scratch-vgg, scratch-wrn: 10,000 images of CIFAR-100, from scratch.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from freezeout_ext import FusedSGD
from freezeout_ext.models import build_model
from freezeout_ext.tasks import DeviceData, batches
from freezeout_ext.tasks.images import Split, load_data
from freezeout_ext.tasks.nets import find_net

TEST_BATCH = 500


@dataclass(frozen=True)
class Experiment:
    """What is trained.

    epochs: those of the arm of length 1.
    timed: (steps of the yardstick, seconds between).
    """

    make_model: Callable[[int], nn.Module]
    train: Callable[[int], DeviceData]
    test: Callable[[int], DeviceData]
    make_optimizer: Callable[[Iterator[nn.Parameter], float], torch.optim.Optimizer]
    epochs: float
    batch_size: int
    timed: tuple[int, float]
    data: str


def sgd(parameters: Iterator[nn.Parameter], rate: float) -> torch.optim.Optimizer:
    return FusedSGD(parameters, lr=0.1 * rate, momentum=0.9, nesterov=True, weight_decay=1e-4)


def adamw(parameters: Iterator[nn.Parameter], rate: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-3 * rate)


# The experiments


def between_classes(data_dir: Path, work: Path) -> Experiment:
    data = load_data("cifar100", data_dir)

    def halves(seed: int) -> tuple[Tensor, Tensor]:
        return torch.randperm(100, generator=torch.Generator().manual_seed(seed)).split(50)

    def of_classes(split: Split, classes: Tensor, a_class: int | None = None, seed: int = 0) -> Split:
        drawn = torch.Generator().manual_seed(1000 + seed)
        chosen, labels = [], []
        for label, name in enumerate(classes.tolist()):
            found = (split.labels == name).nonzero()[:, 0]
            if a_class is not None:
                found = found[torch.randperm(len(found), generator=drawn)[:a_class]]
            chosen.append(found)
            labels.append(torch.full((len(found),), label))
        return replace(split, images=split.images[torch.cat(chosen)], labels=torch.cat(labels))

    def make_model(seed: int) -> nn.Module:
        path = work / f"pretrained-{seed}.pt"
        if not path.exists():
            model = _pretrain(of_classes(data.train, halves(seed)[0]).dataset(augment=True), seed)
            test = of_classes(data.test, halves(seed)[0]).dataset()
            print(f"pretrained {path.name}: {evaluate(model, test)[0]:.2f} % on its own classes", flush=True)
            torch.save(model.state_dict(), path)
        torch.manual_seed(seed)
        model = build_model("vgg-11-x0.125", 50)
        state = torch.load(path, weights_only=True)
        last = f"classifier.{len(model.classifier) - 1}."
        model.load_state_dict({k: v for k, v in state.items() if not k.startswith(last)}, strict=False)
        return model

    return Experiment(
        make_model=make_model,
        train=lambda seed: of_classes(data.train, halves(seed)[1], 40, seed).dataset(augment=True),
        test=lambda seed: of_classes(data.test, halves(seed)[1]).dataset(),
        make_optimizer=sgd,
        epochs=8,
        batch_size=32,
        timed=(10, 1.5),
        data=f"{data.conditions}; 25,000 images of 50 classes for 5 epochs, then 2,000 of the other 50, by the seed",
    )


def _pretrain(images: DeviceData, seed: int, epochs: int = 5, batch_size: int = 32) -> nn.Module:
    torch.manual_seed(seed)
    model = build_model("vgg-11-x0.125", 50).to(memory_format=torch.channels_last).train()
    optimizer = sgd(model.parameters(), 1.0)
    total = epochs * (len(images) // batch_size)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: cosine(step, total))
    for epoch in range(epochs):
        for inputs, targets in fresh(images, batch_size, 500 + seed, epoch):
            functional.cross_entropy(model(inputs), targets).backward()
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
    return model


def pretrained(data_dir: Path, work: Path) -> Experiment:
    data = load_data("cifar10", data_dir)
    net = find_net("efficientnet-lite0", 10, image_size=64, weights="pretrained")

    def make_model(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return net.make()

    def normalised(split: Split) -> Split:
        return replace(split, mean=net.mean, std=net.std)

    def train(seed: int) -> DeviceData:
        chosen = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(1000 + seed))[:2000]
        drawn = replace(data.train, images=data.train.images[chosen], labels=data.train.labels[chosen])
        return normalised(drawn).dataset(augment=True, size=64)

    test = normalised(data.test).dataset(size=64)
    return Experiment(
        make_model=make_model,
        train=train,
        test=lambda seed: test,
        make_optimizer=adamw,
        epochs=4,
        batch_size=50,
        timed=(1, 8.0),
        data=f"{data.conditions}; 2,000 training images drawn by the seed",
    )


def from_scratch(name: str, epochs: int, timed: tuple[int, float]) -> Callable[[Path, Path], Experiment]:
    def make(data_dir: Path, work: Path) -> Experiment:
        data = load_data("cifar100", data_dir)
        split = data.train
        drawn = torch.Generator().manual_seed(0)
        where = [(split.labels == k).nonzero()[:, 0] for k in range(100)]
        chosen = torch.cat([found[torch.randperm(len(found), generator=drawn)[:100]] for found in where])
        images = replace(split, images=split.images[chosen], labels=split.labels[chosen]).dataset(augment=True)
        test = data.test.dataset()

        def make_model(seed: int) -> nn.Module:
            torch.manual_seed(seed)
            return build_model(name, 100)

        return Experiment(
            make_model=make_model,
            train=lambda seed: images,
            test=lambda seed: test,
            make_optimizer=sgd,
            epochs=epochs,
            batch_size=32,
            timed=timed,
            data=f"{data.conditions}; 10,000 training images, 100 a class, the same for all seeds",
        )

    return make


EXPERIMENTS = {
    "classes": between_classes,
    "pretrained": pretrained,
    "scratch-vgg": from_scratch("vgg-11-x0.125", 4, (10, 3.0)),
    "scratch-wrn": from_scratch("wrn-10-1", 3, (5, 5.0)),
}


def cosine(step: int, total: int) -> float:
    return 0.5 * (1 + math.cos(math.pi * min(step, total) / total))


def fresh(images: DeviceData, batch_size: int, seed: int, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch of views that are seen once, in whole batches."""
    return batches(images, batch_size, shuffle=True, drop_last=True, seed=seed, epoch=epoch)


def evaluate(model: nn.Module, images: DeviceData) -> tuple[float, float]:
    """-> accuracy in percent and mean cross-entropy, of the net in eval mode."""
    model.eval()
    correct = loss = 0.0
    with torch.no_grad():
        for inputs, targets in batches(images, TEST_BATCH):
            outputs = model(inputs)
            correct += (outputs.argmax(1) == targets).sum().item()
            loss += functional.cross_entropy(outputs, targets, reduction="sum").item()
    return 100 * correct / len(images), loss / len(images)
