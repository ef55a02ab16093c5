// What nvcc and the CUDA runtime say of themselves.
#include "build_info_cuda.h"

#include <cuda_runtime_api.h>

namespace freezeout {

std::vector<int> cuda_architectures() { return {__CUDA_ARCH_LIST__}; }

int cuda_compiled_version() { return CUDART_VERSION; }

int cuda_driver_version() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

}  // namespace freezeout
