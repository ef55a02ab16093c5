"""Totals: the loss and the metric of an epoch, summed up where the batches are."""

from typing import Any

import torch
from torch import Tensor

from ..batch import Batch, size
from ..tasks import Task
from .ranks import Ranks


class Totals:
    """Sums of the loss and of what the metric adds up, over the batches of an epoch; on the device."""

    def __init__(self, task: Task, device: torch.device) -> None:
        self._metric = task.metric
        self._loss = torch.zeros((), dtype=torch.float64, device=device)
        self._sums: Tensor | None = None

    @torch.no_grad()
    def add(self, loss: Tensor, outputs: Any, targets: Batch) -> None:
        self._loss += loss * size(targets)
        if self._metric is not None:
            sums = self._metric.sums(outputs, targets).to(self._loss)
            self._sums = sums if self._sums is None else self._sums + sums

    def means(self, samples: int, ranks: Ranks) -> tuple[float, float]:
        """(mean loss, metric) over the samples of all processes."""
        loss = ranks.sum(self._loss).item() / samples
        if self._metric is None or self._sums is None:
            return loss, loss
        return loss, float(self._metric.value(ranks.sum(self._sums)))
