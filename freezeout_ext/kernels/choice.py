"""The fastest of several ways to run one op on one shape, out of those that agree with the reference."""

import logging
import statistics
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..cuda_graphs import capture

logger = logging.getLogger("freezeout_ext")

LAUNCHES = 10  # in one timed graph: a small kernel lasts less than its launch from Python
ROUNDS = 5
SCRATCH_BLOCKS = 3  # of each size: operand, result, second result

# Largest |error| over the largest |value|: one rounding of the result, and of the operands for TF32; a wrong
# kernel is off by the order of 1.
TOLERANCES = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 2e-5}
TF32_TOLERANCE = 3e-3

Run = Callable[[], Sequence[Tensor]]
T = TypeVar("T", bound=Hashable)


@dataclass
class Choice:
    """One choice.

    Attributes:
        chosen: the candidate.
        seconds: of each candidate that agreed; none on a CPU.
        rejected: why the other candidates were rejected.
    """

    chosen: Any = None
    seconds: dict[Any, float] = field(default_factory=dict)
    rejected: dict[Hashable, str] = field(default_factory=dict)


_choices: dict[Hashable, Choice] = {}


def choices() -> dict[Hashable, Choice]:
    """All choices of this process by key."""
    return dict(_choices)


def tolerance(dtype: torch.dtype, tf32: bool = False) -> float:
    """The largest error that `choose` should allow for results in `dtype`."""
    return TF32_TOLERANCE if tf32 and dtype == torch.float32 else TOLERANCES[dtype]


def choose(
    key: Hashable,
    candidates: Mapping[T, Run],
    *,
    outputs: Sequence[Tensor],
    expected: Callable[[], Sequence[Tensor]],
    tolerance: float,
    scratch: Callable[[], Sequence[Tensor]] = tuple,
) -> T:
    """argmin over candidates of the median device time, among those that give `expected()`; cached by key.

    Each candidate runs once. Its result is compared: max |found - expected| <= tolerance * max |expected|.
    Candidates that agree are timed in turns, on the device alone (launches in a CUDA graph, data warm in L2). On a CPU
    the first candidate that agrees is taken.

    Args:
        key: names the choice for the process.
        candidates: what may run, by name.
        outputs: memory that candidates write if they do not return their own. It is filled with NaN before each run.
        expected: gives what a candidate must return.
        tolerance: the largest error allowed, over the largest value.
        scratch: gives tensors of the sizes that candidates allocate. Memory of these sizes is filled with NaN and freed
            before each run, which then gets that memory: a result that nobody wrote, or that depends on unwritten
            memory, is NaN.

    Raises:
        RuntimeError: none agrees, or the current stream is being captured and the key is new.
    """
    if key in _choices:
        return _choices[key].chosen
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(f"{key} must be run once before a CUDA graph is captured: its candidates are unmeasured")
    wanted = expected()
    choice = Choice()
    agreed: dict[T, Run] = {}
    for name, run in candidates.items():
        problem = _disagreement(run, outputs, wanted, tolerance, scratch())
        if problem:
            choice.rejected[name] = problem
            logger.warning("%s: candidate %s rejected: %s", key, name, problem)
            continue
        agreed[name] = run
        if not wanted[0].is_cuda:
            break
    if not agreed:
        raise RuntimeError(f"{key}: no candidate agrees with the reference: {choice.rejected}")
    if wanted[0].is_cuda and len(agreed) > 1:
        choice.seconds = device_seconds(agreed)
    choice.chosen = min(agreed, key=lambda name: choice.seconds.get(name, 0.0))
    _choices[key] = choice
    return choice.chosen


def _disagreement(
    run: Run, outputs: Sequence[Tensor], wanted: Sequence[Tensor], tolerance: float, scratch: Sequence[Tensor]
) -> str:
    for out in outputs:
        out.fill_(float("nan"))
    poisoned = [torch.full_like(like, float("nan")) for like in scratch for _ in range(SCRATCH_BLOCKS)]
    del poisoned
    try:
        results = run()
    # Too much shared memory, or a configuration that this Triton does not compile: another candidate runs.
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    for i, (found, want) in enumerate(zip(results, wanted, strict=True)):
        off = (found.double() - want.double()).abs().max().item()
        largest = want.abs().max().item()
        if not off <= tolerance * largest:  # a NaN disagrees
            return f"output {i} is off by {off:.3g}, allowed {tolerance:.1g} of {largest:.3g}"
    return ""


def _launched(run: Run) -> list[Sequence[Tensor]]:
    return [run() for _ in range(LAUNCHES)]


def device_seconds(candidates: Mapping[T, Run]) -> dict[T, float]:
    """Median device time of one run of each candidate, in turns, each a CUDA graph of LAUNCHES runs."""
    graphs: dict[T, torch.cuda.CUDAGraph] = {}
    pool = None
    for name, run in candidates.items():
        # In one memory: they are replayed in turns, and no one reads their results.
        graphs[name], _ = capture(partial(_launched, run), pool=pool)
        pool = graphs[name].pool()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    seconds: dict[T, list[float]] = {name: [] for name in candidates}
    for _ in range(ROUNDS):
        for name, graph in graphs.items():
            graph.replay()  # brings this candidate's data into L2
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            seconds[name].append(begin.elapsed_time(end) / 1000 / LAUNCHES)
    return {name: statistics.median(found) for name, found in seconds.items()}
