"""measure_costs: forward and backward of every layer, timed inside whole training steps on the model's device."""

import copy
import time
from collections.abc import Callable, Iterable
from statistics import median

import torch
from torch import Tensor, nn

from ..fused_sgd import FusedSGD
from ..layers import Layers, find_layers
from .costs import StepCosts
from .marks import LayerMarks

WARM_UP_STEPS = 3
FULL_STEPS = 3  # whole steps a round, with instruments and without
LOADER_BATCHES = 20

MakeOptimizer = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


def measure_costs(
    model: nn.Module,
    example_inputs: Tensor,
    targets: Tensor,
    criterion: Callable[[Tensor, Tensor], Tensor],
    *,
    layers: Layers | None = None,
    make_optimizer: MakeOptimizer | None = None,
    amp_dtype: torch.dtype | None = None,
    rounds: int = 3,
    max_seconds: float = 60.0,
    loader: float = 0.0,
    loader_ahead: bool = False,
    other: float = 0.0,
) -> StepCosts:
    """StepCosts in seconds: medians over `rounds` rounds, in each of which every layer is the first active one.

    Each step is a whole training step, so caches, allocator and kernel choice are those of training. What precedes
    the first active layer is frozen by `requires_grad` alone: no FreezeOut runs, and its saving is predicted, not
    measured. Steps without instruments, in turn with the others, give `whole_step`. All of it happens on a copy of the
    model with rates of 0; the model, its gradients and torch's generators stay as they are.

    Args:
        example_inputs, targets: one batch of the size to train with.
        criterion: (outputs, targets) -> scalar loss.
        layers: of `model`, as find_layers gives them.
        make_optimizer: parameters -> optimizer (FusedSGD with Nesterov momentum).
        amp_dtype: autocast's dtype, None for none.
        max_seconds: no further round begins after it; the first is always whole.
        loader, loader_ahead, other: seconds a step, see `StepCosts` and `measure_loader`.
    """
    if rounds < 1:
        raise ValueError(f"rounds must be >= 1, got {rounds}")
    device = next(model.parameters()).device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        bench = LayerBench(
            model,
            example_inputs,
            targets,
            criterion,
            layers=layers,
            make_optimizer=make_optimizer,
            amp_dtype=amp_dtype,
        )
        for _ in range(WARM_UP_STEPS):
            bench.step(0)
        if device.type == "cuda":
            for k in range(len(bench.layers)):  # cuDNN tries its algorithms
                bench.step(k)
        bench.forget()
        begin = time.perf_counter()
        done = 0
        while done < rounds and (done == 0 or time.perf_counter() - begin < max_seconds):
            bench.round()
            done += 1
        memory = bench.memory()
    return StepCosts(
        layers=tuple(layer.name for layer in bench.layers),
        **bench.medians(),
        loader=loader,
        loader_ahead=loader_ahead,
        other=other,
        memory=memory,
        source=f"measured on {_device_name(device)}, batch {len(example_inputs)}, medians of {done} rounds",
    )


def measure_loader(loader: Iterable, *, batches: int = LOADER_BATCHES) -> tuple[float, bool]:
    """(seconds a batch with nothing else going on, whether the loader works ahead while a step runs).

    The first batch is not counted. One that works ahead is a torch DataLoader with workers.
    """
    iterator = iter(loader)
    count = -1
    start = time.perf_counter()
    for count, _ in enumerate(iterator):
        if count == 0:
            start = time.perf_counter()
        if count == batches:
            break
    if count < 1:
        raise ValueError(f"loader must give at least 2 batches, got {count + 1}")
    return (time.perf_counter() - start) / count, getattr(loader, "num_workers", 0) > 0


class LayerBench:
    """A copy of the model in training, and what its steps took."""

    def __init__(
        self,
        model: nn.Module,
        inputs: Tensor,
        targets: Tensor,
        criterion: Callable[[Tensor, Tensor], Tensor],
        *,
        layers: Layers | None = None,
        make_optimizer: MakeOptimizer | None = None,
        amp_dtype: torch.dtype | None = None,
        clock: Callable[[], float] | None = None,
    ) -> None:
        # Of a CPU; CUDA has events.
        self.clock = clock or time.perf_counter
        layers = layers or find_layers(model)
        self.inputs, self.targets, self.criterion = inputs.detach(), targets, criterion
        self.amp_dtype, self.device = amp_dtype, inputs.device
        self.model, self.layers = copy.deepcopy((model, layers))
        for p in self.model.parameters():
            p.grad = None
        groups = [{"params": list(layer.parameters.values())} for layer in self.layers]
        make = make_optimizer or (lambda p: FusedSGD(p, lr=0.0, momentum=0.9, nesterov=True, weight_decay=1e-4))
        self.optimizer = make(groups)
        for group in self.optimizer.param_groups:
            group["lr"] = group["lr"] * 0
        self.forget()

    def forget(self) -> None:
        count = len(self.layers)
        self.forward: list[list[float]] = [[] for _ in range(count)]
        self.frozen_forward: list[list[float]] = [[] for _ in range(count)]
        self.backward: list[list[float]] = [[] for _ in range(count)]
        self.backward_first: list[list[float]] = [[] for _ in range(count)]
        self.optimizer_step: list[list[float]] = [[] for _ in range(count)]
        self.loss: list[float] = []
        self.whole: list[float] = []

    def round(self) -> None:
        for _ in range(FULL_STEPS):
            self.frozen_pass()
            self.whole_step()
            self.step(0)
        for k in range(1, len(self.layers)):
            # The update of the first step after a change prepares its tables anew: the second one counts.
            self.step(k, skip_optimizer=True)
            self.step(k)

    def whole_step(self) -> None:
        self._freeze(0)
        start = self._now()
        self._loss().backward()
        self._update()
        self.whole.append(self._seconds(start, self._now()))

    def step(self, k: int, *, skip_optimizer: bool = False) -> None:
        """One step with layers 0 .. k-1 frozen, its parts into the lists."""
        self._freeze(k)
        with LayerMarks(self.model, self.layers, self._now, self._difference) as marks:
            start = self._now()
            with self._autocast():
                outputs = self.model(self.inputs)
                called = self._now()
                loss = self.criterion(outputs, self.targets)
            forwarded = self._now()
            loss.backward()
            backwarded = self._now()
            self._update()
            end = self._now()
        self._synchronize()
        for i, seconds in enumerate(marks.forward_intervals(start, called, k), k):
            self.forward[i].append(seconds)
        self.loss.append(self._difference(forwarded, called))
        first, *rest = marks.backward_intervals(forwarded, backwarded, k)
        self.backward_first[k].append(first)
        for i, seconds in enumerate(rest, k + 1):
            self.backward[i].append(seconds)
        if not skip_optimizer:
            self.optimizer_step[k].append(self._difference(end, backwarded))

    @torch.no_grad()
    def frozen_pass(self) -> None:
        self.model.eval()
        with self._autocast(), LayerMarks(self.model, self.layers, self._now, self._difference) as marks:
            start = self._now()
            self.model(self.inputs)
            end = self._now()
        self._synchronize()
        for i, seconds in enumerate(marks.forward_intervals(start, end)):
            self.frozen_forward[i].append(seconds)

    def medians(self) -> dict:
        backward_first = tuple(map(median, self.backward_first))
        return {
            "forward": tuple(map(median, self.forward)),
            "frozen_forward": tuple(map(median, self.frozen_forward)),
            # Layer 0 never has its input's gradient.
            "backward": (backward_first[0], *map(median, self.backward[1:])),
            "backward_first": backward_first,
            "optimizer": tuple(map(median, self.optimizer_step)),
            "loss": median(self.loss),
            "whole_step": median(self.whole),
        }

    def memory(self) -> tuple[int, ...]:
        """Bytes with k layers frozen, counted: what a storage holds counts to the last layer that saved it."""
        self._freeze(0)
        owner = {t.untyped_storage().data_ptr(): -1 for t in (*self.model.parameters(), *self.model.buffers())}
        held = sum(_bytes(t) for t in (*self.model.parameters(), *self.model.buffers()))
        saved = [0] * len(self.layers)
        size: dict[int, int] = {}
        with LayerMarks(self.model, self.layers, lambda: 0) as marks:

            def pack(tensor: Tensor) -> Tensor:
                # The graph keeps every saved storage alive until backward: no address comes twice.
                storage = tensor.untyped_storage()
                if owner.get(storage.data_ptr()) != -1:
                    owner[storage.data_ptr()], size[storage.data_ptr()] = marks.current, storage.nbytes()
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                loss = self._loss()
        del loss
        for address, nbytes in size.items():
            saved[owner[address]] += nbytes
        for i, layer in enumerate(self.layers):
            for p in layer.parameters.values():
                state = self.optimizer.state.get(p, {}).values()
                saved[i] += _bytes(p) + sum(_bytes(v) for v in state if isinstance(v, Tensor) and v.dim())
        return tuple(held + sum(saved[k:]) for k in range(len(saved)))

    def _freeze(self, k: int) -> None:
        self.model.train()
        for i, layer in enumerate(self.layers):
            for p in layer.parameters.values():
                p.requires_grad_(i >= k)

    def _loss(self) -> Tensor:
        with self._autocast():
            return self.criterion(self.model(self.inputs), self.targets)

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

    def _seconds(self, start, end) -> float:
        self._synchronize()
        return self._difference(end, start)

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} with {torch.get_num_threads()} thread{'s' * (torch.get_num_threads() != 1)}"
