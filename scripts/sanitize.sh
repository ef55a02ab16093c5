#!/bin/sh
# Builds the CPU half with AddressSanitizer and UBSan below build/sanitize and runs its tests on that build.
set -eu
cd "$(dirname "$0")/.."
PYTHON="${PYTHON:-.venv/bin/python}"
mkdir -p build/sanitize
# Not by CMake, whose -O3 makes the compiler ten times slower here; the code is the same. As there, what includes
# pybind11 is one translation unit.
grep -lE 'PYBIND11|py::' csrc/*.cpp | sed 's|.*|#include "../../&"|' >build/sanitize/pybind11_users.cpp
"${CXX:-g++}" -std=c++17 -O1 -g -ffp-contract=off -fno-math-errno -fopenmp -fPIC -shared -fvisibility=hidden \
  -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer \
  -DFREEZEOUT_VERSION='"sanitized"' -DFREEZEOUT_BUILD_TYPE='"Debug"' \
  $("$PYTHON" -m pybind11 --includes) build/sanitize/pybind11_users.cpp $(grep -LE 'PYBIND11|py::' csrc/*.cpp) -o build/sanitize/_C.so

# The interpreter itself is not instrumented: the runtime comes first, libstdc++ with it for its exceptions. Python's
# own allocations at exit are no leaks of ours.
LD_PRELOAD="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libstdc++.so)" \
ASAN_OPTIONS=detect_leaks=0 OMP_NUM_THREADS=1 PYTHONMALLOC=malloc "$PYTHON" scripts/pytest_with_module.py \
  build/sanitize/_C.so "$@"
