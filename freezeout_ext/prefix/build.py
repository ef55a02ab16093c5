"""The engine for a chain: chosen by mode and device, checked against eager on a few samples."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .chain import Chain
from .cpu import Arena, CpuEngine, unsupported_dtype
from .graphs import ExactEngine
from .judge import TOLERANCE, Refused, error_of, first_line, quietly
from .lower import lower_chain
from .watch import Segment

MODES = ("exact", "folded", "bf16", "fp16", "off")
HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Kept:
    """What engines of successive frontiers share: packed weights, buffers, traces."""

    weights: dict = field(default_factory=dict)
    arena: Arena = field(default_factory=Arena)
    traces: dict = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        tensors = {id(t): t for pair in self.weights.values() for t in pair if isinstance(t, Tensor)}
        return sum(t.numel() * t.element_size() for t in tensors.values())


def build(mode: str, chain: Chain, segment: Segment, kept: Kept) -> tuple[Any, float]:
    """-> the engine that computes what the chain's modules do, and its error.

    A unit that cannot be written as ops, or comes out wrong, is called as it is.

    Raises:
        Refused: nothing here runs this mode on this device, or the engine is off.
    """
    y, few = segment.y, tuple(segment.few_inputs)
    assert y is not None  # a segment has a unit, and so its result
    if any(_storage(y) == _storage(x) for x in segment.inputs):
        raise Refused("its output shares memory with its input")
    with quietly(y.device, segment.autocast):
        wanted = _run(chain.originals, few)
        again = error_of(wanted, (segment.few_y,))
        if not again <= TOLERANCE["bf16" if segment.autocast[0] else "folded"]:
            raise Refused("the modules gave something else in the watched forward")
        if mode == "exact":
            return ExactEngine(chain.originals), 0.0
        for link in chain.links:
            link.guard.keep_values()
        try:
            return _checked(mode, chain, segment, kept, wanted, frozenset())
        except Refused as reason:
            wrong = _wrong_units(mode, chain, segment, kept)
            if not wrong:
                raise
            engine, error = _checked(mode, chain, segment, kept, wanted, frozenset(wrong))
            engine.notes += [f"{name} runs as it is: {reason}" for name in wrong.values()]
            return engine, error


def _checked(mode: str, chain: Chain, segment: Segment, kept: Kept, wanted: tuple, as_they_are: frozenset) -> tuple:
    few = tuple(segment.few_inputs)
    half = segment.autocast[1] if segment.autocast[0] else None
    program = lower_chain(chain.links, len(few), as_they_are=as_they_are, traces=kept.traces)
    assert segment.y is not None  # see `build`
    engine = _engine(mode, program, segment.y, half, kept)
    names: dict[torch.dtype | None, str] = {torch.bfloat16: "bf16", torch.float16: "fp16"}
    tolerance = TOLERANCE[names.get(half, mode)]
    tolerance = max(tolerance, engine.tolerance)  # TF32 has its own
    error = error_of(_run(engine, few), wanted)
    if not error <= tolerance:
        raise Refused(f"error {error:.1e} against eager, allowed {tolerance:.0e}")
    return engine, error


def _engine(mode: str, program: Any, y: Tensor, half: torch.dtype | None, kept: Kept) -> Any:
    dtype = HALF.get(mode) or half or (y.dtype if y.is_floating_point() else torch.float32)
    given = {"output_dtype": y.dtype, "channels_last": _is_channels_last(y), "weights": kept.weights}
    if y.device.type == "cuda":
        try:
            from .cuda import CudaEngine
        except ImportError as error:
            raise Refused(f"no CUDA runtime: {first_line(error)}") from error
        return CudaEngine(program, dtype=dtype, **given)
    if y.device.type != "cpu":
        raise Refused(f"no fused runtime for {y.device.type}")
    notes = []
    if dtype in HALF.values() and (missing := unsupported_dtype(dtype)):
        if mode not in HALF:
            raise Refused(f"the prefix stays under autocast as it is: {missing}")
        notes, dtype = [f"{mode} runs as folded float32: {missing}"], torch.float32
    engine = CpuEngine(program, dtype=dtype, arena=kept.arena, **given)
    engine.notes = notes + engine.notes
    return engine


def _wrong_units(mode: str, chain: Chain, segment: Segment, kept: Kept) -> dict[nn.Module, str]:
    """-> the units whose own engine fails or is off on the few samples."""
    wrong: dict[nn.Module, str] = {}
    few, x = tuple(segment.few_inputs), None
    half = segment.autocast[1] if segment.autocast[0] else None
    for i, link in enumerate(chain.links):
        given, y = few if x is None else (*few, x), chain.run(few, i)
        try:
            program = lower_chain([link], len(few), carried=x is not None, traces=kept.traces)
            error = error_of(_run(_engine(mode, program, y, half, kept), given), (y,))
            if not error <= TOLERANCE[mode if half is None else "bf16"]:
                raise Refused(f"error {error:.1e}")
        except Refused:
            wrong[link.unit.module] = link.unit.name
        x = y
    return wrong


def _run(function: Any, inputs: tuple) -> tuple:
    try:
        return function(*inputs)
    except Exception as error:  # whatever a module raises on the probe, eager did not
        raise Refused(f"fails on the probe: {first_line(error)}") from error


def _is_channels_last(t: Tensor) -> bool:
    return t.dim() == 4 and t.is_contiguous(memory_format=torch.channels_last) and not t.is_contiguous()


def _storage(t: Tensor) -> int:
    return t.untyped_storage().data_ptr()
