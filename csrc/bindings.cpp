// The Python module freezeout_ext._C: unpack, call, turn an error code into an exception.
#include <pybind11/pybind11.h>

#include "affine_relu.h"
#include "build_info.h"
#include "plan.h"
#include "update.h"

PYBIND11_MODULE(_C, module) {
  module.doc() = "The compiled half of freezeout_ext; knows no torch.";
  module.def("build_info", &freezeout::build_info);
  module.def("cuda_versions", &freezeout::cuda_versions);
  freezeout::bind_update(module);
  freezeout::bind_plan(module);
  freezeout::bind_affine_relu(module);
}
