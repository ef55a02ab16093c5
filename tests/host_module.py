"""freezeout_ext._C with its CUDA half on the host: the product's own sources, host_kernel.cpp for the .cu files."""

import ctypes
import hashlib
import importlib.util
import os
import subprocess
import sys
import sysconfig
from functools import cache
from pathlib import Path
from types import ModuleType

import pybind11
import torch  # noqa: F401  its OpenMP runtime first

ROOT = Path(__file__).resolve().parents[1]


@cache
def library() -> Path:
    """The compiled module's path; compiled anew when a source changes, half a minute."""
    sources = [*sorted((ROOT / "csrc").glob("*.cpp")), Path(__file__).with_name("host_kernel.cpp")]
    read = [*sources, *sorted((ROOT / "csrc").glob("*.h"))]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in read)).hexdigest()[:16]
    folder = ROOT / "build" / f"host-module-{sysconfig.get_config_var('SOABI')}-{digest}"
    if not (folder / "_C.so").exists():
        folder.mkdir(parents=True, exist_ok=True)
        unity = folder / "all.cpp"
        unity.write_text("".join(f'#include "{path}"\n' for path in sources if "fused_update_cpu" not in path.name))
        includes = [f"-I{sysconfig.get_path('include')}", f"-I{pybind11.get_include()}"]
        # A namespace of its own: the module's classes beside those of the installed one, in one process.
        flags = ["-std=c++17", "-O1", "-fopenmp", "-fPIC", "-shared", "-fvisibility=hidden"]
        flags += ["-ffp-contract=off", "-fno-math-errno"]
        defines = ["-Dfreezeout=freezeout_on_the_host", "-DFREEZEOUT_WITH_CUDA", '-DFREEZEOUT_VERSION="0"']
        defines += ['-DFREEZEOUT_BUILD_TYPE="Tests"']
        built = folder / f"_C.{os.getpid()}.so"
        command = [os.environ.get("CXX", "g++"), *flags, *defines, *includes, str(unity)]
        subprocess.run([*command, str(ROOT / "csrc" / "fused_update_cpu.cpp"), "-o", str(built)], check=True)
        built.replace(folder / "_C.so")
    return folder / "_C.so"


@cache
def load(name: str = "host_module._C") -> ModuleType:
    """The module, in sys.modules under `name`."""
    spec = importlib.util.spec_from_file_location(name, library())
    assert spec is not None and spec.loader is not None
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@cache
def kernel() -> ctypes.CDLL:
    """freezeout_record, freezeout_run and freezeout_launches of host_kernel.cpp."""
    loaded = ctypes.CDLL(str(library()))
    loaded.freezeout_run.argtypes = [ctypes.c_int64]
    return loaded


Recorder = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int64, ctypes.c_int, ctypes.c_size_t)
RUN_NOW, RECORDED, NO_DEVICE, FAILS = range(4)
