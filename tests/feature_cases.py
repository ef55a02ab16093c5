"""Data sets whose augmentation draws from all generators, and runs with and without kept features."""

import copy
import random
from contextlib import nullcontext

import numpy as np
import torch
from torch import nn

from freezeout_ext import FeatureCache, FreezeOut


class Pictures(torch.utils.data.Dataset):
    """Random images with random noise from torch, numpy and random; counts how many were decoded (in this process)."""

    def __init__(self, count=32, shape=(3, 8, 8), classes=4):
        generator = torch.Generator(device="cpu").manual_seed(1)
        self.images = torch.randn(count, *shape, generator=generator)
        self.labels = torch.arange(count) % classes
        self.decoded = 0

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        self.decoded += 1
        noise = torch.randn(()) + float(np.random.rand()) + random.random()
        return self.images[i] * noise, int(self.labels[i])


def small_net(*, dropout=0.0):
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(inplace=True),
        nn.Conv2d(6, 8, 3, padding=1, stride=2), nn.BatchNorm2d(8), nn.ReLU(inplace=True),
        nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Dropout(dropout), nn.Linear(8, 4),
    )  # fmt: skip


def train(
    model, dataset, *, cached=True, epochs=4, of_epochs=None, batch_size=8, views=2, lr=0.05, on_epoch=None,
    on_batch=None, cache=None, state=None, loader_arguments=None, cache_arguments=None, **freezing,
):  # fmt: skip
    """-> (losses of all steps, cache, freezeout). Not cached: the same views, and the model runs as ever.

    epochs: how many, or which of `of_epochs`. state: a list; the run goes on from what it holds, and leaves its own
    there.
    """
    cache = cache or FeatureCache(dataset, views=views, **{"measure": False, **(cache_arguments or {})})
    loader = cache.loader(batch_size, **(loader_arguments or {}))
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    freezing = {"start_frozen": 1, "t_0": 0.5, "scale_lr": False, **freezing}
    total_steps = (of_epochs or epochs) * len(loader)
    freezeout = FreezeOut(model, optimizer, total_steps=total_steps, cache=cache, **freezing)
    stateful, losses = (model, freezeout, optimizer, cache), []
    for what, saved in zip(stateful, state or (), strict=False):
        what.load_state_dict(saved)
    for epoch in epochs if isinstance(epochs, range) else range(epochs):
        loader.epoch = epoch
        if on_epoch:
            on_epoch(epoch, freezeout, cache)
        for inputs, targets, keys in loader:
            with cache.samples(keys) if cached else nullcontext():
                loss = nn.functional.cross_entropy(model(inputs), targets)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            freezeout.step()
            losses.append(loss.item())
            if on_batch:
                on_batch(len(losses), freezeout)
    if state is not None:
        state[:] = [copy.deepcopy(what.state_dict()) for what in stateful]
    return losses, cache, freezeout
