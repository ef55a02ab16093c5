"""FusedSGD: torch.optim.SGD over all active tensors in one call."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks
from torch.optim.sgd import sgd

from freezeout_ext import native
from freezeout_ext.fused import compiled


class FusedSGD(torch.optim.SGD):
    """v = momentum * v + (1 - dampening) * (grad + weight_decay * p);  p -= lr * v: every active tensor in one call.

    torch.optim.SGD in all that one can observe, bit-equal to its for-loop on a CPU with FMA in float32 and float64:
    arguments, errors, param groups, `state_dict`, hooks, closures. One call updates the tensors of all param groups of
    one device and dtype, with each group's own hyperparameters. float16 and bfloat16 are rounded once, when stored.

    Groups with a true "frozen" key are left alone: not read, not written. Addresses are prepared once and
    compared at each step, so that parameters, states and groups may change at any time.

    `foreach` and `fused` are taken for compatibility and change nothing. With torch.amp.GradScaler gradients are
    unscaled here and written back, and nothing changes where one of them is not finite.

    What the compiled update does not take (sparse, complex, `differentiable`, tensor subclasses, gradients laid out
    otherwise than their parameter) goes through torch's for-loop, with the same result: see `native_report()`.

    Source: torch.optim.SGD; Sutskever et al. 2013 for Nesterov momentum.
    """

    # On the class: an instance's flag would not survive deepcopy and pickle.
    _step_supports_amp_scaling = True
    _prepared: "_Prepared | None" = None
    _device_schedule: "tuple[Tensor, list[tuple[float, float, float]]] | None" = None
    # Tables: a graph reads them for as long as it may be replayed.
    _captured: frozenset[Tensor] = frozenset()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates every parameter that has a gradient; returns the closure's loss, or None."""
        if type(self).step is not FusedSGD.step:
            return self._step(closure)  # a subclass's step, which torch has wrapped
        if (
            self._optimizer_step_pre_hooks
            or self._optimizer_step_post_hooks
            or _global_optimizer_pre_hooks
            or _global_optimizer_post_hooks
            or torch.autograd._profiler_enabled()
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
        if native.C is None or torch.compiler.is_compiling():
            if not torch.compiler.is_compiling():
                compiled.missing_half(torch.device("cpu"))  # warns, once
            if not _overflowed(found_inf):
                self._step_by_torch([(group, group["params"]) for group in self.param_groups], grad_scale)
            return loss

        updated = self._step_in_one_call(grad_scale, found_inf)
        if updated is not None:
            torch.autograd.graph.increment_version(updated)
            return loss
        prepared = self._gather()
        plan = prepared.plan
        try:
            by_torch = prepared.by_torch + self._leftover(plan.leftover)
            # Elsewhere the device looks at found_inf. A first step must know: a skipped one leaves no state.
            if found_inf is not None and (by_torch or prepared.fresh or prepared.has_cpu):
                if _overflowed(found_inf):
                    return loss
                found_inf = None
            self._run(prepared, grad_scale, found_inf)
            updated = plan.updated()
        finally:
            plan.release()
        torch.autograd.graph.increment_version(updated)
        if prepared.fresh:
            for p in updated:
                if p in prepared.fresh:
                    self.state[p]["momentum_buffer"] = prepared.fresh[p]
            self._prepared = None
        if by_torch:
            self._step_by_torch(by_torch, grad_scale)
        return loss

    def native_report(self) -> dict[str, str]:
        """{"group 0, parameter 2": reason} for each parameter that goes through torch's for-loop."""
        return {
            f"group {i}, parameter {j}": reason
            for i, reasons in enumerate(self._reasons())
            for j, reason in enumerate(reasons)
            if reason is not None
        }

    def set_device_schedule(self, step: Tensor | None, rates: Sequence[tuple[float, float, float]] = ()) -> None:
        """lr = peak * cos^2(pi / 2 * (step - warmup) / (milestone - warmup)), 0 from the milestone on, on the device.

        Takes the place of the groups' "lr", so that a captured CUDA graph keeps the right rates when it is replayed.

        Args:
            step: int64 tensor of one element, which the caller advances; None goes back to "lr".
            rates: one (peak, milestone, warmup) for each param group, milestone and warmup in steps. Below warmup
                the rate is peak * (step + 1) / (warmup + 1).

        Raises:
            ValueError: step is no int64 tensor of one element, or rates do not match the param groups.
        """
        self._prepared = None
        if step is None:
            self._device_schedule = None
            return
        if step.dtype != torch.int64 or step.numel() != 1:
            raise ValueError(f"step must be an int64 tensor of one element, got {step.dtype} {tuple(step.shape)}")
        if len(rates) != len(self.param_groups):
            raise ValueError(f"rates must have one entry for each of {len(self.param_groups)} groups, got {len(rates)}")
        self._device_schedule = (step, [(float(a), float(b), float(c)) for a, b, c in rates])

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        if self._device_schedule is not None:
            state["_device_schedule"] = self._device_schedule
        return state

    def _step_in_one_call(self, grad_scale: Tensor | None, found_inf: Tensor | None) -> list[Tensor] | None:
        """A step before which nothing changed: its parameters, updated. None, with nothing done, if it needs more."""
        prepared = self._prepared
        if prepared is None:
            return None
        if prepared.is_plain and grad_scale is None and found_inf is None:
            return prepared.plan.step_cpu(self.param_groups, self.state, torch.get_num_threads())
        if not prepared.tables:
            return None
        step = None if self._device_schedule is None else self._device_schedule[0]
        done = prepared.plan.step_cuda(self.param_groups, self.state, prepared.tables, step, grad_scale, found_inf)
        if done is None:
            return None
        updated, captured = done
        if captured:
            self._captured = self._captured.union(table for _, _, table in prepared.updates)
        return updated

    def _gather(self) -> "_Prepared":
        """What this step needs, its gradients read; prepared anew if anything has changed."""
        if self._prepared is not None:
            if self._prepared.plan.gather(self.param_groups, self.state) is None:
                return self._prepared
            self._prepared = None  # frees what it holds before anything is allocated
        prepared = self._prepare()
        changed = prepared.plan.gather(self.param_groups, self.state)
        if changed is not None:
            raise RuntimeError(f"FusedSGD could not prepare its step: {changed}")
        self._prepared = prepared
        return prepared

    def _prepare(self) -> "_Prepared":
        planned, by_torch, fresh = [], [], {}
        for group, reasons in zip(self.param_groups, self._reasons(), strict=True):
            planned.append([reason is None for reason in reasons])
            rest = []
            for p, reason in zip(group["params"], reasons, strict=False):  # a frozen group has no reasons
                if reason is not None:
                    rest.append(p)
                elif group["momentum"] != 0 and p.grad is not None and self._buffer(p) is None:
                    fresh[p] = torch.empty_like(p, requires_grad=False)
            if rest:
                by_torch.append((group, rest))
        schedule = None if self._device_schedule is None else self._device_schedule[1]
        plan = native.C.Plan(
            compiled.tensor_reader(),
            self.param_groups,
            self.state,
            native=planned,
            fresh=fresh,
            schedule=schedule,
        )
        prepared = _Prepared(plan, by_torch, fresh)
        for update in plan.updates:
            device = torch.device("cpu") if update.device_type == 1 else torch.device("cuda", update.device_index)
            prepared.updates.append((update, device, compiled.upload_table(update, device)))
            prepared.has_cpu = prepared.has_cpu or device.type == "cpu"
        only_cpu = all(device.type == "cpu" for _, device, _ in prepared.updates)
        prepared.is_plain = only_cpu and not by_torch and not fresh and schedule is None
        return prepared

    def _run(self, prepared: "_Prepared", grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        step = None if self._device_schedule is None else self._device_schedule[0]
        for update, device, table in prepared.updates:
            captured = compiled.run(update, device, table=table, step=step, grad_scale=grad_scale, found_inf=found_inf)
            if captured:
                self._captured = self._captured | {table}
        more = prepared.by_torch or prepared.fresh or prepared.has_cpu or prepared.plan.leftover
        prepared.tables = []
        if not more and compiled.tensor_reader().exchanges:
            for _, device, table in prepared.updates:
                prepared.tables.append((table.data_ptr(), torch.cuda.current_stream(device).cuda_stream))

    def _step_by_torch(self, groups: list[tuple[dict[str, Any], list[Tensor]]], grad_scale: Tensor | None) -> None:
        """torch.optim.SGD's for-loop over some parameters of some groups, gradients unscaled first."""
        if self._device_schedule is not None:
            raise RuntimeError(
                f"set_device_schedule needs the compiled update for all parameters: {self.native_report()}"
            )
        with torch.set_grad_enabled(self.defaults["differentiable"]):
            for group, candidates in groups:
                params = [] if group.get("frozen") else [p for p in candidates if p.grad is not None]
                if grad_scale is not None:
                    _unscale_([p.grad for p in params], grad_scale)
                has_momentum = group["momentum"] != 0
                buffers = [self.state[p].get("momentum_buffer") for p in params] if has_momentum else []
                sgd(
                    params,
                    [p.grad for p in params],
                    buffers,
                    has_sparse_grad=any(p.grad.is_sparse for p in params),
                    foreach=False,
                    fused=False,
                    **{
                        key: group[key]
                        for key in ("lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize")
                    },
                )
                if has_momentum:
                    for p, buffer in zip(params, buffers, strict=True):
                        self.state[p]["momentum_buffer"] = buffer

    def _leftover(self, positions: list[tuple[int, int]]) -> list[tuple[dict[str, Any], list[Tensor]]]:
        groups = self.param_groups
        return [(groups[i], [groups[i]["params"][j]]) for i, j in positions]

    def _reasons(self) -> list[list[str | None]]:
        """For each parameter of each group why it goes through torch's for-loop, or None; [] for a frozen group."""
        shared = _share_memory([p for group in self.param_groups if not group.get("frozen") for p in group["params"]])
        return [
            []
            if group.get("frozen")
            else [
                _reason_against_group(group)
                or self._reason_against(p, group)
                or _reason_against_grad(p)
                or ("shares memory with another parameter" if id(p) in shared else None)
                for p in group["params"]
            ]
            for group in self.param_groups
        ]

    def _buffer(self, p: Tensor) -> Tensor | None:
        # self.state[p] would make an entry.
        return self.state[p].get("momentum_buffer") if p in self.state else None

    def _reason_against(self, p: Tensor, group: dict[str, Any]) -> str | None:
        reason = compiled.reason_against(p)
        if reason is not None:
            return reason
        buffer = self._buffer(p)
        if group["momentum"] == 0 or buffer is None:
            return None
        reason = compiled.reason_against(buffer)
        if reason is None and not compiled.same_layout(p, buffer):
            reason = "has another dtype, device, shape or layout than its parameter"
        return None if reason is None else f"its momentum_buffer {reason}"


# Hooks in torch's order, and the range that profilers show.
_hooked_step = torch.optim.Optimizer.profile_hook_step(FusedSGD._step)


@dataclass
class _Prepared:
    """What stays the same from step to step."""

    plan: Any  # _C.Plan
    by_torch: list[tuple[dict[str, Any], list[Tensor]]]
    fresh: dict[Tensor, Tensor]  # momentum buffers of tensors that are at their first step
    updates: list[tuple[Any, torch.device, Tensor | None]] = field(default_factory=list)
    has_cpu: bool = False
    is_plain: bool = False  # compiled, on the CPU, past the first step, at the groups' own rates
    # Each table's address and the stream that last used it; empty unless all is compiled, on CUDA, past the first step.
    tables: list[tuple[int, int]] = field(default_factory=list)


def _share_memory(params: list[Tensor]) -> set[int]:
    """ids of the parameters that overlap another, or are listed twice: in what order to update them is torch's."""
    spans = sorted(
        (p.device.type, p.device.index or 0, p.data_ptr(), p.data_ptr() + p.numel() * p.element_size(), id(p))
        for p in params
        if type(p) in compiled.PLAIN and p.layout == torch.strided and p.numel() > 0
    )
    shared, reach = set(), None
    for span in spans:
        if reach is not None and span[:2] == reach[:2] and span[2] < reach[3]:
            shared |= {span[4], reach[4]}
        if reach is None or span[:2] != reach[:2] or span[3] > reach[3]:
            reach = span
    return shared


def _reason_against_group(group: dict[str, Any]) -> str | None:
    if group["differentiable"]:
        return "its group is differentiable"
    if isinstance(group["lr"], Tensor) and group["lr"].requires_grad:
        return "its learning rate requires grad"
    for key in ("momentum", "dampening", "weight_decay"):
        if isinstance(group[key], Tensor):
            return f"its group's {key} is a tensor"
    return None


def _reason_against_grad(p: Tensor) -> str | None:
    if p.grad is None:
        return None
    reason = compiled.reason_against(p.grad)
    if reason is None and not compiled.same_layout(p, p.grad):
        reason = "has another dtype, device or layout than its parameter"
    return None if reason is None else f"its gradient {reason}"


def _overflowed(found_inf: Tensor | None) -> bool:
    # A sum over devices, so any number.
    return found_inf is not None and found_inf.item() != 0


def _unscale_(grads: list[Tensor], grad_scale: Tensor) -> None:
    inverse = compiled.inverse_of(grad_scale)
    for grad in grads:
        (grad._values() if grad.is_sparse else grad).mul_(inverse.to(grad.device))
