#include "update.h"

#include <pybind11/stl.h>

#include <stdexcept>
#include <string>

namespace py = pybind11;

namespace freezeout {

namespace {

// Tests simulate a device: what they run in place of fused_sgd_cuda. Else null.
PyObject* simulated_cuda = nullptr;

template <class T>
T* pointer(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

DeviceInputs inputs_of(const TensorEntry* table, std::uintptr_t step, std::uintptr_t grad_scale,
                       std::uintptr_t found_inf) {
  return {table, pointer<const std::int64_t>(step), pointer<const float>(grad_scale), pointer<const float>(found_inf)};
}

// (param, momentum_buffer, grad, size, group, first); (lr, milestone, warmup, momentum, 1 - dampening, weight_decay,
// options)
using WorkTuple = std::tuple<std::uintptr_t, std::uintptr_t, std::uintptr_t, std::int64_t, std::uint32_t, bool>;
using RatesTuple = std::tuple<double, double, double, double, double, double, std::uint64_t>;

Update make_update(int dtype, int device_type, int device_index, const std::vector<WorkTuple>& work,
                   const std::vector<RatesTuple>& groups) {
  Update update{static_cast<Dtype>(dtype), device_type, device_index, {}, {}};
  if (dtype < 0 || dtype > static_cast<int>(Dtype::kBFloat16)) {
    throw std::invalid_argument("dtype must be 0 to 3, got " + std::to_string(dtype));
  }
  for (const auto& [lr, milestone, warmup, momentum, undamped, weight_decay, options] : groups) {
    update.groups.push_back({lr, milestone, warmup, momentum, undamped, weight_decay, options});
  }
  for (const auto& [param, buffer, grad, size, group, first] : work) {
    if (group >= update.groups.size()) {
      throw std::invalid_argument("group must be below " + std::to_string(update.groups.size()) + ", got " +
                                  std::to_string(group));
    }
    if ((update.groups[group].options & kMomentum) && !buffer && size) {
      throw std::invalid_argument("momentum_buffer must not be null with momentum (group " + std::to_string(group) +
                                  ")");
    }
    if (!update.work.empty() && group < update.work.back().group) {
      throw std::invalid_argument("groups must ascend, got " + std::to_string(group) + " after " +
                                  std::to_string(update.work.back().group));
    }
    update.work.push_back({pointer<void>(param), pointer<void>(buffer), pointer<void>(grad), size, group, first});
  }
  return update;
}

}  // namespace

py::bytes Update::table() const {
  const std::vector<TensorEntry> table = make_tensor_table(work);
  return py::bytes(reinterpret_cast<const char*>(table.data()), table.size() * sizeof(TensorEntry));
}

void Update::run_cpu(int num_threads, double step, float inverse_scale) const {
  const py::gil_scoped_release release;
  fused_sgd_cpu(dtype, work, groups, num_threads, step, inverse_scale);
}

bool Update::run_cuda([[maybe_unused]] std::uintptr_t table, [[maybe_unused]] std::uintptr_t step,
                      [[maybe_unused]] std::uintptr_t grad_scale, [[maybe_unused]] std::uintptr_t found_inf,
                      [[maybe_unused]] std::uintptr_t stream) const {
  if (simulated_cuda) {
    // A copy of the update: the arguments of a launch are copied when it is made.
    return py::handle(simulated_cuda)(Update(*this), table, step, grad_scale, found_inf, stream).cast<bool>();
  }
#ifdef FREEZEOUT_WITH_CUDA
  return fused_sgd_cuda(dtype, work, groups, inputs_of(pointer<const TensorEntry>(table), step, grad_scale, found_inf),
                        device_index, stream);
#else
  throw std::runtime_error("fused_sgd_cuda: freezeout_ext was compiled without CUDA");
#endif
}

int Update::run_emulated(std::uintptr_t table, std::uintptr_t step, std::uintptr_t grad_scale,
                         std::uintptr_t found_inf) const {
  const std::vector<TensorEntry> made = make_tensor_table(work);
  const TensorEntry* entries = table ? pointer<const TensorEntry>(table) : made.data();
  return fused_sgd_emulated(dtype, work, groups, inputs_of(entries, step, grad_scale, found_inf));
}

void bind_update(py::module_& module) {
  py::class_<Update, std::shared_ptr<Update>>(module, "Update",
                                              "Tensors of one dtype on one device, and what runs over them.")
      .def(py::init(&make_update), py::kw_only(), py::arg("dtype"), py::arg("device_type"), py::arg("device_index"),
           py::arg("work"), py::arg("groups"))
      .def_property_readonly("device_type", [](const Update& update) { return update.device_type; })
      .def_property_readonly("device_index", [](const Update& update) { return update.device_index; })
      .def("table", &Update::table)
      .def("run_cpu", &Update::run_cpu, py::arg("num_threads"), py::arg("step"), py::arg("inverse_scale"))
      .def("run_cuda", &Update::run_cuda, py::arg("table"), py::arg("step"), py::arg("grad_scale"),
           py::arg("found_inf"), py::arg("stream"))
      .def("run_emulated", &Update::run_emulated, py::arg("table"), py::arg("step"), py::arg("grad_scale"),
           py::arg("found_inf"));
  module.def("simulate_cuda", [](py::function run) { simulated_cuda = run.release().ptr(); }, py::arg("run"));
  module.def("cpu_isas", &cpu_isas);
  module.def("cpu_isa", &cpu_isa);
  module.def("use_cpu_isa", &use_cpu_isa, py::arg("name"));
}

}  // namespace freezeout
