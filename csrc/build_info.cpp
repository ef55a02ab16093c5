// build_info and the CUDA versions, as the compilers state them.
#include "build_info.h"

#include <string>

#ifdef FREEZEOUT_WITH_CUDA
#include "build_info_cuda.h"
#endif

namespace freezeout {

namespace {

std::string compiler() {
#if defined(__clang__)
  return std::string("clang ") + __clang_version__;
#elif defined(__GNUC__)
  return std::string("gcc ") + __VERSION__;
#else
  return "unknown";
#endif
}

}  // namespace

pybind11::dict build_info() {
  pybind11::dict info;
  info["version"] = FREEZEOUT_VERSION;
  info["compiler"] = compiler();
  info["build_type"] = FREEZEOUT_BUILD_TYPE;
#ifdef _OPENMP
  info["openmp"] = true;
#else
  info["openmp"] = false;
#endif
  pybind11::list architectures;
#ifdef FREEZEOUT_WITH_CUDA
  info["cuda"] = true;
  const int version = cuda_compiled_version();
  info["cuda_version"] = std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
  for (const int architecture : cuda_architectures()) {
    architectures.append("sm_" + std::to_string(architecture / 10));
  }
#else
  info["cuda"] = false;
  info["cuda_version"] = pybind11::none();
#endif
  info["cuda_architectures"] = architectures;
  return info;
}

pybind11::tuple cuda_versions() {
#ifdef FREEZEOUT_WITH_CUDA
  return pybind11::make_tuple(cuda_driver_version(), cuda_compiled_version());
#else
  return pybind11::make_tuple(0, 0);
#endif
}

}  // namespace freezeout
