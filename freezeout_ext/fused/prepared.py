"""Prepared: addresses, tables on the devices, and what goes through torch's for-loop, the same from step to step."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, get_num_threads

from freezeout_ext import native
from freezeout_ext.fused import compiled


@dataclass
class Prepared:
    """What one step prepares and later steps use again."""

    step: Any  # _C.PreparedStep
    by_torch: list[tuple[int, list[int] | None]]  # (group, positions); None: whatever the group holds
    devices: list[torch.device]  # of each batch
    tables: list[Tensor | None]
    asks_host: bool  # the host looks at found_inf before the update
    must_tell_streams: bool  # torch before 2.11 tells the module no current stream

    def run(
        self,
        groups: list[dict[str, Any]],
        state: dict[Tensor, Any],
        schedule_step: Tensor | None,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> Any:
        """_C.PreparedStep.run: what has changed, or (leftover, captured)."""
        inputs = None
        if schedule_step is not None or grad_scale is not None or found_inf is not None:
            given = ((schedule_step, torch.int64), (grad_scale, torch.float32), (found_inf, torch.float32))
            inputs = [
                tuple(None if t is None else t.to(device, dtype, non_blocking=True) for t, dtype in given)
                for device in self.devices
            ]
        if self.must_tell_streams:
            self.use_current_streams()
        return self.step.run(groups, state, get_num_threads(), inputs)

    def use_current_streams(self) -> None:
        for batch, table in zip(self.step.batches, self.tables, strict=True):
            if table is not None:
                compiled.use_current_stream(batch, table)

    def by_torch_now(self, groups: list[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], list[Tensor]]]:
        for i, positions in self.by_torch:
            params = list(groups[i]["params"])
            yield groups[i], params if positions is None else [params[j] for j in positions]


def prepare(
    formula: str,
    groups: list[dict[str, Any]],
    state: dict[Tensor, Any],
    planned: list[list[bool]],  # for each parameter of each group whether the compiled update takes it
    by_torch: list[tuple[int, list[int] | None]],
    rates: list[tuple[float, float, float]] | None,
) -> Prepared:
    """A step of these groups.

    Raises:
        RuntimeError: a CUDA graph is being captured, which must not hold the table's upload.
    """
    step = native.C.PreparedStep(
        compiled.tensor_reader(),
        formula=compiled.FORMULAS[formula],
        groups=groups,
        state=state,
        native=planned,
        schedule=rates,
    )
    devices = [compiled.device_of(batch) for batch in step.batches]
    if any(d.type == "cuda" for d in devices) and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("the optimizer must have made a step like this one before a graph captures it")
    tables = [compiled.upload_table(batch) for batch in step.batches]
    asks_host = bool(by_torch) or any(device.type == "cpu" for device in devices)
    must_tell_streams = any(t is not None for t in tables) and not compiled.tensor_reader().exchanges
    return Prepared(step, by_torch, devices, tables, asks_host, must_tell_streams)
