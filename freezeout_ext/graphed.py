"""GraphedStep: one training step as a CUDA graph, captured anew after each freeze."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from . import native
from .attach import TransientHook
from .batch import Batch, call, detached, layout, mapped, tensors
from .cuda_graphs import own_stream
from .freezeout import FreezeOut
from .fused import FusedOptimizer
from .param_groups import set_rate
from .schedule import Schedule

# Eager steps before a capture: cuDNN tries its algorithms, optimizers make their state and prepare their tables.
WARM_UP_STEPS = 3
# Eager steps of one shape after which we capture even if the prefix or the optimizer's states have not settled: batches
# of this shape will not settle them.
MOST_UNSETTLED_STEPS = 16
# Graphs of one frontier; batches of further shapes run eagerly.
MAX_SHAPES = 4

Result = tuple[Tensor, Any]  # loss, outputs
Body = Callable[[], Result]


class Backend(Protocol):
    """How steps run on a device that captures."""

    def run(self, body: Body) -> Result:
        """body(), now, where a later capture will run it."""

    def capture(self, body: Body, *, first: bool) -> Body:
        """Records body without running it. Returns what runs it, each time into the same result tensors.

        first: nothing that was captured before is in use any more.
        """


class GraphedStep:
    """loss = criterion(model(inputs), targets); backward; optimizer.step(); zero_grad(); freezeout.step().

    Inputs that are a dict are given to the model as keywords, a tuple or list as positions.

    On CUDA all but the last is one CUDA graph for each (batch shape, number of frozen layers): the first steps of each
    run eagerly, among them those in which the frozen prefix is checked and timed, then it is captured; after a
    transition all are captured anew. Batches of more than a few shapes run eagerly. On a CPU, and with graph=False,
    nothing is captured and every call is the plain step. Every call is exactly one optimizer step in either way.

    After a state of the model or the optimizer was loaded all are captured anew too. Else a captured step holds what it
    was captured with: change no other hyperparameter than the rates, and call model, criterion and optimizer in no
    other way that changes which tensors they use. Hooks of the optimizer, and prints in the model, run at capture only.
    Not for DistributedDataParallel, nor for models that read values back to the host.

    Args:
        criterion: (outputs, targets) -> scalar loss.
        optimizer: on CUDA one that reads its rates from the device: FusedSGD, FusedAdamW or FusedAdam, or a torch
            optimizer made with fused=True or capturable=True, whose rates become tensors.
        freezeout: None trains all layers.
        cosine: rate = its group's lr as given * cosine.lr_factor(0, step), for active groups; None leaves the rates to
            FreezeOut or, where there is none (or one with anneal=False), as they are.
        scaler: of the loss, for amp_dtype=torch.float16.
        amp_dtype: autocast's dtype, None for none.
        graph: False captures nothing: every step is the plain step, also on CUDA, and takes any optimizer.

    Raises:
        ValueError: the optimizer cannot be captured, or not with the scaler; cosine beside a FreezeOut that anneals.
        RuntimeError: at a capture that fails, with the reason; a rate that a captured step cannot follow; no CUDA
            stream is left for captures.

    Source: PyTorch's notes on CUDA graphs, https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: Callable[[Any, Batch], Tensor],
        optimizer: torch.optim.Optimizer,
        freezeout: FreezeOut | None = None,
        *,
        cosine: Schedule | None = None,
        scaler: torch.amp.GradScaler | None = None,
        amp_dtype: torch.dtype | None = None,
        graph: bool = True,
    ) -> None:
        anneals = freezeout is not None and freezeout.anneal
        if cosine is not None and anneals:
            raise ValueError("cosine must be None where freezeout anneals, which sets the rates itself")
        self.model, self.criterion, self.optimizer, self.freezeout = model, criterion, optimizer, freezeout
        self.cosine = cosine
        self.scaler = scaler or torch.amp.GradScaler(enabled=False)
        self.amp_dtype = amp_dtype
        self.device = next(model.parameters()).device
        self._step_count = freezeout.step_count if freezeout else 0
        # What each kind of step was used for.
        self.captures = self.replays = self.eager_steps = 0
        backend = self._backend = _backend_of(self.device) if graph else None
        self._rates = None if backend is None else _device_rates(optimizer, self.device)
        if backend is not None and self.scaler.is_enabled():
            _prepare_for_scaler(optimizer)
        self._base_rates = [group.get("base_lr", float(group["lr"])) for group in optimizer.param_groups]
        self._seen: dict[tuple, int] = {}
        self._unsettled: dict[tuple, int] = {}
        self._graphs: dict[tuple, _Graph] = {}
        self._on_load = optimizer.register_load_state_dict_post_hook(lambda _: self._forget())
        # A captured prefix may hold weights of its own, made of those that were loaded over.
        loaded = TransientHook(lambda *_: self._forget())
        self._on_weights = [module.register_load_state_dict_post_hook(loaded) for module in model.modules()]
        self._remove_hook = freezeout.register_transition_hook(lambda *_: self._forget()) if freezeout else None
        self._set_rates()

    @property
    def step_count(self) -> int:
        """Optimizer steps done. To set it is to resume; FreezeOut's own count takes precedence."""
        return self._step_count

    @step_count.setter
    def step_count(self, step: int) -> None:
        self._step_count = step
        self._forget()
        self._set_rates()

    def __call__(self, inputs: Batch, targets: Batch) -> Result:
        """One optimizer step on one batch. Returns (loss, outputs), detached, in memory of their own."""
        if self.freezeout is not None and self.freezeout.step_count != self._step_count:
            self.step_count = self.freezeout.step_count  # a state was loaded
        if self._rates is not None:
            self._rates.prepare(self)
        if self._backend is None:
            result = self._step(inputs, targets)
            self.eager_steps += 1
        else:
            result = self._step_on_device(self._backend, inputs, targets)
        self._step_count += 1
        if self.freezeout is not None:
            self.freezeout.step()
        self._set_rates()
        return result

    def close(self) -> None:
        """Frees the graphs and leaves model, optimizer and FreezeOut to others."""
        for handle in (self._on_load, *self._on_weights):
            handle.remove()
        if self._remove_hook is not None:
            self._remove_hook()
        self._graphs.clear()
        if isinstance(self.optimizer, FusedOptimizer):
            self.optimizer.set_device_schedule(None)

    def _step_on_device(self, backend: Backend, inputs: Batch, targets: Batch) -> Result:
        cache = None if self.freezeout is None else self.freezeout.cache
        batch: tuple[Any, ...] = (inputs, targets)
        step: Callable[..., Result] = self._step
        if cache is not None and cache.takes_part:
            rows = cache.rows()
            if rows is None:  # features are kept, watched or checked in this step
                self.eager_steps += 1
                return backend.run(lambda: self._step(inputs, targets))
            batch, step = (inputs, targets, rows), self._step_on_rows
        key = layout(batch)
        if key not in self._graphs:
            if not self._is_warm(key, runs_prefix=len(batch) == 2) or len(self._graphs) == MAX_SHAPES:
                self.eager_steps += 1
                return backend.run(lambda: step(*batch))
            self._graphs[key] = _Graph(backend, step, *batch, first=not self._graphs)
            self.captures += 1
        self.replays += 1
        return self._graphs[key].replay(*batch)

    def _step_on_rows(self, inputs: Batch, targets: Batch, rows: tuple[Tensor, ...]) -> Result:
        """The step from kept features: these are inputs of a captured step, the frozen layers are no part of it."""
        assert self.freezeout is not None and self.freezeout.cache is not None  # whose rows these are
        with self.freezeout.cache.given(rows):
            return self._step(inputs, targets)

    def _is_warm(self, key: tuple, *, runs_prefix: bool) -> bool:
        """Whether the next step of this shape may be captured; counts it."""
        settled = self.freezeout is None or not runs_prefix or self.freezeout.prefix_is_settled
        # What a graph made would be its own.
        settled = settled and not (isinstance(self.optimizer, FusedOptimizer) and self.optimizer.lacks_states())
        if not settled and self._unsettled.get(key, 0) < MOST_UNSETTLED_STEPS:
            self._unsettled[key] = self._unsettled.get(key, 0) + 1
            return False
        seen = self._seen.get(key, 0)
        self._seen[key] = seen + 1
        return seen >= WARM_UP_STEPS

    def _step(self, inputs: Batch, targets: Batch) -> Result:
        with self._autocast():
            outputs = call(self.model, inputs)
            loss = self.criterion(outputs, targets)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        # Inside the graph too: the next replay then writes its gradients, and adds to none.
        self.optimizer.zero_grad(set_to_none=True)
        if isinstance(self._rates, _ScheduledRates):
            self._rates.counter.add_(1)
        return loss.detach(), detached(outputs)

    def _autocast(self) -> AbstractContextManager:
        return torch.autocast(self.device.type, dtype=self.amp_dtype, enabled=self.amp_dtype is not None)

    def _set_rates(self) -> None:
        if self.cosine is not None:
            factor = self.cosine.lr_factor(0, self._step_count)
            for group, base in zip(self.optimizer.param_groups, self._base_rates, strict=True):
                if not group.get("frozen"):
                    set_rate(group, base * factor)

    def _forget(self) -> None:
        # Now, before any step that makes what the next captures use: from torch 2.12 on a graph that is destroyed takes
        # cuBLAS's workspace of its stream along, https://github.com/pytorch/pytorch/issues/193402.
        self._graphs.clear()
        self._seen.clear()
        self._unsettled.clear()
        if self._rates is not None:
            self._rates.is_set = False


class _Graph:
    """A captured step and the tensors that it reads."""

    def __init__(self, backend: Backend, step: Callable[..., Result], *batch: Batch, first: bool) -> None:
        self._inputs = mapped(batch, lambda tensor: torch.empty_like(tensor).copy_(tensor))
        try:
            self._run = backend.capture(lambda: step(*self._inputs), first=first)
        except RuntimeError as error:
            # The end of a capture that failed raises another error, which only says so.
            reason = error.__context__ or error
            raise RuntimeError(f"the step cannot be captured as a CUDA graph; run it without: {reason}") from error

    def replay(self, *batch: Batch) -> Result:
        for mine, given in zip(tensors(self._inputs), tensors(batch), strict=True):
            mine.copy_(given, non_blocking=True)
        loss, outputs = self._run()
        # The next replay, of any graph in the pool, writes there.
        return loss.clone(), mapped(outputs, torch.clone)


def _backend_of(device: torch.device) -> Backend | None:
    """What captures steps on `device`; None where nothing does."""
    return _CudaGraphs(device) if device.type == "cuda" else None


class _CudaGraphs:
    """CUDA graphs in one memory pool. Eager steps run on the stream of the captures, as these need: a gradient's
    accumulation stays on the stream where it first ran."""

    def __init__(self, device: torch.device) -> None:
        self._stream = own_stream(self, torch.cuda.current_device() if device.index is None else device.index)
        self._pool: Any = None  # torch's handle

    def run(self, body: Body) -> Result:
        current = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            result = body()
        current.wait_stream(self._stream)
        return result

    def capture(self, body: Body, *, first: bool) -> Body:
        if first:
            # A pool is gone with its graphs; torch.cuda.graph gives its memory back before it captures.
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        # Other threads, such as a loader's that pins memory, may go on.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            result = body()

        def replay() -> Result:
            graph.replay()
            return result

        return replay


# The rates of a captured step; `is_set` is False at first and once a state was loaded or a layer froze.


class _TensorRates:
    """torch's optimizers read their rates from tensors, which FreezeOut and `cosine` fill."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.is_set = False

    def prepare(self, graphed: GraphedStep) -> None:
        if self.is_set:
            return
        for group in graphed.optimizer.param_groups:
            lr = group["lr"]
            # A loaded state brings rates on the CPU.
            if not isinstance(lr, Tensor) or lr.device.type != self._device.type:
                group["lr"] = torch.tensor(float(lr), device=self._device)
        self.is_set = True


class _ScheduledRates:
    """A fused optimizer computes its rates on the device from a counter of steps, which the step itself advances."""

    def __init__(self, device: torch.device) -> None:
        self.counter = torch.zeros((), dtype=torch.int64, device=device)
        self.is_set = False
        self._constant: list[float] | None = None

    def prepare(self, graphed: GraphedStep) -> None:
        groups = graphed.optimizer.param_groups
        if not self.is_set:
            self.counter.fill_(graphed.step_count)
            rates = [_scheduled(graphed, group, base) for group, base in zip(groups, graphed._base_rates, strict=True)]
            assert isinstance(graphed.optimizer, FusedOptimizer)  # see _device_rates
            graphed.optimizer.set_device_schedule(self.counter, rates)
            free = graphed.cosine is None and (graphed.freezeout is None or not graphed.freezeout.anneal)
            self._constant = [float(group["lr"]) for group in groups] if free else None
            self.is_set = True
        elif self._constant is not None and self._constant != [float(group["lr"]) for group in groups]:
            raise RuntimeError(
                "lr must not change between graphed steps of a fused optimizer: pass cosine=, or use torch's with"
                " fused=True"
            )


def _scheduled(graphed: GraphedStep, group: dict, base: float) -> tuple[float, float, float]:
    """(peak, milestone, warmup) of a group, as set_device_schedule takes them."""
    if graphed.cosine is not None:
        schedule, layer = graphed.cosine, 0
    elif graphed.freezeout is not None and graphed.freezeout.anneal:
        schedule, layer = graphed.freezeout.schedule, graphed.freezeout.anneals_as(group["layer"])
    else:
        return float(group["lr"]), float("inf"), 0
    peak = base / schedule.t(layer) if schedule.scale_lr else base
    return peak, schedule.milestone(layer), schedule.warmup_steps


def _device_rates(optimizer: torch.optim.Optimizer, device: torch.device) -> _TensorRates | _ScheduledRates:
    if isinstance(optimizer, FusedOptimizer):
        reason = native.import_error if device.type == "cpu" else native.cuda_unavailable_reason(device)
        if reason is not None:
            raise ValueError(f"optimizer must have its compiled half to be captured: {reason}")
        return _ScheduledRates(device)
    for i, group in enumerate(optimizer.param_groups):
        if not (group.get("fused") or group.get("capturable")):
            raise ValueError(
                f"optimizer must be a FusedOptimizer, or made with fused=True or capturable=True, to be captured, got"
                f" {type(optimizer).__name__} with neither (param group {i})"
            )
    return _TensorRates(device)


def _prepare_for_scaler(optimizer: torch.optim.Optimizer) -> None:
    if not getattr(optimizer, "_step_supports_amp_scaling", False):
        raise ValueError(
            f"optimizer must be a FusedOptimizer, or made with fused=True, to be captured with an enabled scaler, got"
            f" {type(optimizer).__name__} without, whose step asks the host whether it is skipped"
        )
    if type(optimizer) is torch.optim.SGD:
        # A first step that is skipped would leave unwritten memory as momentum. Of zeros it is the same first step.
        for group in optimizer.param_groups:
            if group["momentum"] and not group["dampening"]:
                for p in group["params"]:
                    if optimizer.state[p].get("momentum_buffer") is None:
                        optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
