"""What a run costs, in seconds per step and bytes for each stretch between two transitions; and where it ran."""

import platform
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median

import torch

from ..native import version
from ..planner import median_error
from .malloc import malloc_in_use

COUNTED_MEMORY = "parameters + buffers + gradients + optimizer state + tensors saved for backward, counted"
STRETCHES = 10  # of a phase
LEAST_STEPS, MOST_SWING = 10, 5.0
CUDA_MEMORY = "torch.cuda.max_memory_allocated"


@dataclass
class Phase:
    """The steps first_step .. first_step + steps - 1, in which num_frozen layers were frozen.

    Attributes:
        seconds: of each step but the first, in which memory is counted and allocators warm up.
        cpu_seconds: of the same steps, as StepTimer gives them.
        memory: bytes at the peak.
    """

    num_frozen: int
    first_step: int
    steps: int = 0
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    memory: int = 0

    @property
    def seconds_per_step(self) -> float | None:
        return median(self.seconds) if self.seconds else None

    def summary(self) -> dict:
        found: dict[str, float | None] = {
            "num_frozen": self.num_frozen,
            "first_step": self.first_step,
            "steps": self.steps,
            "memory_bytes": self.memory,
        }
        for name, values in (("seconds", self.seconds), ("cpu_seconds", self.cpu_seconds)):
            found[f"{name}_per_step"] = median(values) if values else None
            found[f"{name}_per_step_mean"] = fmean(values) if values else None
            found[f"{name}_error"] = steps_error(values)
        return found


def steps_error(seconds: list[float]) -> float | None:
    """The sd of the steps' median, from the medians of stretches where there are enough steps.

    What slows the machine slows neighbours together: the scatter of single steps would say too little.
    """
    length = len(seconds) // STRETCHES
    if length < 2:
        return median_error(seconds)
    return median_error([median(seconds[k * length : (k + 1) * length]) for k in range(STRETCHES)])


class StepTimer:
    """seconds()[k] = time from mark k to mark k + 1: by the clock on CPU, by the stream on CUDA (synchronised once).

    cpu_seconds() are of this thread, where this thread alone works. Other programs do not lengthen them. Else there are
    none.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._alone = not self._cuda and torch.get_num_threads() == 1
        self._marks: list = []
        self._cpu_marks: list[float] = []

    def mark(self) -> None:
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())
        if self._alone:
            self._cpu_marks.append(time.thread_time())

    def seconds(self) -> list[float]:
        if not self._cuda:
            return [end - start for start, end in pairwise(self._marks)]
        torch.cuda.synchronize()
        return [start.elapsed_time(end) / 1000 for start, end in pairwise(self._marks)]

    def cpu_seconds(self) -> list[float]:
        return [end - start for start, end in pairwise(self._cpu_marks)]


def threads_wait(seconds: Sequence[float], threads: int) -> str | None:
    """One line where a CPU's steps look as if its threads waited for each other; None where they do not.

    OpenMP's threads wait for the slowest one at each operation, and spin meanwhile. Where something else has its core,
    an operation of microseconds takes a time slice. WRN-16-1 on digits, 2 cores with 10 other processes: 70 ms a step
    on one thread, where a tenth of the steps exceeds the shortest 1.2 to 1.5 times; on two 1,300 to 4,400 ms, and 7 to
    20 times.
    """
    ordered = sorted(seconds)
    if threads == 1 or len(ordered) < LEAST_STEPS or ordered[len(ordered) * 9 // 10] < MOST_SWING * ordered[0]:
        return None
    return (
        f"steps take from {1e3 * min(seconds):.0f} to {1e3 * max(seconds):.0f} ms: the {threads} threads wait for each"
        " other while other programs have the cores; --threads 1 may be many times faster"
    )


def transitions_measured(transitions: list[dict], phases: list[Phase]) -> list[dict]:
    """Each transition, with seconds per step (median) and peak bytes in the phases before and after it."""
    rows = []
    for transition in transitions:
        # A transition opens the phase of its step, unless it came with the last step of the run.
        k = next((k for k, phase in enumerate(phases) if phase.first_step == transition["step"]), len(phases))
        row = dict(transition)
        for side, phase in (("before", phases[max(k - 1, 0)]), ("after", phases[k] if k < len(phases) else None)):
            row[f"seconds_per_step_{side}"] = phase.seconds_per_step if phase else None
            row[f"memory_bytes_{side}"] = phase.memory if phase else None
        rows.append(row)
    return rows


def conditions(device: torch.device) -> dict:
    """Where and with what numbers were measured."""
    found = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "freezeout_ext": version(),
        "commit": _commit(),
    }
    if device.type == "cpu":
        found |= {"malloc": malloc_in_use()}
    if device.type == "cuda":
        found |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    return found


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _commit() -> str | None:
    """The commit of the checkout that holds this package, "+" where it has changes; None where it is no checkout."""
    root = Path(__file__).resolve().parents[2]

    def git(*args: str) -> str:
        return subprocess.run(
            ("git", "-C", str(root), *args), capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")) != root:
            return None
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None
