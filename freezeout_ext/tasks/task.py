"""Task: what is trained, apart from how its layers freeze."""

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import IterableDataset

from ..arguments import check_count
from ..batch import Batch, call, size, tensors, to
from ..torch_state import kept_generators
from .batches import as_batch, collated
from .metrics import Metric, Totals, accuracy, logits_of
from .places import TaskFault, kind, place_of, where_raised

Criterion = Callable[[Any, Any], Tensor]
SAMPLES_CHECKED = 2


def cross_entropy(outputs: Any, targets: Tensor) -> Tensor:
    """Mean of -log softmax(outputs, dim=1)[targets]. Targets of -100 are left out.

    Where outputs has logits, outputs.logits takes the place of outputs.

    Shapes: outputs [N, C, ...], targets int64 [N, ...].

    Raises:
        TypeError: targets are no class numbers. torch would take them for probabilities.
    """
    if not isinstance(targets, Tensor) or targets.is_floating_point() or targets.is_complex():
        raise TypeError(f"targets must be class numbers, got {kind(targets)}: give the task a criterion for them")
    return functional.cross_entropy(logits_of(outputs), targets)


@dataclass(frozen=True, eq=False, kw_only=True)
class Task:
    """What `train`, `plan` and `compare` are asked about: a model, its data and how its outputs are judged.

    A batch is a pair (inputs, targets), or a dict: the entry "labels" is the targets, the other entries are the inputs.
    The model takes a dict of inputs as keywords, a tuple or list as positions, anything else as its one argument.

    Args:
        make_model: () -> model, freshly initialised from torch's generator, or pretrained.
        train: map-style dataset, whose augmentation draws from torch's, numpy's or Python's generator; or `DeviceData`.
        evaluation: map-style dataset of samples that are not augmented; or `DeviceData`.
        validation: dataset that chooses best.pt, beside the evaluation.
        criterion: (outputs, targets) -> loss, the mean over the samples. Default: cross-entropy of class numbers.
        metric: a `Metric`. Default: accuracy where the criterion is cross-entropy, else the loss itself.
        make_optimizer: parameters, or groups of them -> torch optimizer. Default: AdamW with lr 0.001 and weight decay
            0.01. FreezeOut or a cosine sets the rates, which fall from those of the groups.
        epochs: of a run, where the caller names none.
        batch_size: of a run, where the caller names none.
        collate: samples -> batch. Default: torch's, which stacks tensors, numbers, tuples and dicts.
        workers: processes that load samples. With 0, samples are loaded between the steps.
        layers: see FreezeOut; None finds the layers.
        name: of the task, in logs and tables.
        notes: lines about the task to print before a run.
        file: the user's file that made the task, see `load_task`.
        fingerprint: of that file's code, see `load_task`.

    Raises:
        TypeError: an argument is of another kind. The error names the argument.
        ValueError: an argument is out of its range. The error names the argument.
    """

    make_model: Callable[[], nn.Module]
    train: Any
    evaluation: Any
    validation: Any = None
    criterion: Criterion = cross_entropy
    metric: Metric | None = None
    make_optimizer: Callable[[Iterable], torch.optim.Optimizer] | None = None
    epochs: int = 10
    batch_size: int = 32
    collate: Callable[[list], Any] | None = None
    workers: int = 0
    layers: Sequence | None = None
    name: str = "task"
    notes: tuple[str, ...] = ()
    file: Path | None = field(default=None, repr=False)
    fingerprint: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        for name in ("make_model", "criterion"):
            _check(name, callable(getattr(self, name)), "callable", getattr(self, name))
        for name in ("make_optimizer", "collate"):
            value = getattr(self, name)
            _check(name, value is None or callable(value), "callable or None", value)
        for name, dataset in self.datasets().items():
            fits = hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")
            fits = fits and not isinstance(dataset, IterableDataset)
            _check(name, fits, "a map-style dataset, with __len__ and __getitem__", dataset)
            if not len(dataset):
                raise ValueError(f"{name} must hold at least one sample, got none")
        for name, least in (("epochs", 1), ("batch_size", 1), ("workers", 0)):
            check_count(name, getattr(self, name), least)
        expected = "a Metric, such as mean_of(name, function, higher_is_better=...), or None"
        _check("metric", self.metric is None or isinstance(self.metric, Metric), expected, self.metric)
        if self.metric is None and self.criterion in (cross_entropy, functional.cross_entropy):
            object.__setattr__(self, "metric", accuracy)

    @property
    def metric_name(self) -> str:
        return self.metric.name if self.metric else "loss"

    @property
    def higher_is_better(self) -> bool:
        return self.metric is not None and self.metric.higher_is_better

    def datasets(self) -> dict[str, Any]:
        """train, evaluation and, where there is one, validation."""
        found = {"train": self.train, "evaluation": self.evaluation, "validation": self.validation}
        return {name: dataset for name, dataset in found.items() if name != "validation" or dataset is not None}

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Any]:
        """(loss, outputs) of the model for a batch on its device."""
        inputs, targets = as_batch(batch)
        outputs = call(model, inputs)
        return self.criterion(outputs, targets), outputs

    @torch.no_grad()
    def evaluate(self, model: nn.Module, batches: Iterable[Batch]) -> tuple[float, float]:
        """(mean loss over the samples, metric over all batches) of the model in eval mode.

        Without a metric both are the loss.
        The batches must be on the model's device.
        The model stays in eval mode.
        """
        model.eval()
        totals = Totals(self.metric)
        for batch in batches:
            totals.add(*self.loss(model, batch), as_batch(batch)[1])
        return totals.means()

    def optimizer(self, parameters: Iterable) -> torch.optim.Optimizer:
        """The optimizer that make_optimizer makes, or the default one."""
        if self.make_optimizer is not None:
            return self.make_optimizer(parameters)
        return torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.01)

    def check(self) -> None:
        """Makes the model and runs two samples through all that the task gives, on the CPU, forward and backward.

        The generators of torch, numpy and Python are left as they are.

        Raises:
            TaskFault: one sentence on what does not fit, with the line of the file where the line is known.
        """
        first: dict[str, Batch] = {}
        with kept_generators():
            for name, dataset in self.datasets().items():
                batch = self._asked(f"{name} must give samples", collated, dataset, self.collate, SAMPLES_CHECKED)
                inputs, targets = self._asked(f"{name} must give pairs (inputs, targets)", as_batch, batch)
                for what, part in (("inputs", inputs), ("targets", targets)):
                    self._asked(f"{name}'s {what} must be tensors", size, part)
                first[name] = _on_cpu(inputs), _on_cpu(targets)
            model = self._asked("make_model must make a model", self.make_model)
            self._demand("make_model must return an nn.Module", isinstance(model, nn.Module), model, self.make_model)
            parameters = [p for p in model.parameters() if p.requires_grad]
            self._demand("make_model's model must have a parameter that trains", bool(parameters), model)
            self._check_step(model.train(), *first.pop("train"))
            for name, batch in first.items():
                loss, _ = self._asked(f"the model and the criterion must take {name}", self.evaluate, model, [batch])
                if not math.isfinite(loss):
                    raise TaskFault(f"{name} must give a finite loss, got {loss}")
            optimizer = self._asked("make_optimizer must take the parameters", self.optimizer, parameters)
            fits = isinstance(optimizer, torch.optim.Optimizer)
            self._demand("make_optimizer must return a torch optimizer", fits, optimizer, self.make_optimizer)

    def _check_step(self, model: nn.Module, inputs: Batch, targets: Batch) -> None:
        outputs = self._asked(f"the model must take the inputs, {kind(inputs)}", call, model, inputs)
        found = f"{kind(outputs)} and {kind(targets)}"
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "Using a target size")  # outputs [N, 1] less targets [N] are [N, N]
            loss = self._asked(f"criterion must take outputs and targets, {found}", self.criterion, outputs, targets)
        scalar = isinstance(loss, Tensor) and not loss.dim()
        self._demand("criterion must return a tensor without dimensions", scalar, loss, self.criterion)
        depends = loss.requires_grad
        self._demand("criterion's loss must depend on the model's parameters", depends, loss, self.criterion)
        if not loss.isfinite():
            raise TaskFault(f"{self._place(self.criterion)}criterion must return a finite loss, got {loss.item()}")
        self._asked("the loss must have a gradient", loss.backward)
        metric = self.metric
        if metric is not None:
            demand = f"metric must take outputs and targets, {found}"
            with torch.no_grad():  # of so few samples a metric may be undefined: a recall without positives
                self._asked(demand, lambda: float(metric(outputs, targets)))

    def _place(self, function: Callable | None) -> str:
        return place_of(self.file, function)

    def _demand(self, demand: str, fits: bool, found: object, function: Callable | None = None) -> None:
        if not fits:
            raise TaskFault(f"{self._place(function)}{demand}, got {kind(found)}")

    def _asked(self, demand: str, function: Callable, *arguments: Any) -> Any:
        try:
            return function(*arguments)
        except Exception as error:  # a user's code raises what it likes
            text = " ".join(str(error).split()) or "no message"
            where = where_raised(self.file, error)
            raise TaskFault(f"{where}{demand}: {type(error).__name__}: {text}") from error


def _on_cpu(batch: Batch) -> Batch:
    """The batch with its tensors on the CPU, where the model is."""
    return to(batch, torch.device("cpu")) if any(t.device.type != "cpu" for t in tensors(batch)) else batch


def _check(name: str, fits: bool, expected: str, value: object) -> None:
    if not fits:
        raise TypeError(f"{name} must be {expected}, got {kind(value)}")
