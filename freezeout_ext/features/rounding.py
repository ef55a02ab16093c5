"""Rounding: rows as int8, x ~ q * scale[channel] * factor[row]; and how far kept values may be from x."""

import torch
from torch import Tensor

# How far a kept value may be from the same one computed anew, as a part of the row's largest value.
# None: kernels choose their order of summation by the size of the batch.
# bfloat16, float16: half a unit in the last place, and that again for the order of summation.
BOUNDS = {None: 1e-4, torch.bfloat16: 2**-8, torch.float16: 2**-10, torch.int8: 1 / 127}


class Rounding:
    """q[r, c, ...] = round(x[r, c, ...] / (scale[c] * factor[r])) in -127..127.

    A channel's scale is its largest value in the first batch. Quiet channels stay fine so.
    A row's factor makes its largest quotient 127. No value is cut off so, however later rows differ from the first.

    Args:
        unit: shape of a stored row.
        channel_first: whether rows are [C, H, W]. In memory their channel is the first dimension, or the last one where
            they lie channels-last. The channel of all other rows is the last dimension.

    Attributes:
        scale: float32 [channels]; None before the first batch.
    """

    def __init__(self, unit: tuple[int, ...], *, channel_first: bool) -> None:
        self._dims = len(unit)
        self._candidates = (1, len(unit)) if channel_first and len(unit) >= 3 else (max(len(unit), 1),)
        self.scale: Tensor | None = None
        self._channel = self._candidates[-1]

    def encode(self, x: Tensor, row_of: Tensor | None, rows: int) -> tuple[Tensor, Tensor]:
        """x [R, *unit] -> (q int8 like x, factor float32 [rows]).

        Args:
            row_of: the row of each x[i]; None: i.
            rows: how many rows there are.
        """
        x = x.to(torch.float32)
        if self.scale is None:
            self._choose(x)
        quotient = x / self._scale_like(x)
        largest = quotient.abs().flatten(1).amax(1) if x.dim() > 1 else quotient.abs()
        if row_of is not None:
            largest = torch.zeros(rows, device=x.device).scatter_reduce(0, row_of, largest, "amax")
        factor = (largest / 127).clamp(min=torch.finfo(torch.float32).tiny)
        by_row = factor if row_of is None else factor[row_of]
        q = quotient.div_(by_row.view(-1, *[1] * (x.dim() - 1))).round_()
        return q.to(torch.int8), factor

    def decode(self, q: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
        factor, scale = factor.view(-1, *[1] * (q.dim() - 1)), self._scale_like(q)
        if q.dim() > 2:
            return q.to(torch.float32).mul_(factor * scale).to(dtype)  # one pass less: their product is small
        return q.to(torch.float32).mul_(factor).mul_(scale).to(dtype)

    def state(self) -> dict:
        assert self.scale is not None  # a state is that of rows
        return {"scale": self.scale.tolist(), "channel": self._channel}

    def load(self, state: dict) -> None:
        self.scale, self._channel = torch.tensor(state["scale"], device="cpu"), state["channel"]

    def _choose(self, x: Tensor) -> None:
        """Takes the dimension whose scales are the least in the mean for that of the channels."""
        found = {}
        for channel in self._candidates:
            others = [d for d in range(x.dim()) if d != channel]
            scale = x.abs().amax(others) if self._dims else x.abs().amax().view(1)
            # A channel that was silent so far must not divide by nothing.
            found[channel] = torch.where(scale > 0, scale, scale.max()).clamp(min=torch.finfo(torch.float32).tiny)
        self._channel = min(found, key=lambda channel: float(found[channel].mean()))
        self.scale = found[self._channel]

    def _scale_like(self, x: Tensor) -> Tensor:
        scale = self.scale
        assert scale is not None  # chosen with the first rows
        if scale.device != x.device:
            scale = self.scale = scale.to(x.device)
        shape = [1] * x.dim()
        if self._dims:
            shape[self._channel] = -1
        return scale.view(shape)
