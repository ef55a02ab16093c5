"""native: what was compiled, and why the CUDA half or the whole module cannot run."""

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from freezeout_ext import native


def test_build_info_tells_what_was_compiled() -> None:
    info = native.build_info()
    stated = re.search(r'^version = "(.*)"$', (Path(__file__).parents[1] / "pyproject.toml").read_text(), re.MULTILINE)
    assert info["version"] == stated[1] == native.version()
    assert re.fullmatch(r"(gcc|clang) \d+\..*", info["compiler"])
    assert info["build_type"] == "Release"
    assert info["openmp"] is True
    assert Path(info["module"]).is_file()
    assert "error" not in info and native.import_error is None
    if info["cuda"]:
        assert re.fullmatch(r"\d+\.\d+", info["cuda_version"])
        assert info["cuda_architectures"]  # `make` compiles one of them, `pip install .` all major ones
        assert all(re.fullmatch(r"sm_\d+", name) for name in info["cuda_architectures"])
    else:
        assert info["cuda_version"] is None and info["cuda_architectures"] == []


class Unloadable:
    """Makes the import of freezeout_ext._C fail as a missing symbol does."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name == "freezeout_ext._C":
            raise ImportError("undefined symbol: GOMP_parallel")


def native_without_module() -> ModuleType:
    """A second copy of the module, imported while _C cannot be."""
    spec = importlib.util.spec_from_file_location("native_without_module", native.__file__)
    copy = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copy)
    return copy


@pytest.mark.parametrize("missing", [True, False], ids=["not compiled", "does not load"])
def test_a_missing_module_is_explained(missing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if missing:
        monkeypatch.setitem(sys.modules, "freezeout_ext._C", None)
        reason = "freezeout_ext._C was not compiled for this Python; install the package with pip"
    else:
        monkeypatch.delitem(sys.modules, "freezeout_ext._C")
        monkeypatch.setattr(sys, "meta_path", [Unloadable(), *sys.meta_path])
        reason = "freezeout_ext._C does not load: undefined symbol: GOMP_parallel"
    copy = native_without_module()
    assert copy.C is None
    assert copy.build_info()["error"] == copy.import_error == copy.cuda_unavailable_reason() == reason
    assert copy.build_info().keys() == {*native.build_info(), "error"}
    assert copy.build_info()["version"] == native.version() and copy.build_info()["cuda"] is False


CUDA_BUILD = {"cuda": True, "cuda_version": "13.0", "cuda_architectures": ["sm_75", "sm_80", "sm_90"]}


@pytest.mark.parametrize(
    ("build", "versions", "torch_cuda", "available", "capability", "reason"),
    [
        ({"cuda": False}, (0, 0), "12.8", True, (8, 0), r"built without CUDA; .* FREEZEOUT_CUDA=1"),
        (CUDA_BUILD, (13000, 13000), None, False, (8, 0), r"torch .* is not a CUDA build"),
        (CUDA_BUILD, (0, 13000), "12.8", False, (8, 0), r"with CUDA 13\.0, but the NVIDIA driver is missing"),
        (CUDA_BUILD, (12080, 13000), "12.8", True, (8, 0), r"CUDA 13\.0, but the NVIDIA driver serves CUDA 12\.8"),
        (CUDA_BUILD, (13000, 13000), "13.0", False, (8, 0), "torch sees no CUDA device"),
        (CUDA_BUILD, (13000, 13000), "13.0", True, (7, 0), "built for sm_75 and newer, the device is sm_70"),
        (CUDA_BUILD, (13000, 13020), "13.0", True, (7, 5), None),
        (CUDA_BUILD, (14000, 13000), "13.0", True, (12, 0), None),
    ],
)
def test_cuda_unavailable_reason(
    build: dict,
    versions: tuple[int, int],
    torch_cuda: str | None,
    available: bool,
    capability: tuple[int, int],
    reason: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = SimpleNamespace(build_info=lambda: build, cuda_versions=lambda: versions)
    monkeypatch.setattr(native, "C", module)
    monkeypatch.setattr(torch.version, "cuda", torch_cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    found = native.cuda_unavailable_reason()
    assert found is None if reason is None else re.search(reason, found)
