#include "affine_relu.h"

#include <cstdint>
#include <string>

#include "affine_relu_cpu.h"

namespace freezeout {
namespace {

namespace py = pybind11;

void affine_relu(uintptr_t x, uintptr_t y, uintptr_t scale, uintptr_t shift, int64_t rows, int64_t channels,
                 int64_t x_stride, int64_t y_stride, bool relu, const std::string& dtype, int threads) {
  if (rows < 0 || channels < 0) {
    throw py::value_error("rows and channels must be >= 0, got " + std::to_string(rows) + " and " +
                          std::to_string(channels));
  }
  if (x_stride < channels || y_stride < channels) {
    throw py::value_error("x_stride and y_stride must be >= channels=" + std::to_string(channels) + ", got " +
                          std::to_string(x_stride) + " and " + std::to_string(y_stride));
  }
  if (dtype != "float32" && dtype != "bfloat16") {
    throw py::value_error("dtype must be float32 or bfloat16, got " + dtype);
  }
  const AffineSlices slices{reinterpret_cast<const void*>(x),
                            reinterpret_cast<void*>(y),
                            reinterpret_cast<const float*>(scale),
                            reinterpret_cast<const float*>(shift),
                            rows,
                            channels,
                            x_stride,
                            y_stride,
                            relu};
  py::gil_scoped_release release;
  affine_relu_cpu(slices, dtype == "float32" ? Storage::kFloat32 : Storage::kBFloat16, threads);
}

}  // namespace

void bind_affine_relu(py::module_& module) {
  module.def("affine_relu", &affine_relu, py::arg("x"), py::arg("y"), py::arg("scale"), py::arg("shift"), py::kw_only(),
             py::arg("rows"), py::arg("channels"), py::arg("x_stride"), py::arg("y_stride"), py::arg("relu"),
             py::arg("dtype"), py::arg("threads"));
}

}  // namespace freezeout
