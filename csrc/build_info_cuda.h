// The part of build_info that only nvcc knows.
#pragma once

#include <vector>

namespace freezeout {

std::vector<int> cuda_architectures();  // compute capability * 100, ascending: 750, 800, ...
int cuda_compiled_version();            // 13020 for 13.2
int cuda_driver_version();              // the newest CUDA the driver serves; 0 without a driver

}  // namespace freezeout
