"""FusedOptimizer: all of FusedSGD, FusedAdam and FusedAdamW but their formula."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import _profiler_enabled
from torch.compiler import is_compiling
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from freezeout_ext import native
from freezeout_ext.arguments import check_kind
from freezeout_ext.fused import compiled, traced
from freezeout_ext.fused.prepared import Prepared, prepare
from freezeout_ext.fused.reasons import Reasons

# Another thread may change groups and states while a step is prepared. After so many tries the step raises.
MOST_PREPARATIONS = 8


class FusedOptimizer(Reasons, torch.optim.Optimizer):
    """p, states <- formula(p, states, grad): every active tensor of one dtype and device in one call.

    A mixin, to stand before one of torch's optimizers among a class's bases.
    Constructor, errors, param groups, state and hooks are those of torch's optimizer.
    One call updates the tensors of all param groups, each with its own group's hyperparameters.
    Updates of float16 and bfloat16 tensors are computed in float32 and rounded once, when stored.

    Groups with a true "frozen" key are neither read nor written.
    Addresses are prepared once and compared at each step, so parameters, states and groups may change at any time.
    A parameter's states are made as zeros when the parameter gets its first gradient.

    With torch.amp.GradScaler the step unscales the gradients and writes them back.
    Where a gradient is not finite, no parameter and no state changes.

    One optimizer must not step in two threads at once: the second thread gets a RuntimeError.

    What the compiled update does not take goes through torch's for-loop, with the same result.
    Such are sparse and complex tensors, tensor subclasses, `differentiable` groups, and gradients whose layout in
    memory is not their parameter's. `native_report()` lists these parameters with the reason.

    Under torch.compile the registered torch op runs, once for each set of equal hyperparameters.
    The op takes contiguous and channels-last tensors. torch's for-loop takes the others.
    Once a step was traced, `native_report()` lists these others too.
    """

    # On the class: a flag on the instance would be lost by deepcopy and pickle.
    _step_supports_amp_scaling = True
    _prepared: Prepared | None = None
    _device_schedule: tuple[Tensor, list[tuple[float, float, float]]] | None = None
    # Tables of captured steps: a graph reads its tables whenever it is replayed.
    _captured: frozenset[Tensor] = frozenset()

    def _init_group(self, group: dict[str, Any], *lists: list[Tensor]) -> bool:
        # While torch.compile traces a step, it runs this method for real, and tracks the state from the first call on.
        # A state that is made after that call would be lost, so the first call makes the states of all groups.
        # torch's for-loop calls with a copy of a group.
        groups = [group]
        if any(group is each for each in self.param_groups):
            groups = self.param_groups
            # Traced code cannot ask for addresses.
            shared = self._share_memory()
            self._sharing = [tuple(j for j, p in enumerate(g["params"]) if id(p) in shared) for g in groups]
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
            or (not is_compiling() and _profiler_enabled())
        ):
            return _hooked_step(self) if closure is None else _hooked_step(self, closure)
        loss = self._step(closure)
        self._optimizer_step_code()
        return loss

    # Without this flag torch would wrap `step` in hooks and a profiler's range, a third of the time of a small step.
    # `step` itself runs them, where there are any.
    step.hooked = True  # type: ignore[attr-defined]

    def _step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        grad_scale: Tensor | None = getattr(self, "grad_scale", None)
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        if is_compiling():
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
        """Whether some active parameter still lacks its states, which its first gradient will bring."""
        return any(
            p.requires_grad and self._lacks_state(p, group)
            for group in self.param_groups
            if not group.get("frozen")
            for p in group["params"]
        )

    def set_device_schedule(self, step: Tensor | None, rates: Sequence[tuple[float, float, float]] = ()) -> None:
        """lr = peak * cos^2(pi / 2 * (step - warmup) / (milestone - warmup)), 0 from the milestone on, on the device.

        The schedule takes the place of the groups' "lr", so that a replayed CUDA graph has the right rates.

        Args:
            step: int64 tensor of one element, which the caller advances; None goes back to "lr".
            rates: one (peak, milestone, warmup) for each param group. Milestone and warmup are in steps. Below
                warmup the rate is peak * (step + 1) / (warmup + 1).

        Raises:
            TypeError: step is no tensor, or rates is no sequence of three numbers for each group.
            ValueError: step is not int64 of one element, or there are not as many rates as param groups.
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
                if compiled.reason_against_containers(self.param_groups, self.state) is not None:
                    self._step_all_by_torch(grad_scale, found_inf)
                    return
                prepared = self._prepared = self._prepare()
            if found_inf is not None and prepared.asks_host:
                if compiled.overflowed(found_inf):
                    return
                found_inf = None
            schedule_step = None if self._device_schedule is None else self._device_schedule[0]
            done = prepared.run(self.param_groups, self.state, schedule_step, grad_scale, found_inf)
            if not isinstance(done, str):
                break
            changed = done
            if changed == compiled.SHARED_GRADIENT:
                self._step_all_by_torch(grad_scale, found_inf)
                return
            if changed == "another stream is current":
                prepared.use_current_streams()
            else:
                self._prepared = prepared = None  # the old one is freed before anything is allocated
        else:
            raise RuntimeError(f"{type(self).__name__} could not prepare its step: {changed}")
        leftover, captured = done
        if captured:
            self._captured = self._captured.union(table for table in prepared.tables if table is not None)
        if leftover is None and not prepared.by_torch:
            return
        # The compiled update has looked at found_inf on the device.
        if leftover is not None and not compiled.overflowed(found_inf):
            self._step_by_torch(
                [(self.param_groups[i], [self.param_groups[i]["params"][j]]) for i, j in leftover], grad_scale
            )
        self._step_by_torch(list(prepared.by_torch_now(self.param_groups)), grad_scale)

    def _prepare(self) -> Prepared:
        planned: list[list[bool]] = []
        by_torch: list[tuple[int, list[int] | None]] = []
        with torch.no_grad():
            for i, (group, reasons) in enumerate(zip(self.param_groups, self._reasons(), strict=True)):
                if compiled.reason_against_container(group) is not None:
                    planned.append([])
                    by_torch.append((i, None))
                    continue
                taken = [reason is None for reason in reasons]
                for j, p in enumerate(group["params"] if reasons else ()):  # a frozen group has no reasons
                    if taken[j] and p.grad is not None and self._lacks_state(p, group):
                        # torch makes the state after such a gradient.
                        taken[j] = compiled.reason_against_grad(p) is None
                        if taken[j]:
                            self._make_state(p, group)
                planned.append(taken)
                if not all(taken):
                    by_torch.append((i, [j for j, native in enumerate(taken) if not native]))
        rates = None if self._device_schedule is None else self._device_schedule[1]
        return prepare(self._formula, self.param_groups, self.state, planned, by_torch, rates)

    def _step_all_by_torch(self, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        if not compiled.overflowed(found_inf):
            self._step_by_torch([(group, list(group["params"])) for group in self.param_groups], grad_scale)

    def _step_by_torch(self, groups: list[tuple[dict[str, Any], list[Tensor]]], grad_scale: Tensor | None) -> None:
        """torch's for-loop over some parameters of some groups, gradients unscaled first."""
        if self._device_schedule is not None:
            raise RuntimeError(
                f"set_device_schedule needs the compiled update for all parameters: {self.native_report()}"
            )
        given = [
            (group, [] if group.get("frozen") else [p for p in candidates if p.grad is not None])
            for group, candidates in groups
        ]
        # Traced code cannot ask for addresses.
        grads = [(p, p.grad) for _, params in given for p in params] if grad_scale is not None else []
        if not is_compiling() and compiled.share_memory(grads):
            raise ValueError("gradients that are unscaled must not share memory")
        with torch.set_grad_enabled(self.defaults["differentiable"]):
            for group, params in given:
                if grad_scale is not None:
                    compiled.unscale_([p.grad for p in params if p.grad is not None], grad_scale)
                self._torch_update(group, params)

    def _step_by_op(self, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        """The step that torch.compile traces: the op for the tensors it takes, torch's for-loop for the rest."""
        if self._device_schedule is not None:
            raise RuntimeError("set_device_schedule must not be set under torch.compile")
        given = []
        for index, group in enumerate(self.param_groups):
            if group.get("frozen"):
                continue
            lists = self._op_lists(group)
            assert self._sharing is not None  # _op_lists asked
            positions = [j for j, p in enumerate(group["params"]) if p.grad is not None]
            shares = [j in self._sharing[index] for j in positions]
            given.append((group, lists, shares, self._op_numbers(group)))
        rest = traced.update_by_op_(self._op, given, grad_scale, found_inf)
        if rest and not compiled.overflowed(found_inf):
            self._step_by_torch(rest, grad_scale)


# Hooks in torch's order, and the range that profilers show.
_hooked_step = torch.optim.Optimizer.profile_hook_step(FusedOptimizer._step)
