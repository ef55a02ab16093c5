"""The build: which nvcc, which build folder, what a failure says, and what the built module is."""

import ast
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from setuptools.errors import SetupError

from freezeout_ext import native

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def setup_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("freezeout_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def program(path: Path, script: str = "exit 0") -> str:
    """Writes an executable shell script and returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def test_nvcc_is_looked_for_in_order(setup_script: ModuleType, tmp_path: Path) -> None:
    environ = {
        "CUDACXX": program(tmp_path / "named" / "nvcc"),
        "CUDA_HOME": str(tmp_path / "home"),
        "CUDA_PATH": str(tmp_path / "path"),
        "PATH": str(tmp_path / "bin"),
    }
    default = tmp_path / "default"
    expected = [
        environ["CUDACXX"],
        program(tmp_path / "home" / "bin" / "nvcc"),
        program(tmp_path / "path" / "bin" / "nvcc"),
        program(tmp_path / "bin" / "nvcc"),
        program(default / "bin" / "nvcc"),
    ]
    found = []
    for name in (*environ, "nothing"):
        found.append(setup_script.find_nvcc(environ, default))
        environ.pop(name, None)
    assert found == expected
    assert setup_script.find_nvcc({}, tmp_path / "empty") is None


def test_a_cuda_home_without_nvcc_does_not_end_the_search(setup_script: ModuleType, tmp_path: Path) -> None:
    nvcc = program(tmp_path / "bin" / "nvcc")
    environ = {"CUDA_HOME": str(tmp_path / "runtime-only"), "PATH": str(tmp_path / "bin")}
    assert setup_script.find_nvcc(environ, tmp_path / "empty") == nvcc


def test_freezeout_cuda(setup_script: ModuleType, tmp_path: Path) -> None:
    nvcc = program(tmp_path / "bin" / "nvcc")
    here, nowhere = {"PATH": str(tmp_path / "bin")}, {"PATH": ""}

    def choose(environ: dict[str, str], wanted: str) -> str | None:
        return setup_script.choose_nvcc({**environ, "FREEZEOUT_CUDA": wanted}, tmp_path / "empty")

    assert [choose(here, wanted) for wanted in ("auto", "", "1", "0")] == [nvcc, nvcc, nvcc, None]
    assert choose(nowhere, "auto") is None
    with pytest.raises(SetupError, match=r"FREEZEOUT_CUDA=1, but no nvcc was found .*FREEZEOUT_CUDA=0"):
        choose(nowhere, "1")
    with pytest.raises(SetupError, match="FREEZEOUT_CUDA must be auto, 1 or 0, got 'yes'"):
        choose(here, "yes")
    with pytest.raises(SetupError, match=r"CUDACXX must name an executable nvcc, got 'garbage'.*FREEZEOUT_CUDA=0"):
        choose({**here, "CUDACXX": "garbage"}, "auto")
    assert choose({**here, "CUDACXX": "garbage"}, "0") is None


def test_tools_come_from_their_package_or_from_path(
    setup_script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packaged, on_path = program(tmp_path / "package" / "ninja"), program(tmp_path / "bin" / "ninja")
    package = ModuleType("ninja")
    package.BIN_DIR = str(tmp_path / "package")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setitem(sys.modules, "ninja", package)
    assert setup_script.find_tool("ninja", "BIN_DIR") == packaged
    monkeypatch.setitem(sys.modules, "ninja", None)  # as if it were not installed
    assert setup_script.find_tool("ninja", "BIN_DIR") == on_path
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SetupError, match="ninja was found neither as a Python package nor on PATH"):
        setup_script.find_tool("ninja", "BIN_DIR")


def test_a_build_folder_is_wiped_when_its_stamp_differs(setup_script: ModuleType, tmp_path: Path) -> None:
    folder = tmp_path / "build"
    assert setup_script.prepare_build_folder(folder, "one")
    (folder / "CMakeCache.txt").touch()
    assert setup_script.prepare_build_folder(folder, "one"), "a configure that failed leaves no stamp"
    assert not (folder / "CMakeCache.txt").exists()

    (folder / "configured.json").write_text("one")
    (folder / "CMakeCache.txt").touch()
    assert not setup_script.prepare_build_folder(folder, "one")
    assert (folder / "CMakeCache.txt").exists()
    assert setup_script.prepare_build_folder(folder, "two")
    assert not (folder / "CMakeCache.txt").exists()


def test_an_nvcc_that_fails_is_an_error_not_a_cpu_build(tmp_path: Path) -> None:
    for name in ("setup.py", "pyproject.toml", "CMakeLists.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    (tmp_path / "freezeout_ext").mkdir()
    (tmp_path / "freezeout_ext" / "__init__.py").touch()
    nvcc = program(tmp_path / "broken" / "nvcc", "echo this nvcc is broken >&2; exit 1")
    run = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
        cwd=tmp_path,
        env={**os.environ, "CUDACXX": nvcc, "FREEZEOUT_CUDA": "auto"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode != 0
    assert re.search(rf"CMake failed with status .*nvcc: {nvcc}; FREEZEOUT_CUDA=0 builds for the CPU only", run.stderr)
    assert not list(tmp_path.rglob("*.so"))


def test_every_source_is_listed_in_cmake_and_none_includes_torch() -> None:
    listed = set(re.findall(r"csrc/\S+", (ROOT / "CMakeLists.txt").read_text()))
    sources = {path for path in (ROOT / "csrc").iterdir() if path.suffix in (".cpp", ".cu")}
    assert listed == {f"csrc/{path.name}" for path in sources}
    included = [re.findall(r'#include [<"](.*?)/', path.read_text()) for path in (ROOT / "csrc").iterdir()]
    assert not {"torch", "ATen", "c10"} & {folder for folders in included for folder in folders}


def stub_of_the_module() -> dict[str, list[str] | None]:
    """name or Class.name -> parameters' names as the stub has them, None for a property."""
    found = {}
    for node in ast.parse((ROOT / "freezeout_ext" / "_C.pyi").read_text()).body:
        if not isinstance(node, ast.FunctionDef | ast.ClassDef):
            continue
        prefix = f"{node.name}." if isinstance(node, ast.ClassDef) else ""
        for function in node.body if prefix else [node]:
            names = [argument.arg for argument in (*function.args.args, *function.args.kwonlyargs)]
            found[prefix + function.name] = None if function.decorator_list else names
    return found


def signature(function: object) -> list[str]:
    """Parameters' names, out of the line that pybind11 puts first in a docstring."""
    inner = function.__doc__.splitlines()[0].split("(", 1)[1].rpartition(") ->")[0]
    return re.findall(r"(?:^|, )(\w+): ", re.sub(r"\[[^\[\]]*\]|\{[^{}]*\}", "", re.sub(r"\[[^\[\]]*\]", "", inner)))


def test_the_stub_says_what_the_module_holds() -> None:
    found = {}
    for name, value in vars(native.C).items():
        if isinstance(value, type):
            for member, inner in vars(value).items():
                if member == "__init__" or not member.startswith("_"):
                    found[f"{name}.{member}"] = None if isinstance(inner, property) else signature(inner)
        elif not name.startswith("_"):
            found[name] = signature(value)
    assert found == stub_of_the_module()


def libraries_after(code: str, pattern: str) -> set[str]:
    """The mapped libraries, whose names match, of a new process that runs `code`."""
    code += "\nprint(open('/proc/self/maps').read())"
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    return {path for path in re.findall(r"(/\S+)$", run.stdout, re.MULTILINE) if re.search(pattern, Path(path).name)}


def test_the_process_holds_one_openmp_runtime() -> None:
    step = """
import torch, freezeout_ext
parameters = [torch.ones(100_000, requires_grad=True) for _ in range(2)]
sum((p ** 2).sum() for p in parameters).backward()
optimizer = freezeout_ext.FusedSGD(parameters, lr=0.1, momentum=0.9)
optimizer.step()
assert freezeout_ext.native.C is not None
"""
    runtimes = libraries_after(step, r"lib(gomp|omp|iomp5)")
    assert len(runtimes) == 1, runtimes
    assert native.build_info()["openmp"]


def test_the_module_loads_without_torch_and_without_a_driver() -> None:
    code = f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location("freezeout_ext._C", {native.build_info()["module"]!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
assert module.build_info()["version"] and "torch" not in sys.modules
"""
    assert not libraries_after(code, r"^lib(cuda|cudart|torch|c10)\b"), "it links none of them"
