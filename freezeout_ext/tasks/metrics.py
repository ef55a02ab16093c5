"""Metric: what a task reports beside its loss, as sums that add up over batches."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..batch import size

IGNORED = -100  # cross_entropy's ignore_index


def ratio(sums: Tensor) -> Tensor:
    """sums[0] / sums[1]."""
    return sums[0] / sums[1]


@dataclass(frozen=True)
class Metric:
    """value(sum over batches of sums(outputs, targets)).

    Calling a metric with (outputs, targets) gives its value for that batch alone.

    Args:
        name: in logs and tables, such as "accuracy".
        sums: (outputs, targets) -> tensor [K] of what adds up over batches.
        value: sums [K] -> the metric. Default: sums[0] / sums[1].
        higher_is_better: whether a larger value is a better one.
        unit: behind the value in `text`; with "%" the value is given times 100. Training shows accuracies in percent.
    """

    name: str
    sums: Callable[[Any, Any], Tensor]
    value: Callable[[Tensor], Tensor] = ratio
    higher_is_better: bool = True
    unit: str = ""

    def __call__(self, outputs: Any, targets: Any) -> Tensor:
        return self.value(self.sums(outputs, targets).double())

    def text(self, value: float) -> str:
        """The value as it is printed: "93.42 %", "0.1834 mm"."""
        return f"{100 * value:.2f} %" if self.unit == "%" else f"{value:.4g} {self.unit}".rstrip()


class Totals:
    """The loss and what a metric adds up, summed over batches where these are."""

    def __init__(self, metric: Metric | None) -> None:
        self._metric, self._samples = metric, 0
        self._loss: Any = 0.0  # tensors from the first batch on
        self._sums: Any = 0.0

    @torch.no_grad()
    def add(self, loss: Tensor, outputs: Any, targets: Any) -> None:
        self._samples += size(targets)
        self._loss = self._loss + loss.double() * size(targets)
        if self._metric is not None:
            self._sums = self._sums + self._metric.sums(outputs, targets).double()

    def means(self, over_all: Callable[[Tensor], Tensor] = lambda sums: sums) -> tuple[float, float]:
        """(mean loss over the samples, metric over all batches); without a metric both are the loss.

        Args:
            over_all: sums of this process -> sums over all processes.
        """
        if not self._samples:
            raise ValueError("batches must give at least one batch, got none")
        loss, count = over_all(torch.stack([self._loss, torch.full_like(self._loss, self._samples)])).tolist()
        mean = loss / count
        return mean, mean if self._metric is None else float(self._metric.value(over_all(self._sums)))


def mean_of(name: str, function: Callable[[Any, Any], Any], *, higher_is_better: bool, unit: str = "") -> Metric:
    """The mean over all samples of a metric whose function(outputs, targets) is the mean over a batch's samples."""

    def sums(outputs: Any, targets: Any) -> Tensor:
        count = size(targets)
        value = torch.as_tensor(function(outputs, targets)).detach().double()
        return torch.stack([value * count, torch.full_like(value, count)])

    return Metric(name, sums, higher_is_better=higher_is_better, unit=unit)


def logits_of(outputs: Any) -> Any:
    """outputs.logits where there are any, as Transformers' models give them; else outputs."""
    return getattr(outputs, "logits", outputs)


def _hits(outputs: Any, targets: Tensor) -> Tensor:
    found = logits_of(outputs).argmax(1)
    if found.shape != targets.shape:
        raise ValueError(f"targets must be class numbers {list(found.shape)}, got {list(targets.shape)}")
    counted = targets != IGNORED
    return torch.stack([((found == targets) & counted).sum(), counted.sum()]).double()


# The part of samples, pixels or tokens with argmax(outputs, dim=1) == targets. A target of -100 is left out.
accuracy = Metric("accuracy", _hits, unit="%")


def mean_iou(num_classes: int) -> Metric:
    """Mean over classes of intersection over union, counted over the whole set. A class that never occurs is left out.

    Shapes: outputs [N, C, ...], targets int64 [N, ...], -100 where a pixel does not count.
    """

    def sums(outputs: Any, targets: Tensor) -> Tensor:
        found, counted = logits_of(outputs).argmax(1), targets != IGNORED
        found, wanted = found[counted], targets[counted]
        counts = [torch.bincount(x, minlength=num_classes) for x in (found[found == wanted], found, wanted)]
        return torch.cat([counts[0], counts[1] + counts[2] - counts[0]]).double()

    def value(sums: Tensor) -> Tensor:
        both, either = sums.chunk(2)
        return (both / either)[either > 0].mean()

    return Metric("mean IoU", sums, value, unit="%")


def _errors(power: int) -> Callable[[Any, Tensor], Tensor]:
    def sums(outputs: Any, targets: Tensor) -> Tensor:
        if outputs.shape != targets.shape:
            raise ValueError(
                f"outputs must have the shape of targets, {list(targets.shape)}, got {list(outputs.shape)}"
            )
        errors = (outputs.double() - targets.double()).abs().pow(power)
        return torch.stack([errors.sum(), torch.full_like(errors.sum(), errors.numel())])

    return sums


def rmse(unit: str = "") -> Metric:
    """sqrt(mean over all elements of (outputs - targets) ** 2)."""
    return Metric("RMSE", _errors(2), lambda sums: ratio(sums).sqrt(), higher_is_better=False, unit=unit)


def mean_absolute_error(unit: str = "") -> Metric:
    """mean over all elements of |outputs - targets|."""
    return Metric("mean absolute error", _errors(1), higher_is_better=False, unit=unit)
