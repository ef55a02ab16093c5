"""FusedAdamW and FusedAdam: torch.optim.AdamW and Adam over all active tensors in one call."""

from typing import Any

import torch
from torch import Tensor
from torch.optim.adam import adam

from freezeout_ext.fused import compiled
from freezeout_ext.fused.adamw_op import fused_adamw_
from freezeout_ext.fused.optimizer import FusedOptimizer

MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")


class FusedAdam(FusedOptimizer, torch.optim.Adam):
    """m, v = averages of grad and grad^2;  p -= lr * m' / (sqrt(v') + eps), decay coupled: all tensors in one call.

    Arguments, errors, param groups, `state_dict`, hooks and closures are those of torch.optim.Adam.
    Results in float32 and float64, on a CPU with FMA, are bit-equal to those of torch.optim.Adam's for-loop.
    Only where torch takes square roots by MKL may a step differ, by at most 3 ulp (csrc/adamw_update.h).
    FusedOptimizer says what the class adds.

    `foreach` and `fused` are accepted for compatibility and change nothing.
    Each step counter is a float32 tensor on its parameter's device, as torch keeps counters with fused=True.
    The call that updates a parameter also advances its counter.
    So a step on CUDA can always be captured into a graph, and `capturable` changes nothing there.

    Source: torch.optim.Adam; Kingma and Ba 2014, arXiv 1412.6980; Reddi et al. 2018 for amsgrad.
    """

    _formula = "adamw"
    _op = staticmethod(fused_adamw_)

    def _lacks_state(self, p: Tensor, group: dict[str, Any]) -> bool:
        return len(self.state.get(p, ())) == 0

    def _make_state(self, p: Tensor, group: dict[str, Any]) -> None:
        state = self.state[p]
        state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
        for name in MOMENTS[: 3 if group["amsgrad"] else 2]:
            state[name] = torch.zeros_like(p)

    def _reason_against_state(self, p: Tensor, group: dict[str, Any]) -> str | None:
        state = self.state.get(p, {})
        if not state:
            return None
        step = state.get("step")
        if not isinstance(step, Tensor) or step.dtype != torch.float32 or step.numel() != 1:
            return f"its step must be one float32, got {step!r}"
        if step.device != p.device and compiled.reason_against(p) is None:
            # torch.optim.AdamW(fused=True) keeps the counter there too.
            state["step"] = step = step.to(p.device)
        if (reason := compiled.reason_against(step)) is not None:
            return f"its step {reason}"
        for name in MOMENTS[: 3 if group["amsgrad"] else 2]:
            if not isinstance(state.get(name), Tensor):
                return f"its state has no {name}"
            if (reason := compiled.reason_against_state(p, name, state[name])) is not None:
                return reason
        return None

    def _reason_against_numbers(self, group: dict[str, Any]) -> str | None:
        betas = group["betas"]
        if not isinstance(betas, (tuple, list)) or len(betas) != 2:
            return f"its group's betas must be two numbers, got {betas!r}"
        for key, value in (("betas", betas[0]), ("betas", betas[1]), *((k, group[k]) for k in ("eps", "weight_decay"))):
            if isinstance(value, Tensor):
                return f"its group's {key} is a tensor"
        if group["capturable"] and any(p.device.type == "cpu" for p in group["params"]):
            return "its group is capturable, on a CPU"
        return None

    def _torch_update(self, group: dict[str, Any], params: list[Tensor]) -> None:
        lists: list[list[Tensor]] = [[] for _ in range(6)]
        has_complex = self._init_group({**group, "params": params, "foreach": False, "fused": False}, *lists)
        beta1, beta2 = group["betas"]
        names = ("amsgrad", "lr", "weight_decay", "eps", "maximize", "capturable", "differentiable")
        given, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps = lists
        adam(
            given,
            grads,
            exp_avgs,
            exp_avg_sqs,
            max_exp_avg_sqs,
            steps,
            foreach=False,
            fused=False,
            has_complex=has_complex,
            beta1=beta1,
            beta2=beta2,
            decoupled_weight_decay=group["decoupled_weight_decay"],
            **{name: group[name] for name in names},
        )

    def _op_lists(self, group: dict[str, Any]) -> list[list[Tensor]]:
        params: list[Tensor] = []
        grads: list[Tensor] = []
        exp_avgs: list[Tensor] = []
        exp_avg_sqs: list[Tensor] = []
        largest: list[Tensor] = []
        steps: list[Tensor] = []
        self._init_group(group, params, grads, exp_avgs, exp_avg_sqs, largest, steps)
        return [params, grads, exp_avgs, exp_avg_sqs, largest, steps]

    def _op_numbers(self, group: dict[str, Any]) -> dict[str, Any]:
        beta1, beta2 = group["betas"]
        numbers = {key: group[key] for key in ("eps", "weight_decay", "amsgrad", "maximize")}
        return {**numbers, "beta1": beta1, "beta2": beta2, "decoupled": group["decoupled_weight_decay"]}


class FusedAdamW(FusedAdam, torch.optim.AdamW):
    """p *= 1 - lr * weight_decay;  p -= lr * m' / (sqrt(v') + eps): every active tensor in one call.

    FusedAdamW takes the place of torch.optim.AdamW as FusedAdam takes that of torch.optim.Adam.

    Source: torch.optim.AdamW; Loshchilov and Hutter 2017, arXiv 1711.05101.
    """
