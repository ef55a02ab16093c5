"""Trainer: the step and the epoch of training with FreezeOut."""

import math
import os
from collections.abc import Callable, Iterable, Iterator
from itertools import islice

import torch
from torch import Tensor
from torch.nn import functional

from ..freezeout import FreezeOut
from ..fused import FusedSGD
from ..graphed import GraphedStep
from ..integrations.compile import CompiledLayers
from ..layers import find_layers
from ..models import build_model
from ..schedule import Schedule
from .config import AMP_DTYPES, TrainConfig
from .data import DataSplits, Split, batches
from .energy import EnergyMeter
from .malloc import keep_freed_memory
from .measure import (
    Phase,
    SavedBytes,
    StepTimer,
    held_bytes,
    transitions_measured,
)
from .ranks import Ranks


class TrainingFailed(RuntimeError):
    """The run cannot go on (its loss is no longer finite, or another process of it is gone)."""


class Trainer:
    """A model in training: its data, optimizer and FreezeOut, the step it is at and what its steps cost.

    All that is random comes from (seed, epoch): a resumed run needs the state at an epoch's end and nothing else.
    """

    def __init__(self, config: TrainConfig, data: DataSplits, ranks: Ranks = Ranks()) -> None:  # noqa: B008, frozen
        ranks.check(config)
        self.config, self.data, self.ranks = config, data, ranks
        self.device = torch.device(config.device)
        _set_backends(config)
        torch.manual_seed(config.seed)
        channels, height, _ = data.image_shape
        model = build_model(config.model, data.num_classes, in_channels=channels, image_size=height)
        memory_format = torch.channels_last if config.channels_last else torch.contiguous_format
        self.model = model.to(self.device, memory_format=memory_format)
        self.memory_format = memory_format
        # Whole batches alone: equal steps can be compared, and a batch norm never sees three images.
        self.steps_per_epoch = max(1, len(data.train) // config.batch_size)
        self.total_steps = config.steps or config.epochs * self.steps_per_epoch
        self.epochs = math.ceil(self.total_steps / self.steps_per_epoch)
        self.optimizer = make_optimizer(config, model.parameters())
        warmup_steps = config.warmup_steps or round(config.warmup_epochs * self.steps_per_epoch)
        self.freezeout = self.cosine = None
        self.layer_names = [layer.name for layer in find_layers(self.model)]
        if config.method != "freezeout":
            self.cosine = Schedule(1, self.total_steps, t_0=1.0, warmup_steps=warmup_steps)
        if config.method != "full":
            self.freezeout = FreezeOut(
                self.model,
                self.optimizer,
                total_steps=self.total_steps,
                t_0=config.t_0,
                how_scale=config.how_scale,
                scale_lr=config.scale_lr,
                warmup_steps=warmup_steps,
                max_transitions=config.max_transitions,
                anneal=config.method == "freezeout",
                measure_prefix=not config.deterministic,
                **({} if config.prefix is None else {"prefix": config.prefix}),
            )
        self.amp_dtype = AMP_DTYPES[config.amp]
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.amp == "fp16")
        self.net, self.follower = ranks.wrapped(self.model, self.freezeout)
        self.compiled = self._compile() if config.compile else None
        self.graphed = self._graph() if config.graph else None
        self.step = 0
        self.epoch = 0  # epochs done
        self.train_seconds = 0.0
        self.energy: float | None = 0.0  # joules
        self.phases: list[Phase] = []
        self._set_cosine_rates()

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
        totals = torch.zeros(2, dtype=torch.float64, device=self.device)  # loss, correct
        timer, phase_of, images = StepTimer(self.device), [], 0
        self._reset_peak_memory()  # evaluation's
        meter = EnergyMeter(self.device)
        timer.mark()
        for inputs, targets in islice(self.train_batches(), self.total_steps - self.step):
            phase_of.append(self._train_step(inputs, targets, totals))
            images += len(targets) * self.ranks.world
            timer.mark()
            on_step(self.step)
        seconds = timer.seconds()
        joules = meter.joules()
        self.energy = None if None in (joules, self.energy) else self.energy + joules
        self._count_memory()
        for name, durations in (("seconds", seconds), ("cpu_seconds", timer.cpu_seconds())):
            for phase, duration in zip(phase_of, durations, strict=False):  # cpu_seconds may be empty
                if phase is not None:
                    getattr(phase, name).append(duration)
        self.epoch += 1
        self.train_seconds += sum(seconds)
        loss, correct = (self.ranks.sum(totals) / images).tolist()
        if not math.isfinite(loss):
            raise TrainingFailed(f"the loss became {loss} in epoch {self.epoch}: lower the learning rate")
        ordered = sorted(seconds)
        return {
            "epoch": self.epoch,
            "step": self.step,
            "train_loss": loss,
            "train_accuracy": correct,
            "learning_rates": self.learning_rates(),
            "num_frozen": self.num_frozen,
            "seconds_per_step": ordered[len(ordered) // 2],
            "seconds_per_step_mean": sum(seconds) / len(seconds),
            "examples_per_second": images / sum(seconds),
            "train_seconds": self.train_seconds,
            "train_joules": self.energy,
            "peak_memory_bytes": max(p.memory for p in self.phases if p.first_step + p.steps > first_step),
            "transitions": transitions_measured(self.transitions, self.phases)[transitions_before:],
        }

    @torch.no_grad()
    def evaluate(self, split: Split) -> tuple[float, float]:
        """(mean loss, accuracy) over the split."""
        self.model.eval()
        loss = torch.zeros((), dtype=torch.float64, device=self.device)
        correct = torch.zeros((), dtype=torch.int64, device=self.device)
        for inputs, targets in batches(split, max(self.config.batch_size, 500)):
            with self._autocast():
                logits = self.model(inputs.contiguous(memory_format=self.memory_format))
            loss += functional.cross_entropy(logits.float(), targets, reduction="sum")
            correct += (logits.argmax(1) == targets).sum()
        return loss.item() / len(split), correct.item() / len(split)

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
            "train_joules": self.energy,
            "phases": [phase.to_dict() for phase in self.phases],
        }

    def load_state_dict(self, state: dict) -> None:
        # The weights first: what freezing prepares is then prepared from them.
        self.model.load_state_dict(state["model"])
        if self.freezeout:
            self.freezeout.load_state_dict(state["freezeout"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.epoch, self.step, self.train_seconds = state["epoch"], state["step"], state["train_seconds"]
        self.energy = state["train_joules"]
        if self.graphed:
            self.graphed.step_count = self.step
        self.phases = [Phase(**phase) for phase in state["phases"]]

    def train_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        for inputs, targets in self._whole_batches():
            yield self.ranks.part(inputs), self.ranks.part(targets)

    def _whole_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        return batches(
            self.data.train,
            self.config.batch_size,
            epoch=self.epoch,
            seed=self.config.seed,
            shuffle=True,
            augment=self.config.augment,
            drop_last=len(self.data.train) >= self.config.batch_size,
        )

    def _train_step(self, inputs: Tensor, targets: Tensor, totals: Tensor) -> Phase | None:
        """One optimizer step. Returns the phase that its time belongs to, None for the first step of a phase."""
        opens = not self.phases or self.phases[-1].num_frozen != self.num_frozen
        if opens:
            self._count_memory()
            self.phases.append(Phase(self.num_frozen, self.step))
        phase = self.phases[-1]
        inputs = inputs.contiguous(memory_format=self.memory_format)
        if opens and self.device.type == "cpu":
            saved = SavedBytes(self.model)
            with saved.watch():
                loss, logits = self._optimize(inputs, targets)
            phase.memory = saved.total + held_bytes(self.model, self.optimizer)
        else:
            loss, logits = self._optimize(inputs, targets)
        phase.steps += 1
        self.step += 1
        if not self.graphed:
            if self.freezeout:
                self.freezeout.step()
            self._set_cosine_rates()
        with torch.no_grad():
            totals[0] += loss.detach() * len(targets)
            totals[1] += (logits.argmax(1) == targets).sum()
        return None if opens else phase

    def _optimize(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Forward, backward and update; where the step is a graph, the next learning rates and freezes too."""
        if self.graphed:
            return self.graphed(inputs, targets)
        with self._autocast():
            logits = self.net(inputs)
            loss = functional.cross_entropy(logits, targets)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        return loss, logits

    def _graph(self) -> GraphedStep:
        return GraphedStep(
            self.model,
            functional.cross_entropy,
            self.optimizer,
            self.freezeout,
            cosine=self.cosine,
            scaler=self.scaler,
            amp_dtype=self.amp_dtype,
        )

    def _compile(self) -> CompiledLayers:
        # Full training is compiled in the same pieces: a FreezeOut that never steps names them.
        whole = {"total_steps": self.total_steps, "t_0": 1.0, "anneal": False}
        return CompiledLayers(self.freezeout or FreezeOut(self.model, self.optimizer, **whole))

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=self.amp_dtype, enabled=self.amp_dtype is not None)

    def _set_cosine_rates(self) -> None:
        if self.cosine:
            rate = self.config.lr * self.cosine.lr_factor(0, self.step)
            for group in self.optimizer.param_groups:
                if not group.get("frozen"):
                    group["lr"] = rate

    def _count_memory(self) -> None:
        """Takes the CUDA allocator's peak into the current phase."""
        if self.device.type == "cuda" and self.phases:
            phase = self.phases[-1]
            phase.memory = max(phase.memory, torch.cuda.max_memory_allocated(self.device))
        self._reset_peak_memory()

    def _reset_peak_memory(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)


def make_optimizer(config: TrainConfig, parameters: Iterable[Tensor] | Iterable[dict]) -> torch.optim.Optimizer:
    # A CUDA graph holds what the host knew at its capture: rates and counts have to be on the device.
    on_device = {"fused": True} if config.graph and config.device == "cuda" and config.optimizer != "fused-sgd" else {}
    if config.optimizer == "adamw":
        capturable = {"capturable": True} if on_device else {}
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
