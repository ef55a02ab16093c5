"""The engine for a chain: chosen by mode and device, checked against eager on a few samples."""

from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..torch_state import kept_generators
from .cpu import CpuEngine, unsupported_dtype
from .graphs import ExactEngine
from .judge import TOLERANCE, Refused, constant, error_of, first_line
from .lower import lower_chain
from .program import Program
from .units import Unit, run_units, values_of
from .watch import Segment

MODES = ("exact", "folded", "bf16", "fp16", "off")
HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Builder:
    """Builds and checks the engine that computes what the units of a segment do.

    Args:
        mode: see Prefix.
        segment: seen in the watched forward.
    """

    def __init__(self, mode: str, segment: Segment) -> None:
        self.mode, self.segment = mode, segment
        self.few = tuple(segment.few_inputs)
        self.half = segment.autocast[1] if segment.autocast[0] else None
        names = {dtype: name for name, dtype in HALF.items()}
        self.tolerance = TOLERANCE[names.get(self.half, mode) if self.half else mode]

    def build(self) -> tuple[Any, float]:
        """-> the engine and its error.

        A unit that cannot be written as ops, or comes out wrong, is called as it is.

        Raises:
            Refused: nothing here runs this mode on this device, or the engine is off.
        """
        segment, units = self.segment, self.segment.units
        if any(_storage(segment.y) == _storage(x) for x in segment.inputs):
            raise Refused("its output shares memory with its input")
        with _for_the_probe(segment.y.device, segment.autocast):
            y = segment.few_y
            if self.mode == "exact":
                for unit in units:
                    unit.guard.drop_values()  # the modules read their weights at each call
                engine = ExactEngine(partial(run_units, units))
                self._error(engine, y, TOLERANCE["bf16" if self.half else "folded"])
                return engine, 0.0  # another batch size rounds otherwise
            try:
                return self._engine_of(units, y)
            except Refused as reason:
                wrong = self._wrong_units()
                if not wrong:
                    raise
                engine, error = self._engine_of(units, y, wrong)
                engine.notes += [f"{name} runs as it is: {reason}" for name in wrong.values()]
                return engine, error

    def _wrong_units(self) -> dict[nn.Module, str]:
        """-> the units by which an engine of the units so far fails, or is off, on the few samples."""
        units = self.segment.units
        wrong: dict[nn.Module, str] = {}
        for i, y in enumerate(values_of(units, self.few)):
            try:
                self._engine_of(units[: i + 1], y.clone(), wrong)  # the next unit may write y
            except Refused:
                wrong[units[i].module] = units[i].name
        return wrong

    def _engine_of(self, units: list[Unit], y: Tensor, as_they_are: Container[nn.Module] = ()) -> tuple[Any, float]:
        """-> an engine that gives y for the few samples, and its error."""
        engine = self._engine(lower_chain(units, len(self.few), as_they_are), y)
        return engine, self._error(engine, y, max(self.tolerance, engine.tolerance))  # TF32 has its own

    def _error(self, engine: Callable[..., tuple], y: Tensor, allowed: float) -> float:
        try:
            (found,) = engine(*self.few)
        except Exception as failure:  # whatever a module raises on the probe, eager did not
            raise Refused(f"fails on the probe: {first_line(failure)}") from failure
        if not (error := error_of(found, y)) <= allowed:
            raise Refused(f"error {error:.1e} against eager, allowed {allowed:.0e}")
        return error

    def _engine(self, program: Program, y: Tensor) -> Any:
        dtype = HALF.get(self.mode) or self.half or (y.dtype if y.is_floating_point() else torch.float32)
        last = y.dim() == 4 and y.is_contiguous(memory_format=torch.channels_last) and not y.is_contiguous()
        given = {"output_dtype": y.dtype, "channels_last": last}
        if y.device.type == "cuda":
            try:
                from .cuda import CudaEngine
            except ImportError as error:
                raise Refused(f"no CUDA runtime: {first_line(error)}") from error
            return CudaEngine(program, dtype=dtype, **given)
        if y.device.type != "cpu":
            raise Refused(f"no fused runtime for {y.device.type}")
        if dtype in HALF.values() and (missing := unsupported_dtype(dtype)):
            if self.mode not in HALF:
                raise Refused(f"the prefix stays under autocast as it is: {missing}")
            program.notes.insert(0, f"{self.mode} runs as folded float32: {missing}")
            dtype = torch.float32
        return CpuEngine(program, dtype=dtype, **given)


@contextmanager
def _for_the_probe(device: torch.device, autocast: tuple[bool, torch.dtype]) -> Iterator[None]:
    """No graph, the user's autocast, and no random number of the user's is drawn."""
    enabled, dtype = autocast
    with kept_generators(devices=True), constant(), torch.autocast(device.type, enabled=enabled, dtype=dtype):
        yield


def _storage(t: Tensor) -> int:
    return t.untyped_storage().data_ptr()
