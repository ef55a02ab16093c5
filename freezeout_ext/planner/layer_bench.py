"""LayerBench: whole training steps of copies of a model, in which every layer is timed."""

import copy
import time
from collections import defaultdict
from collections.abc import Callable
from statistics import median
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..batch import Batch, call, detached
from ..fused import FusedSGD
from ..layers import Layers, find_layers
from ..memory import SavedBytes, nbytes
from .costs import StepCosts
from .marks import LayerMarks
from .median_error import median_error

WARM_UP_STEPS = 2  # of each copy
FULL_STEPS = 3  # whole steps a round, with instruments and without

MakeOptimizer = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]


class LayerBench:
    """Copies of a model in training, and what each part of their steps took, once or more a round."""

    def __init__(
        self,
        model: nn.Module,
        inputs: Batch,
        targets: Batch,
        criterion: Callable[..., Tensor],
        *,
        layers: Layers | None = None,
        make_optimizer: MakeOptimizer | None = None,
        amp_dtype: torch.dtype | None = None,
    ) -> None:
        self.clock = cpu_clock()  # for the CPU; on CUDA events are the clock
        self._original = model, layers or find_layers(model)
        self._make_optimizer = make_optimizer or _make_optimizer
        self.inputs, self.targets, self.criterion = detached(inputs), targets, criterion
        self.amp_dtype, self.device = amp_dtype, next(model.parameters()).device
        self._copy()
        self.forget()

    def _copy(self) -> None:
        for name in ("model", "layers", "optimizer"):
            self.__dict__.pop(name, None)  # the old copies are freed before the new ones are made
        self.model, self.layers = copy.deepcopy(self._original)
        for p in self.model.parameters():
            p.grad = None
        self.optimizer = self._make_optimizer([{"params": list(layer.parameters.values())} for layer in self.layers])
        for group in self.optimizer.param_groups:
            group["lr"] = group["lr"] * 0

    def forget(self) -> None:
        # Seconds by (part, layer): of each round, and of the one that is going on.
        self.rounds: list[dict[tuple[str, int], list[float]]] = []
        self.times: dict[tuple[str, int], list[float]] = defaultdict(list)

    def round(self, on_layer: Callable[[int], None] = lambda done: None) -> None:
        """Times every part of a step once or more. Calls on_layer(layers done in all rounds) before each layer."""
        done = len(self.rounds) * len(self.layers)
        on_layer(done)
        self._copy()
        for _ in range(WARM_UP_STEPS):
            self.whole_step()
        self.times = defaultdict(list)
        for _ in range(FULL_STEPS):
            self.whole_step()
            self.step(0)
        for k in range(1, len(self.layers)):
            on_layer(done + k)
            # After a change the first step's update prepares its tables anew, so the second step's update counts.
            self.step(k)
            self.times.pop(("optimizer", k))
            self.step(k)
        self.rounds.append(self.times)

    def whole_step(self) -> None:
        self._freeze(0)
        start = self._now()
        self._loss().backward()
        self._update()
        end = self._now()
        self._synchronize()
        self.times["whole_step", 0].append(self._difference(end, start))

    def step(self, k: int) -> None:
        """Runs one step with layers 0 .. k-1 frozen, and adds the times of its parts."""
        self._freeze(k)
        with LayerMarks(self.model, self.layers, self._now, self._difference) as marks:
            start = self._now()
            with self._autocast():
                outputs = call(self.model, self.inputs)
                called = self._now()
                loss = self.criterion(outputs, self.targets)
            forwarded = self._now()
            loss.backward()
            backwarded = self._now()
            self._update()
            end = self._now()
        self._synchronize()
        for i, seconds in enumerate(marks.forward_intervals(start, called)):
            self.times["forward" if i >= k else "frozen_forward", i].append(seconds)
        self.times["loss", 0].append(self._difference(forwarded, called))
        for i, seconds in enumerate(marks.backward_intervals(forwarded, backwarded, k), k):
            self.times["backward_first" if i == k else "backward", i].append(seconds)
        self.times["optimizer", k].append(self._difference(end, backwarded))

    def costs(self, **others) -> StepCosts:
        """StepCosts of the medians over all rounds.

        Args:
            others: further fields of StepCosts.
        """
        error = None
        if len(self.rounds) > 1:
            each = [StepCosts(**self._medians([times])) for times in self.rounds]
            savings = ([costs.saving(k) for costs in each] for k in range(len(self.layers)))
            # Of two values or more there is one.
            error = tuple(cast("float", median_error(values)) for values in savings)
        return StepCosts(**self._medians(self.rounds), saving_error=error, **others)

    def _medians(self, rounds: list[dict[tuple[str, int], list[float]]]) -> dict:
        def part(name: str) -> tuple[float, ...]:
            found = [[s for times in rounds for s in times.get((name, i), ())] for i in range(len(self.layers))]
            return tuple(median(seconds) if seconds else 0.0 for seconds in found)

        forward, first = part("forward"), part("backward_first")
        return {
            "layers": tuple(layer.name for layer in self.layers),
            "forward": forward,
            # The last layer never freezes.
            "frozen_forward": (*part("frozen_forward")[:-1], forward[-1]),
            # Layer 0 never has its input's gradient.
            "backward": (first[0], *part("backward")[1:]),
            "backward_first": first,
            "optimizer": part("optimizer"),
            "loss": part("loss")[0],
            "whole_step": part("whole_step")[0],
        }

    def memory(self) -> tuple[int, ...]:
        """Bytes with k layers frozen, counted. A storage counts to the last layer that saved it."""
        self._freeze(0)
        held = nbytes((*self.model.parameters(), *self.model.buffers()))
        with LayerMarks(self.model, self.layers, lambda: 0) as marks:
            watched = SavedBytes(self.model, lambda: marks.current)
            with watched.watch():
                loss = self._loss()
        del loss
        saved = [watched.by_owner.get(i, 0) for i in range(len(self.layers))]
        for i, layer in enumerate(self.layers):
            for p in layer.parameters.values():
                state = self.optimizer.state.get(p, {}).values()
                saved[i] += nbytes((p, *(v for v in state if isinstance(v, Tensor) and v.dim())))
        return tuple(held + sum(saved[k:]) for k in range(len(saved)))

    def _freeze(self, k: int) -> None:
        self.model.train()
        for i, layer in enumerate(self.layers):
            for p in layer.parameters.values():
                p.requires_grad_(i >= k)
            for module in layer.submodules:
                module.training = i >= k

    def _loss(self) -> Tensor:
        with self._autocast():
            return self.criterion(call(self.model, self.inputs), self.targets)

    def _update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=self.amp_dtype, enabled=self.amp_dtype is not None)

    def _now(self):
        if self.device.type != "cuda":
            return self.clock()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _difference(self, later, earlier) -> float:
        return earlier.elapsed_time(later) / 1000 if self.device.type == "cuda" else later - earlier

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def cpu_clock() -> Callable[[], float]:
    """The CPU time of this thread, where this thread does all the work.

    The backward of a CPU graph runs in the thread that calls it.
    """
    return time.thread_time if torch.get_num_threads() == 1 else time.perf_counter


def _make_optimizer(groups: list[dict]) -> torch.optim.Optimizer:
    return FusedSGD(groups, lr=0.0, momentum=0.9, nesterov=True, weight_decay=1e-4)
