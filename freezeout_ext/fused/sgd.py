"""FusedSGD: torch.optim.SGD over all active tensors in one call."""

from typing import Any

import torch
from torch import Tensor
from torch.optim.sgd import sgd

from freezeout_ext.fused import compiled
from freezeout_ext.fused.optimizer import FusedOptimizer
from freezeout_ext.fused.sgd_op import fused_sgd_


class FusedSGD(FusedOptimizer, torch.optim.SGD):
    """v = momentum * v + (1 - dampening) * (grad + weight_decay * p);  p -= lr * v: every active tensor in one call.

    Arguments, errors, param groups, `state_dict`, hooks and closures are those of torch.optim.SGD.
    Results in float32 and float64, on a CPU with FMA, are bit-equal to those of torch.optim.SGD's for-loop.
    FusedOptimizer says what the class adds.

    `foreach` and `fused` are accepted for compatibility and change nothing.
    With dampening, torch's for-loop makes each parameter's first step, because torch does not dampen that step.

    Source: torch.optim.SGD; Sutskever et al. 2013 for Nesterov momentum.
    """

    _formula = "sgd"
    _op = staticmethod(fused_sgd_)

    def _buffer(self, p: Tensor) -> Tensor | None:
        # self.state[p] alone would add an entry for p.
        return self.state[p].get("momentum_buffer") if p in self.state else None

    def _lacks_state(self, p: Tensor, group: dict[str, Any]) -> bool:
        return group["momentum"] != 0 and self._buffer(p) is None

    def _make_state(self, p: Tensor, group: dict[str, Any]) -> None:
        self.state[p]["momentum_buffer"] = torch.zeros_like(p)

    def _reason_against_state(self, p: Tensor, group: dict[str, Any]) -> str | None:
        if group["momentum"] == 0:
            return None
        buffer = self._buffer(p)
        if buffer is not None:
            return compiled.reason_against_state(p, "momentum_buffer", buffer)
        return "takes its first step with dampening" if group["dampening"] != 0 else None

    def _reason_against_numbers(self, group: dict[str, Any]) -> str | None:
        for key in ("momentum", "dampening", "weight_decay"):
            if isinstance(group[key], Tensor):
                return f"its group's {key} is a tensor"
        return None

    def _torch_update(self, group: dict[str, Any], params: list[Tensor]) -> None:
        has_momentum = group["momentum"] != 0
        buffers = [self.state[p].get("momentum_buffer") for p in params] if has_momentum else []
        grads: list[Any] = [p.grad for p in params]  # tensors, all of them
        sgd(
            params,
            grads,
            buffers,
            has_sparse_grad=any(grad.is_sparse for grad in grads),
            foreach=False,
            fused=False,
            **{key: group[key] for key in ("lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize")},
        )
        for p, buffer in zip(params, buffers, strict=has_momentum):
            self.state[p]["momentum_buffer"] = buffer

    def _op_lists(self, group: dict[str, Any]) -> list[list[Tensor]]:
        params: list[Tensor] = []
        grads: list[Tensor] = []
        buffers: list[Tensor] = []
        self._init_group(group, params, grads, buffers)
        return [params, grads, buffers]

    def _op_numbers(self, group: dict[str, Any]) -> dict[str, Any]:
        return {key: group[key] for key in ("momentum", "dampening", "weight_decay", "nesterov", "maximize")}
