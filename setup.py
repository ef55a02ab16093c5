"""Builds `freezeout_ext._C`: finds the tools, runs CMake, copies the module to where setuptools wants it.

Compiler flags, sources and GPU architectures are in CMakeLists.txt; metadata is in pyproject.toml.
"""

import importlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import SetupError

ROOT = Path(__file__).resolve().parent
CUDA_DEFAULT = Path("/usr/local/cuda")
CPU_ONLY_HINT = "FREEZEOUT_CUDA=0 builds for the CPU only"
# What CMake reads by itself; a change of one needs a fresh configure as much as a changed argument does.
CMAKE_ENVIRONMENT = ("CXX", "CXXFLAGS", "LDFLAGS", "CUDAARCHS", "CUDAFLAGS", "CUDAHOSTCXX")


def find_nvcc(environ: Mapping[str, str], default: Path = CUDA_DEFAULT) -> str | None:
    """The first nvcc of: CUDACXX, CUDA_HOME, CUDA_PATH, PATH, the default folder; None if there is none."""
    if environ.get("CUDACXX"):
        named = shutil.which(environ["CUDACXX"], path=environ.get("PATH"))
        if named is None:
            raise SetupError(f"CUDACXX must name an executable nvcc, got {environ['CUDACXX']!r}; {CPU_ONLY_HINT}")
        return named
    folders = [str(Path(environ[name], "bin")) for name in ("CUDA_HOME", "CUDA_PATH") if environ.get(name)]
    folders += [environ.get("PATH", ""), str(default / "bin")]
    return shutil.which("nvcc", path=os.pathsep.join(folders))


def choose_nvcc(environ: Mapping[str, str], default: Path = CUDA_DEFAULT) -> str | None:
    """The nvcc to build with, or None for a CPU build, as FREEZEOUT_CUDA=auto|1|0 says."""
    wanted = environ.get("FREEZEOUT_CUDA") or "auto"
    if wanted not in ("auto", "1", "0"):
        raise SetupError(f"FREEZEOUT_CUDA must be auto, 1 or 0, got {wanted!r}")
    if wanted == "0":
        return None
    nvcc = find_nvcc(environ, default)
    if nvcc is None and wanted == "1":
        raise SetupError(
            "FREEZEOUT_CUDA=1, but no nvcc was found by CUDACXX, CUDA_HOME, CUDA_PATH, on PATH "
            f"or in {default / 'bin'}; {CPU_ONLY_HINT}"
        )
    return nvcc


def find_tool(name: str, folder_attribute: str) -> str:
    """The program of the Python package `name` if it is installed, else the one on PATH."""
    try:
        folder = getattr(importlib.import_module(name), folder_attribute)
    except (ImportError, AttributeError):
        folder = ""
    program = shutil.which(name, path=folder) or shutil.which(name)
    if program is None:
        raise SetupError(f"{name} was found neither as a Python package nor on PATH; try: pip install {name}")
    return program


def find_pybind11() -> list[str]:
    """The argument that names the pybind11 package's CMake folder; none leaves the search to CMake."""
    try:
        return [f"-Dpybind11_DIR={importlib.import_module('pybind11').get_cmake_dir()}"]
    except ImportError:
        return []


def configure_command(nvcc: str | None, version: str, output: Path) -> list[str]:
    """The whole CMake command line but for the folders."""
    command = [
        find_tool("cmake", "CMAKE_BIN_DIR"),
        "-GNinja",
        f"-DCMAKE_MAKE_PROGRAM={find_tool('ninja', 'BIN_DIR')}",
        f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={output}",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-DFREEZEOUT_VERSION={version}",
        f"-DFREEZEOUT_CUDA={'ON' if nvcc else 'OFF'}",
        *find_pybind11(),
    ]
    return [*command, f"-DCMAKE_CUDA_COMPILER={nvcc}"] if nvcc else command


def prepare_build_folder(folder: Path, stamp: str) -> bool:
    """Wipes `folder` unless it was configured under the same `stamp`; True if it has to be configured.

    pip's isolated build deletes its cmake, ninja and pybind11 afterwards: a build folder that names them is dead.
    """
    stamp_file = folder / "configured.json"
    if stamp_file.exists() and stamp_file.read_text() == stamp:
        return False
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return True


class BuildWithCMake(build_ext):
    """Builds the one extension with CMake, in a folder of its own for each Python."""

    def build_extension(self, ext: Extension) -> None:
        folder = ROOT / "build" / f"cmake-{sysconfig.get_config_var('SOABI')}"
        output = folder / "output"
        nvcc = choose_nvcc(os.environ)
        print(f"freezeout_ext: building with CUDA, {nvcc}" if nvcc else "freezeout_ext: building for the CPU only")
        command = configure_command(nvcc, self.distribution.get_version(), output)
        environment = {name: os.environ.get(name) for name in CMAKE_ENVIRONMENT}
        stamp = json.dumps({"command": command, "environment": environment}, indent=1)
        try:
            if prepare_build_folder(folder, stamp):
                subprocess.run([*command, "-S", str(ROOT), "-B", str(folder)], check=True)
                (folder / "configured.json").write_text(stamp)
            subprocess.run([command[0], "--build", str(folder)], check=True)
        except subprocess.CalledProcessError as error:
            hint = f" (nvcc: {nvcc}; {CPU_ONLY_HINT})" if nvcc else ""
            raise SetupError(f"CMake failed with status {error.returncode}, see its messages above{hint}") from None
        built = Path(self.get_ext_fullpath(ext.name))
        built.parent.mkdir(parents=True, exist_ok=True)
        # By rename: a process that has the old module mapped must keep it whole.
        copy = built.with_name(f"{built.name}.new")
        shutil.copy2(output / built.name, copy)
        os.replace(copy, built)


if __name__ == "__main__":
    setup(ext_modules=[Extension("freezeout_ext._C", sources=[])], cmdclass={"build_ext": BuildWithCMake})
