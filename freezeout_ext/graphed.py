"""GraphedStep: one training step as a CUDA graph, captured anew after each freeze."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from .arguments import check_callable, check_count, check_flag, check_kind
from .attach import TransientHook
from .batch import Batch, call, detached, layout, mapped, tensors
from .cuda_graphs import StepGraphs
from .freezeout import FreezeOut
from .fused import FusedOptimizer
from .schedule import Schedule
from .step_rates import Rates, captured_rates, prepare_for_scaler

# Eager steps before a capture: cuDNN tries its algorithms, optimizers make their state and prepare their tables.
WARM_UP_STEPS = 3
# Eager steps of one shape after which we capture even if the prefix or the optimizer's states have not settled: batches
# of this shape will not settle them.
MOST_UNSETTLED_STEPS = 16
# Graphs of one frontier; batches of further shapes run eagerly.
MAX_SHAPES = 4

Result = tuple[Tensor, Any]  # loss, outputs


class GraphedStep:
    """loss = criterion(model(inputs), targets); backward; optimizer.step(); zero_grad(); freezeout.step().

    Every call is exactly one optimizer step. Inputs that are a dict are given to the model as keywords, a tuple or list
    as positions.

    On CUDA all but `freezeout.step()` is one CUDA graph for each batch shape. The first steps of each shape run
    eagerly; meanwhile the frozen prefix is checked and timed. Then the step is captured. After a transition, and after
    a state of the model or the optimizer was loaded, all steps are captured anew. Batches of more than a few shapes run
    eagerly. On a CPU, and with graph=False, nothing is captured.

    A captured step goes on with what it was captured with. Change no hyperparameter but the rates. Do not call model,
    criterion or optimizer in a way that changes which tensors they use. Hooks of the optimizer, and prints in the
    model, run at the capture only.

    Not for DistributedDataParallel, nor for models that read values back to the host.

    Args:
        model: what is trained.
        criterion: (outputs, targets) -> scalar loss.
        optimizer: on CUDA one that reads its rates from the device. That is FusedSGD, FusedAdamW or FusedAdam, or a
            torch optimizer made with fused=True or capturable=True, whose rates become tensors.
        freezeout: of this model and optimizer; None trains all layers.
        cosine: the rate of each active group is the group's lr as given * cosine.lr_factor(0, step). None leaves the
            rates to FreezeOut, or as they are where FreezeOut sets none.
        scaler: of the loss, for amp_dtype=torch.float16.
        amp_dtype: autocast's dtype, None for none.
        graph: False captures nothing, also on CUDA, and takes any optimizer.

    Raises:
        TypeError, ValueError: an argument is none of these; the optimizer cannot be captured, or not with the scaler;
            cosine beside a FreezeOut that anneals.
        RuntimeError: a capture failed, with the reason; a captured step cannot follow the rate that was set; no CUDA
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
        _check(model, criterion, optimizer, freezeout, cosine, scaler, amp_dtype, graph)
        self.model, self.criterion, self.optimizer, self.freezeout = model, criterion, optimizer, freezeout
        self.scaler = scaler or torch.amp.GradScaler(enabled=False)
        self.amp_dtype = amp_dtype
        self.device = next(model.parameters()).device
        # What each kind of step was used for.
        self.captures = self.replays = self.eager_steps = 0
        self._own_count = 0  # of steps, where there is no FreezeOut to count them
        self._capturing = StepGraphs(self.device) if graph and self.device.type == "cuda" else None
        if self._capturing is None:
            self._rates = Rates(optimizer, freezeout, cosine)
        else:
            self._rates = captured_rates(optimizer, freezeout, cosine, self.device)
            if self.scaler.is_enabled():
                prepare_for_scaler(optimizer)
        self._seen: dict[tuple, int] = {}
        self._unsettled: dict[tuple, int] = {}
        self._graphs: dict[tuple, _Graph] = {}
        self._on_load = optimizer.register_load_state_dict_post_hook(lambda _: self._forget())
        # A captured prefix may hold weights of its own, made of those that were loaded over.
        loaded = TransientHook(lambda *_: self._forget())
        self._on_weights = [module.register_load_state_dict_post_hook(loaded) for module in model.modules()]
        self._remove_hook = freezeout.register_transition_hook(lambda *_: self._forget()) if freezeout else None
        self._rates.set(self.step_count)

    @property
    def step_count(self) -> int:
        """Optimizer steps done: FreezeOut's own count where there is one. To set it is to resume.

        Raises:
            TypeError, ValueError: what it is set to is no number of steps, or another one than FreezeOut's.
        """
        return self._own_count if self.freezeout is None else self.freezeout.step_count

    @step_count.setter
    def step_count(self, step: int) -> None:
        check_count("step_count", step, 0)
        if self.freezeout is None:
            self._own_count = step
        elif step != self.freezeout.step_count:
            raise ValueError(
                f"step_count must be FreezeOut's, {self.freezeout.step_count}, got {step}: load FreezeOut's own state"
            )
        self._forget()
        self._rates.set(step)

    def __call__(self, inputs: Batch, targets: Batch) -> Result:
        """One optimizer step on one batch. Returns (loss, outputs), detached, in memory of their own."""
        if self._rates.step != self.step_count:  # FreezeOut's state was loaded, or the last step raised
            self._forget()
            self._rates.set(self.step_count)
        self._rates.prepare()
        self._rates.step = None
        if self._capturing is None:
            result = self._step(inputs, targets)
            self.eager_steps += 1
        else:
            result = self._step_on_device(self._capturing, inputs, targets)
        if self.freezeout is None:
            self._own_count += 1
        else:
            self.freezeout.step()
        self._rates.set(self.step_count)
        return result

    def close(self) -> None:
        """Frees the graphs and leaves model, optimizer and FreezeOut to others."""
        for handle in (self._on_load, *self._on_weights):
            handle.remove()
        if self._remove_hook is not None:
            self._remove_hook()
        self._graphs.clear()
        self._rates.close()

    def _step_on_device(self, graphs: StepGraphs, inputs: Batch, targets: Batch) -> Result:
        cache = None if self.freezeout is None else self.freezeout.cache
        batch: tuple[Any, ...] = (inputs, targets)
        step: Callable[..., Result] = self._step
        if cache is not None and cache.takes_part:
            rows = cache.rows()
            if rows is None:  # features are kept, watched or checked in this step
                self.eager_steps += 1
                return graphs.run(lambda: self._step(inputs, targets))
            batch, step = (inputs, targets, rows), self._step_on_rows
        key = layout(batch)
        if key not in self._graphs:
            if not self._is_warm(key, runs_prefix=len(batch) == 2) or len(self._graphs) == MAX_SHAPES:
                self.eager_steps += 1
                return graphs.run(lambda: step(*batch))
            self._graphs[key] = _Graph(graphs, step, *batch, first=not self._graphs)
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
        self._rates.advance()
        return loss.detach(), detached(outputs)

    def _autocast(self) -> AbstractContextManager:
        return torch.autocast(self.device.type, dtype=self.amp_dtype, enabled=self.amp_dtype is not None)

    def _forget(self) -> None:
        # Now, before any step that makes what the next captures use: from torch 2.12 on a graph that is destroyed takes
        # cuBLAS's workspace of its stream along, https://github.com/pytorch/pytorch/issues/193402.
        self._graphs.clear()
        self._seen.clear()
        self._unsettled.clear()
        self._rates.forget()


class _Graph:
    """A captured step and the tensors that it reads."""

    def __init__(self, graphs: StepGraphs, step: Callable[..., Result], *batch: Batch, first: bool) -> None:
        self._inputs = mapped(batch, lambda tensor: torch.empty_like(tensor).copy_(tensor))
        try:
            self._run = graphs.capture(lambda: step(*self._inputs), first=first)
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


def _check(
    model: nn.Module,
    criterion: Callable[[Any, Batch], Tensor],
    optimizer: torch.optim.Optimizer,
    freezeout: FreezeOut | None,
    cosine: Schedule | None,
    scaler: torch.amp.GradScaler | None,
    amp_dtype: torch.dtype | None,
    graph: bool,
) -> None:
    """What GraphedStep was given belongs together."""
    check_kind("model", model, nn.Module, "a torch.nn.Module")
    if next(model.parameters(), None) is None:
        raise ValueError(f"model must have parameters, got a {type(model).__name__} with none")
    check_callable("criterion", criterion, "(outputs, targets)")
    check_kind("optimizer", optimizer, torch.optim.Optimizer, "a torch optimizer")
    check_kind("freezeout", freezeout, FreezeOut, "a FreezeOut", optional=True)
    check_kind("cosine", cosine, Schedule, "a Schedule", optional=True)
    check_kind("scaler", scaler, torch.amp.GradScaler, "a torch.amp.GradScaler", optional=True)
    check_kind("amp_dtype", amp_dtype, torch.dtype, "a torch.dtype", optional=True)
    check_flag("graph", graph)
    if freezeout is None:
        return
    if not any(module is freezeout.model for module in model.modules()):
        raise ValueError(f"model must be freezeout's, or hold it, got another {type(model).__name__}")
    if not any(each is optimizer for each in freezeout.optimizers):
        raise ValueError(f"optimizer must be one of freezeout's, got another {type(optimizer).__name__}")
    if cosine is not None and freezeout.anneal:
        raise ValueError("cosine must be None where freezeout anneals, which sets the rates itself")
