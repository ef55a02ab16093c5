"""What bench_finetune.py trains.

classes: a net pretrained on 50 classes of CIFAR-100, drawn by the seed, learns the other 50 from 2,000 images.
pretrained: EfficientNet-Lite0 with its ImageNet weights learns CIFAR-10 from 2,000 images at 64 pixels.
scratch-vgg, scratch-wrn: 10,000 images of CIFAR-100, from scratch.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from freezeout_ext import FusedSGD
from freezeout_ext.models import build_model
from freezeout_ext.tasks.images import load_data
from freezeout_ext.tasks.nets import find_net

PADDING = 4
TEST_BATCH = 500


class Images:
    """CIFAR images as a data set that makes whole batches: inputs[b] = resize(normalise(crop_flip(image))).

    Shifts of up to 4 pixels, uniform, with a black border, and flips, as the package's own data sets draw them.
    """

    def __init__(self, images: Tensor, labels: Tensor, mean: tuple, std: tuple, size: int | None = None) -> None:
        self.images, self.labels, self.size = images, labels, size
        self.mean, self.std = (255 * torch.tensor(v).view(1, -1, 1, 1) for v in (mean, std))
        padded = functional.pad(images, (PADDING,) * 4)
        self._crops = padded.unfold(2, images.shape[2], 1).unfold(3, images.shape[3], 1)

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, samples: Tensor, seeds: Tensor) -> Tensor:
        """Shapes: samples, seeds int64 [B] -> float32 [B, 3, size, size]; each view is a function of its seed."""
        shifts = 2 * PADDING + 1
        top, left, flip = seeds % shifts, seeds // shifts % shifts, seeds // shifts**2 % 2
        chosen = self._crops[samples, :, top, left]
        return self._inputs(torch.where(flip.bool().view(-1, 1, 1, 1), chosen.flip(3), chosen))

    def targets(self, samples: Tensor) -> Tensor:
        return self.labels[samples]

    def fresh(self, batch_size: int, seed: int, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """One epoch of views that are seen once, in whole batches."""
        drawn = torch.Generator().manual_seed(1_000_003 * seed + epoch)
        order = torch.randperm(len(self), generator=drawn)
        seeds = torch.randint(2**62, (len(self),), generator=drawn)
        for start in range(0, len(self) - batch_size + 1, batch_size):
            where = slice(start, start + batch_size)
            yield self.batch(order[where], seeds[where]), self.targets(order[where])

    def plain(self) -> Iterator[tuple[Tensor, Tensor]]:
        for where in torch.arange(len(self)).split(TEST_BATCH):
            yield self._inputs(self.images[where]), self.labels[where]

    def _inputs(self, images: Tensor) -> Tensor:
        found = images.to(torch.float32, memory_format=torch.channels_last).sub_(self.mean).div_(self.std)
        if self.size:
            found = functional.interpolate(found, size=self.size, mode="bilinear", align_corners=False)
        return found


@dataclass(frozen=True)
class Experiment:
    """What is trained.

    epochs: those of the arm of length 1.
    timed: (steps of the yardstick, seconds between).
    """

    make_model: Callable[[int], nn.Module]
    train: Callable[[int], Images]
    test: Callable[[int], Images]
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

    def of_classes(split, classes: Tensor, a_class: int | None = None, seed: int = 0) -> Images:
        drawn = torch.Generator().manual_seed(1000 + seed)
        chosen, labels = [], []
        for label, name in enumerate(classes.tolist()):
            found = (split.labels == name).nonzero()[:, 0]
            if a_class is not None:
                found = found[torch.randperm(len(found), generator=drawn)[:a_class]]
            chosen.append(found)
            labels.append(torch.full((len(found),), label))
        return Images(split.images[torch.cat(chosen)], torch.cat(labels), split.mean, split.std)

    def make_model(seed: int) -> nn.Module:
        path = work / f"pretrained-{seed}.pt"
        if not path.exists():
            model = _pretrain(of_classes(data.train, halves(seed)[0]), seed)
            test = of_classes(data.test, halves(seed)[0])
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
        train=lambda seed: of_classes(data.train, halves(seed)[1], 40, seed),
        test=lambda seed: of_classes(data.test, halves(seed)[1]),
        make_optimizer=sgd,
        epochs=8,
        batch_size=32,
        timed=(10, 1.5),
        data=f"{data.conditions}; 25,000 images of 50 classes for 5 epochs, then 2,000 of the other 50, by the seed",
    )


def _pretrain(images: Images, seed: int, epochs: int = 5, batch_size: int = 32) -> nn.Module:
    torch.manual_seed(seed)
    model = build_model("vgg-11-x0.125", 50).to(memory_format=torch.channels_last).train()
    optimizer = sgd(model.parameters(), 1.0)
    total = epochs * (len(images) // batch_size)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: cosine(step, total))
    for epoch in range(epochs):
        for inputs, targets in images.fresh(batch_size, 500 + seed, epoch):
            functional.cross_entropy(model(inputs), targets).backward()
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
    return model


def pretrained(data_dir: Path, work: Path) -> Experiment:
    data = load_data("cifar10", data_dir)
    net = find_net("efficientnet-lite0", 10, image_size=64, weights="pretrained")
    mean, std = net.mean, net.std

    def make_model(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return net.make()

    def train(seed: int) -> Images:
        chosen = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(1000 + seed))[:2000]
        return Images(data.train.images[chosen], data.train.labels[chosen], mean, std, 64)

    test = Images(data.test.images, data.test.labels, mean, std, 64)
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
        images = Images(split.images[chosen], split.labels[chosen], split.mean, split.std)
        test = Images(data.test.images, data.test.labels, split.mean, split.std)

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


def evaluate(model: nn.Module, images: Images) -> tuple[float, float]:
    """-> accuracy in percent and mean cross-entropy, of the net in eval mode."""
    model.eval()
    correct = loss = 0.0
    with torch.no_grad():
        for inputs, targets in images.plain():
            outputs = model(inputs)
            correct += (outputs.argmax(1) == targets).sum().item()
            loss += functional.cross_entropy(outputs, targets, reduction="sum").item()
    return 100 * correct / len(images), loss / len(images)
