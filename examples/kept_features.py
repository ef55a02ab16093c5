"""Fine-tune with kept features in a plain loop: python examples/kept_features.py

Runs offline: a small ResNet learns scikit-learn's digits, then, with its first layers frozen, the same digits on their
side. From the third epoch on nothing is read from the data set any more, and the frozen layers do not run.
"""

import argparse
import time

import torch
from sklearn.datasets import load_digits
from torch import nn

from freezeout_ext import FeatureCache, FreezeOut
from freezeout_ext.models import build_model


class Digits(torch.utils.data.Dataset):
    """Digits with a random shift of a pixel; on their side where `turned`."""

    def __init__(self, *, turned: bool) -> None:
        found = load_digits()
        self.images = torch.from_numpy(found.images).float().div(16).unsqueeze(1)
        self.images = self.images.rot90(1, (2, 3)).contiguous() if turned else self.images
        self.labels = found.target

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        down, right = torch.randint(-1, 2, (2,)).tolist()
        return self.images[i].roll((down, right), (1, 2)), int(self.labels[i])


def train(model: nn.Module, dataset: Digits, epochs: int, **freezing) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    cache = FeatureCache(dataset, views=2)
    loader = cache.loader(batch_size=64)
    freezeout = FreezeOut(model, optimizer, total_steps=epochs * len(loader), cache=cache, **freezing)
    model.train()
    for epoch in range(epochs):
        start = time.perf_counter()
        for inputs, targets, keys in loader:
            with cache.samples(keys):
                loss = nn.functional.cross_entropy(model(inputs), targets)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            freezeout.step()
        print(f"epoch {epoch}: {time.perf_counter() - start:.2f} s, last loss {loss.item():.3f}")
    print(cache.report())
    freezeout.close()


def main() -> float:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--start-frozen", type=int, default=3, help="layers that never train on the new digits")
    args = parser.parse_args()
    torch.manual_seed(0)
    model = build_model("wrn-10-1", 10, in_channels=1, image_size=8)
    train(model, Digits(turned=False), 3, t_0=1.0)
    train(model, Digits(turned=True), args.epochs, start_frozen=args.start_frozen, t_0=1.0)
    model.eval()
    turned = Digits(turned=True)
    with torch.no_grad():
        accuracy = float((model(turned.images).argmax(1) == torch.from_numpy(turned.labels)).float().mean())
    print(f"accuracy on the digits it has seen: {accuracy:.3f}")
    return accuracy


if __name__ == "__main__":
    main()
