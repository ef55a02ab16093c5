"""One thread, fixed seeds, deterministic kernels; markers whose skips say why.

FREEZEOUT_TESTS_CUDA=simulated gives torch a CUDA device where there is none, FREEZEOUT_TESTS_DEVICE=cuda puts tensors
that say nothing else on the GPU, FREEZEOUT_TESTS_FILL=0 leaves new memory unwritten.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS asks for to be deterministic

import random
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch

SIMULATED = os.environ.get("FREEZEOUT_TESTS_CUDA") == "simulated"
if SIMULATED:
    import host_module

    host_module.load("freezeout_ext._C")  # before the package looks for its own

    import simulated_cuda

    simulated_cuda.install()

from freezeout_ext.native import cuda_unavailable_reason  # noqa: E402

# Where tensors are that say nothing else.
DEVICE = os.environ.get("FREEZEOUT_TESTS_DEVICE", "cpu")
if DEVICE != "cpu":
    torch.set_default_device(DEVICE)

torch.set_num_threads(1)
torch.use_deterministic_algorithms(True)  # also fills new memory with NaN
# For compute-sanitizer's initcheck, which is to see what nobody wrote.
torch.utils.deterministic.fill_uninitialized_memory = os.environ.get("FREEZEOUT_TESTS_FILL") != "0"
# No deadline: a busy machine is no failure. No database: a run depends on the tree alone.
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("repeatable")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "cuda: needs a CUDA device")
    config.addinivalue_line("markers", "native_cuda: needs the compiled CUDA half and a device that it runs on")
    config.addinivalue_line("markers", "hardware: of those, needs machine code, or its speed")
    config.addinivalue_line("markers", "only_cpu: asks for what is different with tensors on a GPU")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reasons = {
        "cuda": None if torch.cuda.is_available() else "torch sees no CUDA device",
        "native_cuda": cuda_unavailable_reason(),
        "only_cpu": None if DEVICE == "cpu" else f"tensors are on {DEVICE}",
        "hardware": "the CUDA device is simulated" if SIMULATED else None,
    }
    for item in items:
        for marker, reason in reasons.items():
            if reason and item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def seeded() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def digits() -> Any:
    """The first 96 training and 100 test images."""
    from test_training_run import small

    return small("digits")


@pytest.fixture(scope="session")
def whole_run(tmp_path_factory: pytest.TempPathFactory, digits: Any) -> tuple[Path, dict]:
    """test_training_run.CONFIG trained without a stop: (folder, result)."""
    from test_training_run import CONFIG, run

    out = tmp_path_factory.mktemp("run") / "whole"
    return out, run(CONFIG, out, digits)


@pytest.fixture
def exact_square_roots(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's are MKL's, which round the last place of 0.6 % of all values otherwise; IEEE 754 says how."""

    def sqrt(t: torch.Tensor) -> torch.Tensor:
        wide = t if t.dtype in (torch.float32, torch.float64) else t.float()
        return torch.from_numpy(np.asarray(np.sqrt(wide.detach().numpy()))).to(t.dtype)

    monkeypatch.setattr(torch.Tensor, "sqrt", sqrt)
