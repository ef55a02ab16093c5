"""Runs kernel_cases.py in a process of its own for each backend: Triton reads TRITON_INTERPRET when it is imported."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch

BACKENDS = ["interpreter", "cuda"]


def why_not(backend: str) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if backend == "cuda":
        return None if torch.cuda.is_available() else "no GPU"
    from importlib.metadata import version

    # Its loop bounds are arrays of one element, which NumPy 2.4 no longer turns into integers.
    if (
        tuple(map(int, version("triton").split(".")[:2])) < (3, 7)
        and numpy.lib.NumpyVersion(numpy.__version__) >= "2.4.0"
    ):
        return f"the interpreter of Triton {version('triton')} needs numpy < 2.4"
    return None


@pytest.mark.parametrize("backend", BACKENDS)
def test_kernels(backend: str) -> None:
    if reason := why_not(backend):
        pytest.skip(reason)
    environment = {**os.environ, "TRITON_INTERPRET": "1" if backend == "interpreter" else "0", "OMP_NUM_THREADS": "1"}
    cases = Path(__file__).with_name("kernel_cases.py")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(cases)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    # All of them ran: the interpreter skips only what needs a capture.
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) >= 100, done.stdout
