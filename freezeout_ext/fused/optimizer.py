"""FusedOptimizer: what FusedSGD and FusedAdamW share, which is all but their formula."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from freezeout_ext import native
from freezeout_ext.arguments import check_kind
from freezeout_ext.fused import compiled

# Another thread may change groups and states while a step is prepared; a step that never finds them still gives up.
MOST_PREPARATIONS = 8


class FusedOptimizer(torch.optim.Optimizer):
    """p, states <- formula(p, states, grad): every active tensor of one dtype and device in one call.

    A mixin before one of torch's optimizers, which stays what one observes: constructor, errors, param groups, state,
    hooks. One call updates the tensors of all param groups with each group's own hyperparameters. float16 and bfloat16
    are rounded once, when stored.

    Groups with a true "frozen" key are left alone: not read, not written. Addresses are prepared once and
    compared at each step, so that parameters, states and groups may change at any time. States start as zeros and are
    made when a parameter gets its first gradient.

    With torch.amp.GradScaler gradients are unscaled here and written back. Nothing changes where one is not finite.

    One optimizer must not step in two threads at once: the second one gets a RuntimeError.

    What the compiled update does not take (sparse, complex, `differentiable`, tensor subclasses, gradients laid out
    otherwise than their parameter) goes through torch's for-loop, with the same result: see `native_report()`.
    Under torch.compile the registered torch op runs, one call for each set of equal hyperparameters. The op takes
    contiguous and channels-last tensors, and torch's for-loop the rest; once traced, the report says which.
    """

    # On the class: an instance's flag would not survive deepcopy and pickle.
    _step_supports_amp_scaling = True
    _prepared: "_Prepared | None" = None
    # Set once torch.compile traced a step: for each group the positions of parameters that share memory.
    _sharing: list[tuple[int, ...]] | None = None
    _device_schedule: tuple[Tensor, list[tuple[float, float, float]]] | None = None
    # Tables: a graph reads them for as long as it may be replayed.
    _captured: frozenset[Tensor] = frozenset()

    _formula: str
    _op: Callable[..., None]

    def _lacks_state(self, p: Tensor, group: dict[str, Any]) -> bool:
        """Whether p's states are still to be made."""
        raise NotImplementedError

    def _make_state(self, p: Tensor, group: dict[str, Any]) -> None:
        """Makes p's states, of zeros."""
        raise NotImplementedError

    def _reason_against_state(self, p: Tensor, group: dict[str, Any]) -> str | None:
        """Why the compiled update does not take p's states, or None."""
        raise NotImplementedError

    def _reason_against_numbers(self, group: dict[str, Any]) -> str | None:
        """Why the compiled update does not take the group's hyperparameters, or None."""
        raise NotImplementedError

    def _torch_update(self, group: dict[str, Any], params: list[Tensor]) -> None:
        """torch's for-loop over parameters that have a gradient."""
        raise NotImplementedError

    def _op_numbers(self, group: dict[str, Any]) -> dict[str, Any]:
        """The registered op's keyword arguments for a group."""
        raise NotImplementedError

    def _op_lists(self, group: dict[str, Any]) -> list[list[Tensor]]:
        """The registered op's lists of a group's parameters that have a gradient: params, grads, states, counters."""
        raise NotImplementedError

    def _init_group(self, group: dict[str, Any], *lists: list[Tensor]) -> bool:
        # torch.compile runs this for real while it traces a step, and tracks the state from the first call on: a state
        # that is made later would be lost. torch's for-loop asks with a copy of a group.
        groups = [group]
        if any(group is each for each in self.param_groups):
            groups = self.param_groups
            # Traced code cannot ask for addresses.
            shared = self._share_memory()
            self._sharing = [
                tuple(j for j, p in enumerate(each["params"]) if id(p) in shared) for each in self.param_groups
            ]
        for each in groups:
            for p in () if each.get("frozen") else each["params"]:
                if p.grad is None or p.grad.is_sparse or not self._lacks_state(p, each):
                    continue
                if self._reason_against_state(p, each) is None:
                    self._make_state(p, each)
        return super()._init_group(group, *lists)  # type: ignore[misc]  # torch's optimizers have it

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates every parameter that has a gradient; returns the closure's loss, or None."""
        if type(self).step is not FusedOptimizer.step:
            return self._step(closure)  # a subclass's step, which torch has wrapped
        if (
            self._optimizer_step_pre_hooks
            or self._optimizer_step_post_hooks
            or _global_optimizer_pre_hooks
            or _global_optimizer_post_hooks
            or (not torch.compiler.is_compiling() and torch.autograd._profiler_enabled())
        ):
            return _hooked_step(self) if closure is None else _hooked_step(self, closure)
        loss = self._step(closure)
        self._optimizer_step_code()
        return loss

    # Else torch would wrap it: hooks and a profiler's range, a third of the time of a small step, are above instead.
    step.hooked = True  # type: ignore[attr-defined]

    def _step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        grad_scale: Tensor | None = getattr(self, "grad_scale", None)
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        if torch.compiler.is_compiling():
            self._step_by_op(grad_scale, found_inf)
        elif native.C is None:
            compiled.missing_half(torch.device("cpu"))  # warns, once
            self._step_all_by_torch(grad_scale, found_inf)
        elif found_inf is None or found_inf.device.type != "cpu":
            self._step_natively(grad_scale, found_inf)
        elif not compiled.overflowed(found_inf):
            self._step_natively(grad_scale, None)
        return loss

    def lacks_states(self) -> bool:
        """Whether some active parameter's states are still to be made, at its first gradient."""
        return any(
            p.requires_grad and self._lacks_state(p, group)
            for group in self.param_groups
            if not group.get("frozen")
            for p in group["params"]
        )

    def native_report(self) -> dict[str, str]:
        """{"group 0, parameter 2": reason} for each parameter that goes through torch's for-loop."""
        report = {}
        for i, (group, reasons) in enumerate(zip(self.param_groups, self._reasons(), strict=True)):
            for j, (p, reason) in enumerate(zip(group["params"], reasons, strict=False)):  # [] for a frozen group
                reason = reason or _reason_against_grad(p)
                if reason is None and self._sharing is not None and not compiled.op_takes(self._op_tensors(p)):
                    reason = "is neither contiguous nor channels-last with all its states, as the traced op needs it"
                if reason is not None:
                    report[f"group {i}, parameter {j}"] = reason
        return report

    def _op_tensors(self, p: Tensor) -> list[Tensor | None]:
        """A parameter, its gradient and its states, as op_takes looks at them."""
        state = self.state[p].values() if p in self.state else ()
        return [p, p.grad, *(value for value in state if isinstance(value, Tensor))]

    def set_device_schedule(self, step: Tensor | None, rates: Sequence[tuple[float, float, float]] = ()) -> None:
        """lr = peak * cos^2(pi / 2 * (step - warmup) / (milestone - warmup)), 0 from the milestone on, on the device.

        Takes the place of the groups' "lr", so that a captured CUDA graph keeps the right rates when it is replayed.

        Args:
            step: int64 tensor of one element, which the caller advances; None goes back to "lr".
            rates: one (peak, milestone, warmup) for each param group, milestone and warmup in steps. Below warmup
                the rate is peak * (step + 1) / (warmup + 1).

        Raises:
            TypeError, ValueError: step is no int64 tensor of one element, or rates do not match the param groups.
        """
        check_kind("step", step, Tensor, "a tensor", optional=True)
        check_kind("rates", rates, Sequence, "a sequence")
        self._prepared = None
        if step is None:
            self._device_schedule = None
            return
        if step.dtype != torch.int64 or step.numel() != 1:
            raise ValueError(f"step must be an int64 tensor of one element, got {step.dtype} {tuple(step.shape)}")
        if len(rates) != len(self.param_groups):
            raise ValueError(f"rates must have one entry for each of {len(self.param_groups)} groups, got {len(rates)}")
        try:
            numbers = [(float(a), float(b), float(c)) for a, b, c in rates]
        except (TypeError, ValueError) as error:
            raise TypeError(f"rates must be (peak, milestone, warmup) for each group, got {rates!r}") from error
        self._device_schedule = step, numbers

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        if self._device_schedule is not None:
            state["_device_schedule"] = self._device_schedule
        return state

    def _step_natively(self, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        changed = ""
        for _ in range(MOST_PREPARATIONS):
            prepared = self._prepared
            if prepared is None:
                if self._reason_against_containers() is not None:
                    self._step_all_by_torch(grad_scale, found_inf)
                    return
                prepared = self._prepared = self._prepare()
            if found_inf is not None and prepared.asks_host:
                if compiled.overflowed(found_inf):
                    return
                found_inf = None
            done = prepared.run(self, grad_scale, found_inf)
            if not isinstance(done, str):
                break
            changed = done
            if changed == "another stream is current":
                prepared.use_current_streams()
            else:
                self._prepared = prepared = None  # frees what it holds before anything is allocated
        else:
            raise RuntimeError(f"{type(self).__name__} could not prepare its step: {changed}")
        leftover, captured = done
        if captured:
            self._captured = self._captured.union(table for table in prepared.tables if table is not None)
        if leftover is None and not prepared.by_torch:
            return
        # The device has looked at found_inf for itself.
        if leftover is not None and not compiled.overflowed(found_inf):
            self._step_by_torch(
                [(self.param_groups[i], [self.param_groups[i]["params"][j]]) for i, j in leftover], grad_scale
            )
        self._step_by_torch(list(prepared.by_torch_now(self.param_groups)), grad_scale)

    def _prepare(self) -> "_Prepared":
        planned: list[list[bool]] = []
        by_torch: list[tuple[int, list[int] | None]] = []
        with torch.no_grad():
            for i, (group, reasons) in enumerate(zip(self.param_groups, self._reasons(), strict=True)):
                if _reason_against_container(group) is not None:
                    planned.append([])
                    by_torch.append((i, None))
                    continue
                taken = [reason is None for reason in reasons]
                for j, p in enumerate(group["params"] if reasons else ()):  # a frozen group has no reasons
                    if taken[j] and p.grad is not None and self._lacks_state(p, group):
                        # torch makes the state after such a gradient.
                        taken[j] = _reason_against_grad(p) is None
                        if taken[j]:
                            self._make_state(p, group)
                planned.append(taken)
                if not all(taken):
                    by_torch.append((i, [j for j, native in enumerate(taken) if not native]))
        step = native.C.PreparedStep(
            compiled.tensor_reader(),
            formula=compiled.FORMULAS[self._formula],
            groups=self.param_groups,
            state=self.state,
            native=planned,
            schedule=None if self._device_schedule is None else self._device_schedule[1],
        )
        devices = [compiled.device_of(batch) for batch in step.batches]
        if any(d.type == "cuda" for d in devices) and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(f"{type(self).__name__} must have made a step like this one before a graph captures it")
        tables = [compiled.upload_table(batch) for batch in step.batches]
        asks_host = bool(by_torch) or any(device.type == "cpu" for device in devices)
        must_tell_streams = any(t is not None for t in tables) and not compiled.tensor_reader().exchanges
        return _Prepared(step, by_torch, devices, tables, asks_host, must_tell_streams)

    def _step_all_by_torch(self, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        if not compiled.overflowed(found_inf):
            self._step_by_torch([(group, list(group["params"])) for group in self.param_groups], grad_scale)

    def _step_by_torch(self, groups: list[tuple[dict[str, Any], list[Tensor]]], grad_scale: Tensor | None) -> None:
        """torch's for-loop over some parameters of some groups, gradients unscaled first."""
        if self._device_schedule is not None:
            raise RuntimeError(
                f"set_device_schedule needs the compiled update for all parameters: {self.native_report()}"
            )
        with torch.set_grad_enabled(self.defaults["differentiable"]):
            for group, candidates in groups:
                params = [] if group.get("frozen") else [p for p in candidates if p.grad is not None]
                if grad_scale is not None:
                    _unscale_([p.grad for p in params if p.grad is not None], grad_scale)
                self._torch_update(group, params)

    def _step_by_op(self, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        """What torch.compile traces: the op for all that it takes, torch's for-loop for the rest."""
        if self._device_schedule is not None:
            raise RuntimeError("set_device_schedule must not be set under torch.compile")
        # What equal numbers have in common: lists of tensors, the layer of each, and the layers' rates.
        calls: dict[tuple, tuple[list[list[Tensor]], list[int], list[Any]]] = {}
        rest = []
        for index, group in enumerate(self.param_groups):
            if group.get("frozen"):
                continue
            lists = self._op_lists(group)
            assert self._sharing is not None  # _op_lists asked
            positions = [j for j, p in enumerate(group["params"]) if p.grad is not None]
            numbers = self._op_numbers(group)
            begun = []
            for i, p in enumerate(lists[0]):
                tensors = [each[i] if each else None for each in lists]
                # SGD's first step with dampening has no momentum buffer yet.
                lacks_state = any(len(each) > 0 and each[i] is None for each in lists)
                if lacks_state or positions[i] in self._sharing[index] or not compiled.op_takes(tensors):
                    rest.append((group, [p]))
                    continue
                key: tuple[Any, ...] = (p.dtype, p.device, *numbers.items())
                if key not in calls:
                    calls[key] = ([[] for _ in lists], [], [])
                gathered, layer_of, lrs = calls[key]
                if key not in begun:
                    begun.append(key)
                    lrs.append(group["lr"])
                layer_of.append(len(lrs) - 1)
                for each, tensor in zip(gathered, tensors, strict=True):
                    if tensor is not None:
                        each.append(tensor)
        with torch.no_grad():
            for key, (gathered, layer_of, lrs) in calls.items():
                rates = None
                if any(isinstance(lr, Tensor) for lr in lrs):
                    rates = torch.stack(
                        [torch.as_tensor(lr, dtype=torch.float64, device=key[1]).view(()) for lr in lrs]
                    )
                    lrs = [0.0] * len(lrs)
                self._op(*gathered, layer_of, lrs, grad_scale, found_inf, rates, **dict(key[2:]))
        if rest and not compiled.overflowed(found_inf):
            self._step_by_torch(rest, grad_scale)

    def _reasons(self) -> list[list[str | None]]:
        """For each parameter of each group why it goes through torch's for-loop, or None; [] for a frozen group.

        A gradient that only one step brings is no reason here.
        """
        of_all = self._reason_against_containers()
        shared = self._share_memory()
        found: list[list[str | None]] = []
        for group in self.param_groups:
            if group.get("frozen"):
                found.append([])
                continue
            of_group = of_all or _reason_against_container(group) or self._reason_against_group(group)
            found.append(
                [
                    of_group
                    or compiled.reason_against(p)
                    or ("shares memory with another parameter" if id(p) in shared else None)
                    or self._reason_against_state(p, group)
                    for p in group["params"]
                ]
            )
        return found

    def _share_memory(self) -> set[int]:
        active = [group for group in self.param_groups if not group.get("frozen")]
        return compiled.share_memory([p for group in active for p in group["params"]])

    def _reason_against_containers(self) -> str | None:
        if not isinstance(self.param_groups, list):
            return f"param_groups is a {type(self.param_groups).__name__}, not a list"
        if not isinstance(self.state, dict):
            return f"the optimizer's state is a {type(self.state).__name__}, not a dict"
        return None

    def _reason_against_group(self, group: dict[str, Any]) -> str | None:
        if group["differentiable"]:
            return "its group is differentiable"
        if isinstance(group["lr"], Tensor) and group["lr"].requires_grad:
            return "its learning rate requires grad"
        return self._reason_against_numbers(group)

    def _reason_against_tensor(self, p: Tensor, name: str, state: Tensor) -> str | None:
        reason = compiled.reason_against(state)
        if reason is None and not compiled.same_layout(p, state):
            reason = "has another dtype, device, shape or layout than its parameter"
        return None if reason is None else f"its {name} {reason}"


# Hooks in torch's order, and the range that profilers show.
_hooked_step = torch.optim.Optimizer.profile_hook_step(FusedOptimizer._step)


@dataclass
class _Prepared:
    """What stays the same from step to step."""

    step: Any  # _C.PreparedStep
    by_torch: list[tuple[int, list[int] | None]]  # (group, positions); None: whatever the group holds
    devices: list[torch.device]  # of each batch
    tables: list[Tensor | None]
    asks_host: bool  # something looks at found_inf on the host
    must_tell_streams: bool  # torch before 2.11 tells the module no current stream

    def run(self, optimizer: FusedOptimizer, grad_scale: Tensor | None, found_inf: Tensor | None) -> Any:
        """_C.PreparedStep.run: what has changed, or (leftover, captured)."""
        inputs = None
        schedule = optimizer._device_schedule
        if schedule is not None or grad_scale is not None or found_inf is not None:
            step = None if schedule is None else schedule[0]
            given = ((step, torch.int64), (grad_scale, torch.float32), (found_inf, torch.float32))
            inputs = [
                tuple(None if t is None else t.to(device, dtype, non_blocking=True) for t, dtype in given)
                for device in self.devices
            ]
        if self.must_tell_streams:
            self.use_current_streams()
        return self.step.run(optimizer.param_groups, optimizer.state, torch.get_num_threads(), inputs)

    def use_current_streams(self) -> None:
        for batch, table in zip(self.step.batches, self.tables, strict=True):
            if table is not None:
                compiled.use_current_stream(batch, table)

    def by_torch_now(self, groups: list[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], list[Tensor]]]:
        for i, positions in self.by_torch:
            params = list(groups[i]["params"])
            yield groups[i], params if positions is None else [params[j] for j in positions]


def _reason_against_container(group: Any) -> str | None:
    if not isinstance(group, dict):
        return f"its group is a {type(group).__name__}, not a dict"
    if not isinstance(group["params"], list):
        return f"its group's params are a {type(group['params']).__name__}, not a list"
    return None


def _reason_against_grad(p: Tensor) -> str | None:
    if p.grad is None:
        return None
    reason = compiled.reason_against(p.grad)
    if reason is None and not compiled.same_layout(p, p.grad):
        reason = "has another dtype, device or layout than its parameter"
    return None if reason is None else f"its gradient {reason}"


def _unscale_(grads: list[Tensor], grad_scale: Tensor) -> None:
    inverse = compiled.inverse_of(grad_scale)
    for grad in grads:
        (grad._values() if grad.is_sparse else grad).mul_(inverse.to(grad.device))
