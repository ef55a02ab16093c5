"""The learning rates of a GraphedStep: set on the host, or where a captured step reads them."""

import torch
from torch import Tensor

from . import native
from .freezeout import FreezeOut
from .fused import FusedOptimizer
from .param_groups import set_rate
from .schedule import Schedule


class Rates:
    """rate = base * cosine.lr_factor(0, step) of each active group, for plain steps.

    Args:
        optimizer: whose groups' rates these are.
        freezeout: what sets the rates where there is no cosine; None leaves them as they are.
        cosine: of all layers, or None.

    Attributes:
        step: the step that the rates are set for; None while a step runs.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, freezeout: FreezeOut | None, cosine: Schedule | None) -> None:
        self.step: int | None = None
        self._prepared = False
        self._optimizer, self._freezeout, self._cosine = optimizer, freezeout, cosine
        self._bases = [group.get("base_lr", float(group["lr"])) for group in optimizer.param_groups]

    def set(self, step: int) -> None:
        """The rates of the step that comes next."""
        self.step = step
        if self._cosine is not None:
            factor = self._cosine.lr_factor(0, step)
            for group, base in zip(self._optimizer.param_groups, self._bases, strict=True):
                if not group.get("frozen"):
                    set_rate(group, base * factor)

    def prepare(self) -> None:
        """Before each step: the rates are where the step reads them."""
        if not self._prepared:
            self._put()
            self._prepared = True

    def forget(self) -> None:
        """A state was loaded, or a layer froze or was thawed."""
        self._prepared = False

    def _put(self) -> None:
        """Puts the rates where the steps read them from now on."""

    def advance(self) -> None:
        """Part of each step, and of its graph."""

    def close(self) -> None:
        """Leaves the optimizer to others."""


class TensorRates(Rates):
    """Tensors, from which torch's optimizers read their rates; FreezeOut and the cosine fill them."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        freezeout: FreezeOut | None,
        cosine: Schedule | None,
        device: torch.device,
    ) -> None:
        super().__init__(optimizer, freezeout, cosine)
        self._device = device

    def _put(self) -> None:
        for group in self._optimizer.param_groups:
            lr = group["lr"]
            # A loaded state brings rates on the CPU.
            if not isinstance(lr, Tensor) or lr.device.type != self._device.type:
                group["lr"] = torch.tensor(float(lr), device=self._device)


class ScheduledRates(Rates):
    """Computed on the device by a fused optimizer, from a counter of steps that each step advances.

    Attributes:
        counter: int64 tensor of no dimension: steps done.
    """

    def __init__(
        self, optimizer: FusedOptimizer, freezeout: FreezeOut | None, cosine: Schedule | None, device: torch.device
    ) -> None:
        super().__init__(optimizer, freezeout, cosine)
        self.counter = torch.zeros((), dtype=torch.int64, device=device)
        self._fused = optimizer
        self._constant: list[float] | None = None

    def prepare(self) -> None:
        if self._prepared and self._constant is not None and self._constant != self._given():
            raise RuntimeError(
                "lr must not change between graphed steps of a fused optimizer: pass cosine=, or use torch's with"
                " fused=True"
            )
        super().prepare()

    def _put(self) -> None:
        assert self.step is not None  # set before each step
        self.counter.fill_(self.step)
        groups = zip(self._fused.param_groups, self._bases, strict=True)
        self._fused.set_device_schedule(self.counter, [self._scheduled(group, base) for group, base in groups])
        free = self._cosine is None and (self._freezeout is None or not self._freezeout.anneal)
        self._constant = self._given() if free else None

    def _given(self) -> list[float]:
        return [float(group["lr"]) for group in self._fused.param_groups]

    def advance(self) -> None:
        self.counter.add_(1)

    def close(self) -> None:
        self._fused.set_device_schedule(None)

    def _scheduled(self, group: dict, base: float) -> tuple[float, float, float]:
        """(peak, milestone, warmup) of a group, as set_device_schedule takes them."""
        if self._cosine is not None:
            schedule, layer = self._cosine, 0
        elif self._freezeout is not None and self._freezeout.anneal:
            schedule, layer = self._freezeout.schedule, self._freezeout.anneals_as(group["layer"])
        else:
            return float(group["lr"]), float("inf"), 0
        peak = base / schedule.t(layer) if schedule.scale_lr else base
        return peak, schedule.milestone(layer), schedule.warmup_steps


def captured_rates(
    optimizer: torch.optim.Optimizer, freezeout: FreezeOut | None, cosine: Schedule | None, device: torch.device
) -> Rates:
    """The rates of steps that are captured on `device`, a GPU.

    Raises:
        ValueError: the optimizer takes its rates from the host alone.
    """
    if isinstance(optimizer, FusedOptimizer):
        if (reason := native.cuda_unavailable_reason(device)) is not None:
            raise ValueError(f"optimizer must have its compiled half to be captured: {reason}")
        return ScheduledRates(optimizer, freezeout, cosine, device)
    for i, group in enumerate(optimizer.param_groups):
        if not (group.get("fused") or group.get("capturable")):
            raise ValueError(
                f"optimizer must be a FusedOptimizer, or made with fused=True or capturable=True, to be captured, got"
                f" {type(optimizer).__name__} with neither (param group {i})"
            )
    return TensorRates(optimizer, freezeout, cosine, device)


def prepare_for_scaler(optimizer: torch.optim.Optimizer) -> None:
    """Makes a captured step of the optimizer right where an enabled GradScaler skips it.

    Raises:
        ValueError: the optimizer's step asks the host whether it is skipped.
    """
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
