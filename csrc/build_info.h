// What was compiled, and with what.
#pragma once

#include <pybind11/pybind11.h>

namespace freezeout {

// version, compiler, build_type, openmp, cuda, cuda_version, cuda_architectures; see freezeout_ext/_C.pyi.
pybind11::dict build_info();

// (driver, runtime) as CUDA counts versions: 13020 for 13.2.
// driver: 0 where there is no driver.
// Both are 0 in a build without CUDA.
pybind11::tuple cuda_versions();

}  // namespace freezeout
