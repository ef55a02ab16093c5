// The Python module freezeout_ext._C. Arguments are checked before any address is read.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>

#include "affine_relu.h"
#include "build_info.h"
#include "half_types.h"
#include "prepared_step.h"
#include "tensor_batch.h"

namespace py = pybind11;

namespace freezeout {
namespace {

template <class T>
void run_affine_relu(std::uintptr_t x, std::uintptr_t y, std::uintptr_t scale, std::uintptr_t shift, std::int64_t rows,
                     std::int64_t channels, std::int64_t x_stride, std::int64_t y_stride, bool relu, int threads) {
  const AffineSlices<T> slices{reinterpret_cast<const T*>(x),
                               reinterpret_cast<T*>(y),
                               reinterpret_cast<const float*>(scale),
                               reinterpret_cast<const float*>(shift),
                               rows,
                               channels,
                               x_stride,
                               y_stride,
                               relu};
  const py::gil_scoped_release release;
  affine_relu(slices, threads);
}

void checked_affine_relu(std::uintptr_t x, std::uintptr_t y, std::uintptr_t scale, std::uintptr_t shift,
                         std::int64_t rows, std::int64_t channels, std::int64_t x_stride, std::int64_t y_stride,
                         bool relu, const std::string& dtype, int threads) {
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
  if (rows == 0 || channels == 0) return;
  if (!x || !y || !scale || !shift) throw py::value_error("x, y, scale and shift must be addresses, got a null one");
  const auto run = dtype == "float32" ? run_affine_relu<float> : run_affine_relu<BFloat16>;
  run(x, y, scale, shift, rows, channels, x_stride, y_stride, relu, threads);
}

}  // namespace
}  // namespace freezeout

PYBIND11_MODULE(_C, module) {
  using namespace freezeout;
  module.doc() = "The compiled half of freezeout_ext; knows no torch.";
  module.def("build_info", &build_info);
  module.def("cuda_versions", &cuda_versions);
  module.def("affine_relu", &checked_affine_relu, py::arg("x"), py::arg("y"), py::arg("scale"), py::arg("shift"),
             py::kw_only(), py::arg("rows"), py::arg("channels"), py::arg("x_stride"), py::arg("y_stride"),
             py::arg("relu"), py::arg("dtype"), py::arg("threads"));
  module.def("cpu_isas", &cpu_isas);
  module.def("cpu_isa", &cpu_isa);
  module.def("use_cpu_isa", &use_cpu_isa, py::arg("name"));
  py::class_<TensorReader, std::shared_ptr<TensorReader>>(module, "TensorReader",
                                                          "Reads where a tensor's elements are.")
      .def(py::init<py::type, py::type, py::dict, py::function, bool>(), py::arg("tensor_type"),
           py::arg("parameter_type"), py::arg("dtypes"), py::arg("increment_version"), py::kw_only(),
           py::arg("exchange"))
      .def_property_readonly("exchanges", &TensorReader::exchanges);
  py::class_<TensorBatch, std::shared_ptr<TensorBatch>>(module, "TensorBatch",
                                                        "Tensors of one dtype on one device, and the update of them.")
      .def(py::init(&make_tensor_batch), py::kw_only(), py::arg("formula"), py::arg("dtype"), py::arg("device_type"),
           py::arg("device_index"), py::arg("work"), py::arg("groups"))
      .def_readonly("device_type", &TensorBatch::device_type)
      .def_readonly("device_index", &TensorBatch::device_index)
      .def("table", &TensorBatch::table)
      .def("set_table", &TensorBatch::set_table, py::arg("address"), py::arg("stream"))
      .def("run", &TensorBatch::run_addresses, py::kw_only(), py::arg("num_threads"), py::arg("schedule_step"),
           py::arg("grad_scale"), py::arg("found_inf"));
  py::class_<PreparedStep>(module, "PreparedStep", "What an optimizer prepares once and checks at every step.")
      .def(py::init<std::shared_ptr<TensorReader>, int, const py::list&, const py::dict&, const py::list&,
                    const py::object&>(),
           py::arg("reader").none(false), py::kw_only(), py::arg("formula"), py::arg("groups"), py::arg("state"),
           py::arg("native"), py::arg("schedule"))
      .def("run", &PreparedStep::run, py::arg("groups"), py::arg("state"), py::arg("num_threads"), py::arg("inputs"))
      .def_property_readonly("batches", &PreparedStep::batches);
}
