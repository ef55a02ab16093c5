// freezeout_ext._C.affine_relu: the Python face of affine_relu_cpu.
#pragma once

#include <pybind11/pybind11.h>

namespace freezeout {

void bind_affine_relu(pybind11::module_& module);

}  // namespace freezeout
