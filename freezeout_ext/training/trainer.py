"""Trainer: the step and the epoch of training with FreezeOut, of any task."""

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict
from itertools import islice
from typing import Any

import torch

from ..batch import Batch, size
from ..freezeout import FreezeOut
from ..graphed import GraphedStep
from ..integrations.compile import CompiledLayers
from ..layers import find_layers
from ..memory import SavedBytes, held_memory
from ..schedule import Schedule
from ..tasks import Task
from ..tasks.metrics import Totals
from .config import AMP_DTYPES, TrainConfig
from .course import Length, freezing_options, tail_of
from .feed import Feed
from .malloc import keep_freed_memory
from .measure import Phase, StepTimer, threads_wait, transitions_measured
from .optimizer import make_optimizer
from .ranks import Ranks


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
        memory_format = torch.channels_last if config.channels_last else torch.contiguous_format
        self.model = task.make_model().to(  # type: ignore[call-overload]  # its overloads leave memory_format out
            self.device, memory_format=memory_format
        )
        self.length = length = Length.of(config, len(task.train))
        self.layers = find_layers(self.model, task.layers)
        self.layer_names = [layer.name for layer in self.layers]
        self.optimizer = make_optimizer(config, task, [p for p in self.model.parameters() if p.requires_grad])
        self.freezeout = cosine = None
        self.feed = Feed(config, task, ranks, self.device)
        self.tail = tail_of(config, length, self.layers)
        if config.method != "freezeout":
            cosine = Schedule(1, length.total_steps, t_0=1.0, warmup_steps=length.warmup_steps)
        if config.method != "full":
            how: dict[str, Any] = {} if config.prefix is None else {"prefix": config.prefix}
            self.freezeout = FreezeOut(
                self.model,
                self.optimizer,
                scale_lr=config.scale_lr,
                layers=self.layers,
                cache=self.feed.cache,
                anneal=config.method == "freezeout",
                measure_prefix=not config.deterministic,
                **freezing_options(config, length, self.layers),
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
        self.threads_wait: str | None = None  # of the last epoch's steps, see `measure`
        self.train_seconds = 0.0
        self.phases: list[Phase] = []

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.train_step.step_count

    @property
    def epochs(self) -> int:
        return self.length.epochs

    @property
    def total_steps(self) -> int:
        return self.length.total_steps

    def train_batches(self) -> Iterator[tuple[Batch, Batch]]:
        """This process's parts of the batches of the epoch that comes next, on the device, without a cache."""
        return self.feed.train_batches(self.epoch)

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
        """Trains to the end of the epoch, or of the run. Returns the epoch's row.

        Args:
            on_step: called with the number of steps done, after each.
        """
        self.model.train()
        torch.manual_seed(_epoch_seed(self.config.seed, self.epoch) + self.ranks.rank)
        first_step, transitions_before = self.step, len(self.transitions)
        totals = Totals(self.task.metric)
        timer, phase_of, samples = StepTimer(self.device), [], 0
        self._reset_peak_memory()  # evaluation's
        timer.mark()
        for inputs, targets, kept in islice(self.feed.steps(self.epoch), self.total_steps - self.step):
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
        if self.device.type == "cpu":
            self.threads_wait = threads_wait(seconds[1:], torch.get_num_threads())
        loss, metric = totals.means(self.ranks.sum)
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

    def evaluate(
        self, name: str, dataset: Any, on_batch: Callable[[int, int], None] = lambda done, total: None
    ) -> dict:
        """{"NAME_loss": mean loss, "NAME_METRIC": mean metric} over a dataset of the task.

        Args:
            on_batch: called with (batches done, batches) before each.
        """
        with torch.autocast(self.device.type, dtype=self.amp_dtype, enabled=self.amp_dtype is not None):
            found = self.task.evaluate(self.model, self.feed.evaluation_batches(dataset, on_batch))
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
            "cache": self.feed.cache.state_dict() if self.feed.cache else None,
            "train_seconds": self.train_seconds,
            "phases": [asdict(phase) for phase in self.phases],
        }

    def load_state_dict(self, state: dict) -> None:
        """Goes on from what `state_dict` returned, at an epoch's end.

        Raises:
            ValueError: the state is not whole, or not of this run; the trainer is then good for nothing.
        """
        try:
            epoch, step = state["epoch"], state["step"]
            if not 1 <= epoch <= self.epochs or step != self.length.end_of(epoch):
                raise ValueError(f"epoch {epoch} does not end at step {step}")
            # The weights first: what freezing prepares is then prepared from them.
            self.model.load_state_dict(state["model"])
            if self.freezeout:
                self.freezeout.load_state_dict(state["freezeout"])
                if self.freezeout.step_count != step:
                    raise ValueError(f"FreezeOut's step is {self.freezeout.step_count}, the run's {step}")
            self.optimizer.load_state_dict(state["optimizer"])
            self.scaler.load_state_dict(state["scaler"])
            if self.feed.cache and state.get("cache"):  # earlier versions saved none
                self.feed.cache.load_state_dict(state["cache"])
            self.train_seconds = float(state["train_seconds"])
            self.phases = [Phase(**phase) for phase in state["phases"]]
            if sum(phase.steps for phase in self.phases) != step:
                raise ValueError(f"its phases do not add up to step {step}")
        except Exception as error:  # a damaged state raises whatever the operation it breaks at raises
            text = " ".join(str(error).split())
            raise ValueError(f"it cannot be gone on from: {type(error).__name__}: {text}"[:300]) from error
        self.epoch, self.train_step.step_count = epoch, step

    def _train_step(self, inputs: Batch, targets: Batch, totals: Totals) -> Phase | None:
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
        # Before the next batch is asked for: one of kept features has no inputs for what thaws.
        if self.freezeout is not None and self.tail is not None and self.step == self.tail.step:
            self.freezeout.thaw_to(self.tail.num_frozen)
            self.train_step.step_count = self.step  # the rates of what thawed
        totals.add(loss, outputs, targets)
        return None if opens else phase

    def _held_bytes(self) -> int:
        return held_memory(self.model, [self.optimizer], None).held

    def _judged(self, name: str, loss: float, metric: float) -> dict:
        found = {f"{name}_loss": loss} | ({f"{name}_{self.task.metric_name}": metric} if self.task.metric else {})
        for what, value in found.items():
            if not math.isfinite(value):
                raise TrainingFailed(f"{what} became {value} in epoch {self.epoch}")
        return found

    def _compile(self) -> CompiledLayers:
        # Full training is compiled in the same pieces: a FreezeOut that never steps names them.
        whole: dict[str, Any] = {"total_steps": self.total_steps, "t_0": 1.0, "anneal": False}
        return CompiledLayers(self.freezeout or FreezeOut(self.model, self.optimizer, layers=self.layers, **whole))

    def _count_memory(self) -> None:
        """Takes the CUDA allocator's peak into the current phase."""
        if self.device.type == "cuda" and self.phases:
            phase = self.phases[-1]
            phase.memory = max(phase.memory, torch.cuda.max_memory_allocated(self.device))
        self._reset_peak_memory()

    def _reset_peak_memory(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)


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
