"""Reasons: which parameters of a fused optimizer go through torch's for-loop, and why."""

from typing import Any

from torch import Tensor

from freezeout_ext.fused import compiled, traced
from freezeout_ext.fused.formula import Formula


class Reasons(Formula):
    """A mixin of FusedOptimizer."""

    param_groups: list[dict[str, Any]]
    state: Any  # {parameter: {name: value}}
    # Set once torch.compile traced a step: for each group the positions of parameters that share memory.
    _sharing: list[tuple[int, ...]] | None = None

    def native_report(self) -> dict[str, str]:
        """{"group 0, parameter 2": reason} for each parameter that goes through torch's for-loop."""
        report = {}
        shared = self._share_memory()
        all_by_torch = compiled.SHARED_GRADIENT if self._share_memory(with_gradients=True) != shared else None
        for i, (group, reasons) in enumerate(zip(self.param_groups, self._reasons(), strict=True)):
            for j, (p, reason) in enumerate(zip(group["params"], reasons, strict=False)):  # [] for a frozen group
                reason = reason or compiled.reason_against_grad(p) or all_by_torch
                if reason is None and self._sharing is not None and not traced.op_takes(self._op_tensors(p)):
                    reason = "is neither contiguous nor channels-last with all its states, as the traced op needs it"
                if reason is not None:
                    report[f"group {i}, parameter {j}"] = reason
        return report

    def _op_tensors(self, p: Tensor) -> list[Tensor | None]:
        """A parameter, its gradient and its states, as op_takes looks at them."""
        state = self.state[p].values() if p in self.state else ()
        return [p, p.grad, *(value for value in state if isinstance(value, Tensor))]

    def _reasons(self) -> list[list[str | None]]:
        """For each parameter of each group, why the parameter goes through torch's for-loop, or None.

        A frozen group has []. The present gradient gives no reason, since the next step may bring another.
        """
        of_all = compiled.reason_against_containers(self.param_groups, self.state)
        shared = self._share_memory()
        found: list[list[str | None]] = []
        for group in self.param_groups:
            if group.get("frozen"):
                found.append([])
                continue
            of_group = of_all or compiled.reason_against_container(group) or self._reason_against_group(group)
            found.append(
                [
                    of_group
                    or compiled.reason_against(p)
                    or ("it or a state of it shares memory with others" if id(p) in shared else None)
                    or self._reason_against_state(p, group)
                    for p in group["params"]
                ]
            )
        return found

    def _share_memory(self, with_gradients: bool = False) -> set[int]:
        """ids of the active parameters that share memory, by themselves or by a state; also by a gradient, if asked."""
        params = [p for group in self.param_groups if not group.get("frozen") for p in group["params"]]
        states = [(p, state) for p in params for state in self.state.get(p, {}).values()]
        grads = [(p, p.grad) for p in params if with_gradients]
        return compiled.share_memory([(p, p) for p in params] + states, grads)

    def _reason_against_group(self, group: dict[str, Any]) -> str | None:
        if group["differentiable"]:
            return "its group is differentiable"
        if isinstance(group["lr"], Tensor) and group["lr"].requires_grad:
            return "its learning rate requires grad"
        return self._reason_against_numbers(group)
