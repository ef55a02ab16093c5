"""Trainer: the step and the epoch of training with FreezeOut, of any task."""

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from ..batch import Batch, part, size, to
from ..features import FeatureCache
from ..freezeout import FreezeOut
from ..fused import FusedAdamW, FusedSGD
from ..graphed import GraphedStep
from ..integrations.compile import CompiledLayers
from ..layers import find_layers
from ..memory import SavedBytes, held_memory
from ..schedule import Schedule
from ..tasks import Task, batches
from ..tasks.batches import as_batch
from .config import AMP_DTYPES, CACHE_DTYPES, TrainConfig
from .malloc import keep_freed_memory
from .measure import Phase, StepTimer, transitions_measured
from .ranks import Ranks

# Whole sets are evaluated in batches of this size at least.
EVALUATION_BATCH = 500


class TrainingFailed(RuntimeError):
    """The run cannot go on (its loss is no longer finite, or another process of it is gone)."""


class Trainer:
    """A task in training: its model, optimizer and FreezeOut, the step it is at and what its steps cost.

    All that is random comes from (seed, epoch): a resumed run needs the state at an epoch's end and nothing else.
    """

    def __init__(self, config: TrainConfig, task: Task, ranks: Ranks = Ranks()) -> None:  # noqa: B008, frozen
        ranks.check(config)
        self.config, self.task, self.ranks = config, task, ranks
        self.device = torch.device(config.device)
        _set_backends(config)
        torch.manual_seed(config.seed)
        self.memory_format = torch.channels_last if config.channels_last else torch.contiguous_format
        self.model = task.make_model().to(  # type: ignore[call-overload]  # its overloads leave memory_format out
            self.device, memory_format=self.memory_format
        )
        # Whole batches alone: equal steps can be compared, and a batch norm never sees three images.
        self.steps_per_epoch = max(1, len(task.train) // config.batch_size)
        self.total_steps = config.steps or config.epochs * self.steps_per_epoch
        self.epochs = math.ceil(self.total_steps / self.steps_per_epoch)
        layers = find_layers(self.model, task.layers)
        self.layer_names = [layer.name for layer in layers]
        self.optimizer = make_optimizer(config, task, [p for p in self.model.parameters() if p.requires_grad])
        warmup_steps = config.warmup_steps or round(config.warmup_epochs * self.steps_per_epoch)
        self.freezeout = cosine = None
        self.cache = self._make_cache() if config.cache else None
        if config.method != "freezeout":
            cosine = Schedule(1, self.total_steps, t_0=1.0, warmup_steps=warmup_steps)
        if config.method != "full":
            how: dict[str, Any] = {} if config.prefix is None else {"prefix": config.prefix}
            self.freezeout = FreezeOut(
                self.model,
                self.optimizer,
                total_steps=self.total_steps,
                t_0=config.t_0,
                how_scale=config.how_scale,
                scale_lr=config.scale_lr,
                layers=layers,
                warmup_steps=warmup_steps,
                max_transitions=config.max_transitions,
                start_frozen=config.start_frozen,
                cache=self.cache,
                anneal=config.method == "freezeout",
                measure_prefix=not config.deterministic,
                **how,
            )
        assert config.amp is not None  # of a resolved config
        self.amp_dtype = AMP_DTYPES[config.amp]
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.amp == "fp16")
        net, self.follower = ranks.wrapped(self.model, self.freezeout)
        self.compiled = self._compile() if config.compile else None
        self.train_step = GraphedStep(
            net,
            task.criterion,
            self.optimizer,
            self.freezeout,
            cosine=cosine,
            scaler=self.scaler,
            amp_dtype=self.amp_dtype,
            graph=config.graph,
        )
        self.epoch = 0  # epochs done
        self.train_seconds = 0.0
        self.phases: list[Phase] = []

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.train_step.step_count

    @property
    def num_frozen(self) -> int:
        return self.freezeout.num_frozen if self.freezeout else 0

    @property
    def transitions(self) -> list[dict]:
        return [vars(t) | {"layers": list(t.layers)} for t in self.freezeout.transitions] if self.freezeout else []

    def learning_rates(self) -> list[float]:
        """The learning rate that the next step uses, of each layer."""
        if self.freezeout:
            return self.freezeout.learning_rates()
        return [float(self.optimizer.param_groups[0]["lr"])] * len(self.layer_names)

    def train_epoch(self, on_step: Callable[[int], None] = lambda step: None) -> dict:
        """Trains to the end of the epoch, or of the run; calls on_step(step) after each. Returns the epoch's row."""
        self.model.train()
        torch.manual_seed(_epoch_seed(self.config.seed, self.epoch) + self.ranks.rank)
        first_step, transitions_before = self.step, len(self.transitions)
        totals = _Totals(self.task, self.device)
        timer, phase_of, samples = StepTimer(self.device), [], 0
        self._reset_peak_memory()  # evaluation's
        timer.mark()
        for inputs, targets, kept in islice(self._keyed_batches(), self.total_steps - self.step):
            with kept:
                phase_of.append(self._train_step(inputs, targets, totals))
            samples += size(targets) * self.ranks.world
            timer.mark()
            on_step(self.step)
        seconds = timer.seconds()
        self._count_memory()
        for name, durations in (("seconds", seconds), ("cpu_seconds", timer.cpu_seconds())):
            for phase, duration in zip(phase_of, durations, strict=False):  # cpu_seconds may be empty
                if phase is not None:
                    getattr(phase, name).append(duration)
        self.epoch += 1
        self.train_seconds += sum(seconds)
        loss, metric = totals.means(samples, self.ranks)
        if not math.isfinite(loss):
            raise TrainingFailed(f"the loss became {loss} in epoch {self.epoch}: lower the learning rate")
        ordered = sorted(seconds)
        return {
            "epoch": self.epoch,
            "step": self.step,
            **self._judged("train", loss, metric),
            "learning_rates": self.learning_rates(),
            "num_frozen": self.num_frozen,
            "seconds_per_step": ordered[len(ordered) // 2],
            "seconds_per_step_mean": sum(seconds) / len(seconds),
            "examples_per_second": samples / sum(seconds),
            "train_seconds": self.train_seconds,
            "peak_memory_bytes": max(p.memory for p in self.phases if p.first_step + p.steps > first_step),
            "transitions": transitions_measured(self.transitions, self.phases)[transitions_before:],
        }

    def evaluate(self, name: str, dataset: Any) -> dict:
        """{"NAME_loss": mean loss, "NAME_METRIC": mean metric} over a dataset of the task."""
        batch_size = self.config.batch_size
        if hasattr(dataset, "batches"):
            batch_size = max(batch_size, EVALUATION_BATCH)
        with torch.autocast(self.device.type, dtype=self.amp_dtype, enabled=self.amp_dtype is not None):
            found = self.task.evaluate(self.model, self._on_device(self._batches(dataset, batch_size)))
        return self._judged(name, *found)

    def state_dict(self) -> dict:
        return {
            "config": self.config.to_dict(),
            "epoch": self.epoch,
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "freezeout": self.freezeout.state_dict() if self.freezeout else None,
            "scaler": self.scaler.state_dict(),
            "train_seconds": self.train_seconds,
            "phases": [phase.to_dict() for phase in self.phases],
        }

    def load_state_dict(self, state: dict) -> None:
        """Goes on from what `state_dict` returned, at an epoch's end.

        Raises:
            ValueError: the state is not whole, or not of this run; the trainer is then good for nothing.
        """
        try:
            epoch, step = state["epoch"], state["step"]
            if not 1 <= epoch <= self.epochs or step != min(epoch * self.steps_per_epoch, self.total_steps):
                raise ValueError(f"epoch {epoch} does not end at step {step}")
            # The weights first: what freezing prepares is then prepared from them.
            self.model.load_state_dict(state["model"])
            if self.freezeout:
                self.freezeout.load_state_dict(state["freezeout"])
                if self.freezeout.step_count != step:
                    raise ValueError(f"FreezeOut's step is {self.freezeout.step_count}, the run's {step}")
            self.optimizer.load_state_dict(state["optimizer"])
            self.scaler.load_state_dict(state["scaler"])
            self.train_seconds = float(state["train_seconds"])
            self.phases = [Phase(**phase) for phase in state["phases"]]
            if sum(phase.steps for phase in self.phases) != step:
                raise ValueError(f"its phases do not add up to step {step}")
        except Exception as error:  # a damaged state raises whatever the operation it breaks at raises
            text = " ".join(str(error).split())
            raise ValueError(f"it cannot be gone on from: {type(error).__name__}: {text}"[:300]) from error
        self.epoch, self.train_step.step_count = epoch, step

    def train_batches(self) -> Iterator[tuple[Batch, Batch]]:
        """This process's parts of the batches of the epoch that comes next, on the device."""
        whole = len(self.task.train) >= self.config.batch_size
        options = {"shuffle": True, "drop_last": whole, "seed": self.config.seed, "epoch": self.epoch}
        for batch in self._on_device(self._batches(self.task.train, self.config.batch_size, **options)):
            yield tuple(part(each, self.ranks.rank, self.ranks.world) for each in batch)

    def _keyed_batches(self) -> Iterator[tuple[Batch, Batch, AbstractContextManager]]:
        """train_batches, each with the context in which its step runs: where features are kept it names the samples."""
        if self.cache is None:
            for inputs, targets in self.train_batches():
                yield inputs, targets, nullcontext()
            return
        for found in self.loader.batches(self.epoch):
            if isinstance(found, Mapping):
                keys = found["keys"]
                batch = as_batch({name: value for name, value in found.items() if name != "keys"})
            else:
                *batch, keys = found
                batch = as_batch(tuple(batch))
            (batch,) = self._on_device([batch])
            yield *batch, self.cache.samples(keys)

    def _make_cache(self) -> FeatureCache:
        config, task = self.config, self.task
        assert config.cache is not None  # a cache was asked for
        cache = FeatureCache(
            task.train,
            views=config.views,
            store=config.cache,
            dtype=CACHE_DTYPES[config.cache_dtype],
            seed=config.seed,
            measure=not config.deterministic,
        )
        loads: dict[str, Any] = (
            {} if cache.views.batched else {"num_workers": task.workers, "pin_memory": self.device.type == "cuda"}
        )
        self.loader = cache.loader(
            config.batch_size // self.ranks.world,
            drop_last=len(task.train) >= config.batch_size,
            collate_fn=task.collate,
            rank=self.ranks.rank,
            world_size=self.ranks.world,
            **loads,
        )
        return cache

    def _batches(self, dataset: Any, batch_size: int, **options) -> Iterator[tuple[Batch, Batch]]:
        options |= {"collate": self.task.collate, "workers": self.task.workers}
        return batches(dataset, batch_size, pin_memory=self.device.type == "cuda", **options)

    def _on_device(self, found: Iterable[tuple[Batch, Batch]]) -> Iterator[tuple[Batch, Batch]]:
        for inputs, targets in found:
            yield to(inputs, self.device, self.memory_format), to(targets, self.device)

    def _train_step(self, inputs: Batch, targets: Batch, totals: "_Totals") -> Phase | None:
        """One optimizer step. Returns the phase that its time belongs to, None for the first step of a phase."""
        opens = not self.phases or self.phases[-1].num_frozen != self.num_frozen
        if opens:
            self._count_memory()
            self.phases.append(Phase(self.num_frozen, self.step))
        phase = self.phases[-1]
        if opens and self.device.type == "cpu":
            # Before and after: the step makes the optimizer's state, and may free some of it.
            saved, before = SavedBytes(self.model), self._held_bytes()
            with saved.watch():
                loss, outputs = self.train_step(inputs, targets)
            phase.memory = saved.total + max(before, self._held_bytes())
        else:
            loss, outputs = self.train_step(inputs, targets)
        phase.steps += 1
        totals.add(loss, outputs, targets)
        return None if opens else phase

    def _held_bytes(self) -> int:
        return held_memory(self.model, [self.optimizer], None).held

    def _judged(self, name: str, loss: float, metric: float) -> dict:
        return {f"{name}_loss": loss} | ({f"{name}_{self.task.metric_name}": metric} if self.task.metric else {})

    def _compile(self) -> CompiledLayers:
        # Full training is compiled in the same pieces: a FreezeOut that never steps names them.
        whole: dict[str, Any] = {"total_steps": self.total_steps, "t_0": 1.0, "anneal": False}
        layers = self.task.layers
        return CompiledLayers(self.freezeout or FreezeOut(self.model, self.optimizer, layers=layers, **whole))

    def _count_memory(self) -> None:
        """Takes the CUDA allocator's peak into the current phase."""
        if self.device.type == "cuda" and self.phases:
            phase = self.phases[-1]
            phase.memory = max(phase.memory, torch.cuda.max_memory_allocated(self.device))
        self._reset_peak_memory()

    def _reset_peak_memory(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)


class _Totals:
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


def make_optimizer(
    config: TrainConfig, task: Task, parameters: Iterable[Tensor] | Iterable[dict]
) -> torch.optim.Optimizer:
    """The optimizer that config names over the parameters, or groups of them."""
    if config.optimizer == "task":
        return task.optimizer(parameters)
    assert config.lr is not None  # a resolved config has one for all but the task's own optimizer
    if config.optimizer == "fused-adamw":
        return FusedAdamW(parameters, lr=config.lr, weight_decay=config.weight_decay)
    # A CUDA graph holds what the host knew at its capture: rates and counts have to be on the device.
    on_device: dict[str, Any] = (
        {"fused": True} if config.graph and config.device == "cuda" and config.optimizer != "fused-sgd" else {}
    )
    if config.optimizer == "adamw":
        capturable: dict[str, Any] = {"capturable": True} if on_device else {}
        return torch.optim.AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay, **on_device, **capturable)
    sgd = FusedSGD if config.optimizer == "fused-sgd" else torch.optim.SGD
    return sgd(
        parameters,
        lr=config.lr,
        momentum=config.momentum,
        nesterov=config.momentum > 0,
        weight_decay=config.weight_decay,
        **on_device,
    )


def _set_backends(config: TrainConfig) -> None:
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    if config.deterministic:
        # cuBLAS reads it when CUDA starts.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if config.device == "cpu":
        keep_freed_memory()
    torch.use_deterministic_algorithms(config.deterministic)
    torch.backends.cudnn.benchmark = not config.deterministic


def _epoch_seed(seed: int, epoch: int) -> int:
    return (seed * 1_000_003 + epoch + 1) % 2**63
