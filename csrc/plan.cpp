#include "plan.h"

#include <pybind11/stl.h>

#include <cstring>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>

namespace py = pybind11;

namespace freezeout {

namespace {

PyObject* momentum_key() {
  static PyObject* key = PyUnicode_InternFromString("momentum_buffer");
  return key;
}

// state[p].get("momentum_buffer"), borrowed; null if there is none.
PyObject* buffer_in(PyObject* values) {
  if (!PyDict_Check(values)) return nullptr;
  // As a rule it is the only entry, and under the interned key.
  Py_ssize_t i = 0;
  PyObject* key;
  PyObject* only;
  if (PyDict_Next(values, &i, &key, &only) && key == momentum_key()) return only == Py_None ? nullptr : only;
  PyObject* buffer = PyDict_GetItemWithError(values, momentum_key());
  if (!buffer && PyErr_Occurred()) throw py::error_already_set();
  return buffer == Py_None ? nullptr : buffer;
}

double as_number(PyObject* object) {
  if (PyFloat_CheckExact(object)) return PyFloat_AS_DOUBLE(object);
  const double value = PyFloat_AsDouble(object);
  if (value == -1.0 && PyErr_Occurred()) throw py::error_already_set();
  return value;
}

bool as_bool(PyObject* object) {
  if (object == Py_False) return false;
  if (object == Py_True) return true;
  const int value = PyObject_IsTrue(object);
  if (value < 0) throw py::error_already_set();
  return value != 0;
}

// The dtype's code in the kernels, or -1.
int dtype_of(const dlpack::DataType& dtype) {
  if (dtype.lanes != 1) return -1;
  if (dtype.code == dlpack::kFloatCode && dtype.bits == 32) return static_cast<int>(Dtype::kFloat);
  if (dtype.code == dlpack::kFloatCode && dtype.bits == 64) return static_cast<int>(Dtype::kDouble);
  if (dtype.code == dlpack::kFloatCode && dtype.bits == 16) return static_cast<int>(Dtype::kHalf);
  if (dtype.code == dlpack::kBFloatCode && dtype.bits == 16) return static_cast<int>(Dtype::kBFloat16);
  return -1;
}

}  // namespace

Plan::Plan(std::shared_ptr<TensorReader> reader, py::list groups, py::dict state, py::list native, py::dict fresh,
           py::object schedule)
    : reader_(std::move(reader)) {
  PyObject* param;
  PyObject* values;
  for (Py_ssize_t i = 0; PyDict_Next(state.ptr(), &i, &param, &values);) {
    state_.push_back({param, values, buffer_in(values)});
  }
  if (!schedule.is_none()) {
    for (const py::handle entry : schedule) {
      const auto [peak, milestone, warmup] = entry.cast<std::tuple<double, double, double>>();
      schedule_.push_back({peak, milestone, warmup, 0, 0, 0, 0});
    }
    if (schedule_.size() != groups.size()) {
      throw std::invalid_argument("schedule must have one entry for each of the " + std::to_string(groups.size()) +
                                  " param groups, got " + std::to_string(schedule_.size()));
    }
  }
  for (std::size_t i = 0; i < groups.size(); ++i) {
    add_group(groups[i].ptr(), native[i].cast<py::list>(), fresh, static_cast<int>(i));
  }
  rates_.resize(groups_.size());
}

void Plan::add_group(PyObject* dict, const py::list& native, const py::dict& fresh, int index) {
  static const std::pair<const char*, Role> kRoles[] = {
      {"params", kParams},         {"lr", kLr},
      {"momentum", kMomentumKey},  {"dampening", kDampeningKey},
      {"weight_decay", kDecayKey}, {"nesterov", kNesterovKey},
      {"maximize", kMaximizeKey},  {"differentiable", kDifferentiableKey},
      {"frozen", kFrozenKey}};
  Group group{};
  group.dict = dict;
  PyObject* key;
  PyObject* value;
  for (Py_ssize_t i = 0; PyDict_Next(dict, &i, &key, &value);) {
    Role role = kIgnored;
    for (const auto& [name, named] : kRoles) {
      if (PyUnicode_Check(key) && PyUnicode_CompareWithASCIIString(key, name) == 0) role = named;
    }
    group.keys.push_back(py::reinterpret_borrow<py::object>(key));
    group.roles.push_back(role);
    if (role == kParams) group.params_list = value;
    if (role == kFrozenKey) group.frozen = as_bool(value);
  }
  for (std::size_t i = 0; i < native.size(); ++i) {
    PyObject* param = PyList_GET_ITEM(group.params_list, i);
    group.params.push_back(param);
    group.tensor_of.push_back(native[i].cast<bool>() ? static_cast<int>(tensors_.size()) : -1);
    if (group.tensor_of.back() < 0) continue;
    if (!group.native) {
      group.native = true;
      GroupRates rates{};
      if (const char* changed = read_group(group, dict, &rates)) throw std::invalid_argument(changed);
      group.momentum = rates.options & kMomentum;
    }
    add_tensor(param, group.momentum, fresh, index, static_cast<int>(i));
  }
  groups_.push_back(std::move(group));
}

void Plan::add_tensor(PyObject* param, bool momentum, const py::dict& fresh, int group, int position) {
  const std::string where = "group " + std::to_string(group) + ", parameter " + std::to_string(position);
  Tensor tensor{};
  void* buffer_data = nullptr;
  tensor.param = param;
  tensor.position = position;
  if (!reader_->read(param, tensor.facts)) throw std::invalid_argument(where + ": no address");
  dlpack::Tensor& view = tensor.facts.view;
  std::vector<std::int64_t> owned(view.shape, view.shape + view.ndim);
  owned.insert(owned.end(), view.strides, view.strides + view.ndim);
  tensor.facts.owned = std::move(owned);
  view.shape = tensor.facts.owned.data();
  view.strides = view.shape + view.ndim;

  if (momentum) {
    const py::handle key(param);
    if (fresh.contains(key)) {
      tensor.fresh = true;
      tensor.buffer = fresh[key].ptr();
    } else {
      for (const StateEntry& entry : state_) {
        if (entry.param == param) tensor.buffer = entry.buffer;
      }
    }
  }
  if (tensor.buffer) {
    if (!reader_->read(tensor.buffer, scratch_) || !same_layout(tensor, scratch_)) {
      throw std::invalid_argument(where + ": its momentum_buffer has another layout");
    }
    buffer_data = scratch_.data();
  }

  const int dtype = dtype_of(view.dtype);
  if (dtype < 0) throw std::invalid_argument(where + ": its dtype is not supported");
  std::size_t i = 0;
  while (i < updates_.size() &&
         !(static_cast<int>(updates_[i]->dtype) == dtype && updates_[i]->device_type == view.device.type &&
           updates_[i]->device_index == view.device.index)) {
    ++i;
  }
  if (i == updates_.size()) {
    updates_.push_back(
        std::make_shared<Update>(Update{static_cast<Dtype>(dtype), view.device.type, view.device.index, {}, {}}));
  }
  tensor.update = i;
  tensor.slot = updates_[i]->work.size();
  updates_[i]->work.push_back({tensor.facts.data(), buffer_data, nullptr, tensor.facts.size(),
                               static_cast<std::uint32_t>(group), tensor.fresh});
  tensors_.push_back(std::move(tensor));
}

bool Plan::same_layout(const Tensor& tensor, const TensorFacts& facts) {
  const dlpack::Tensor& a = tensor.facts.view;
  const dlpack::Tensor& b = facts.view;
  if (a.ndim != b.ndim || std::memcmp(&a.dtype, &b.dtype, sizeof(a.dtype)) ||
      std::memcmp(&a.device, &b.device, sizeof(a.device))) {
    return false;
  }
  const std::int64_t* shape = tensor.facts.owned.data();
  const std::int64_t* strides = shape + a.ndim;
  for (int i = 0; i < a.ndim; ++i) {
    // The stride of a dimension of size 1 is arbitrary.
    if (shape[i] != b.shape[i] || (strides[i] != b.strides[i] && shape[i] != 1)) return false;
  }
  return true;
}

const char* Plan::check_state(PyObject* state) const {
  std::size_t count = 0;
  PyObject* param;
  PyObject* values;
  for (Py_ssize_t i = 0; PyDict_Next(state, &i, &param, &values); ++count) {
    if (count == state_.size()) return "a state was added";
    const StateEntry& entry = state_[count];
    if (entry.param != param || entry.values != values || entry.buffer != buffer_in(values))
      return "a state was replaced";
  }
  return count == state_.size() ? nullptr : "a state was removed";
}

const char* Plan::read_group(const Group& group, PyObject* dict, GroupRates* rates_out) const {
  GroupRates rates{};
  double dampening = 0;
  bool nesterov = false;
  bool maximize = false;
  std::size_t count = 0;
  PyObject* key;
  PyObject* value;
  for (Py_ssize_t i = 0; PyDict_Next(dict, &i, &key, &value); ++count) {
    if (count == group.keys.size() || group.keys[count].ptr() != key) return "a group's keys changed";
    const Role role = group.roles[count];
    if (!rates_out && role != kParams && role != kFrozenKey) continue;
    switch (role) {
      case kIgnored:
        break;
      case kParams:
        if (value != group.params_list) return "a group's list of parameters was replaced";
        break;
      case kLr:
        if (!PyFloat_CheckExact(value) && reader_->is_tensor(value) &&
            py::handle(value).attr("requires_grad").cast<bool>()) {
          return "a learning rate requires grad";
        }
        rates.lr = as_number(value);
        break;
      case kMomentumKey:
        rates.momentum = as_number(value);
        break;
      case kDampeningKey:
        dampening = as_number(value);
        break;
      case kDecayKey:
        rates.weight_decay = as_number(value);
        break;
      case kNesterovKey:
        nesterov = as_bool(value);
        break;
      case kMaximizeKey:
        maximize = as_bool(value);
        break;
      case kDifferentiableKey:
        if (as_bool(value)) return "a group became differentiable";
        break;
      case kFrozenKey:
        if (as_bool(value) != group.frozen) return "a group was frozen or thawed";
        break;
    }
  }
  if (count != group.keys.size()) return "a group's keys changed";
  if (!rates_out) return nullptr;
  rates.undamped = 1 - dampening;
  const bool momentum = rates.momentum != 0;
  rates.options = (rates.weight_decay != 0 ? kWeightDecay : 0u) | (maximize ? kMaximize : 0u) |
                  (momentum ? kMomentum : 0u) | (momentum && nesterov ? kNesterov : 0u);
  *rates_out = rates;
  return nullptr;
}

const char* Plan::gather_group(Group& group, PyObject* dict, int index) {
  GroupRates& rates = rates_[index];
  if (const char* changed = read_group(group, dict, group.native ? &rates : nullptr)) return changed;
  if (group.frozen) return nullptr;
  if (group.native && static_cast<bool>(rates.options & kMomentum) != group.momentum)
    return "momentum was turned on or off";
  if (!schedule_.empty()) {
    rates.lr = schedule_[index].lr;
    rates.milestone = schedule_[index].milestone;
    rates.warmup = schedule_[index].warmup;
  }
  if (static_cast<std::size_t>(PyList_GET_SIZE(group.params_list)) != group.params.size())
    return "a group's parameters changed";
  for (std::size_t i = 0; i < group.params.size(); ++i) {
    if (PyList_GET_ITEM(group.params_list, i) != group.params[i]) return "a group's parameters changed";
    if (group.tensor_of[i] < 0) continue;
    if (const char* changed = gather_tensor(tensors_[group.tensor_of[i]], index)) return changed;
  }
  return nullptr;
}

const char* Plan::gather_tensor(Tensor& tensor, int group) {
  TensorWork& work = updates_[tensor.update]->work[tensor.slot];
  work.grad = nullptr;
  if (!reader_->read(tensor.param, scratch_) || scratch_.data() != work.param || !same_layout(tensor, scratch_)) {
    return "a parameter's storage changed";
  }
  py::object grad = reader_->grad(tensor.param);
  if (grad.is_none()) return nullptr;
  if (groups_[group].momentum && !tensor.buffer) return "a parameter got its first gradient";
  if (tensor.buffer && !tensor.fresh &&
      (!reader_->read(tensor.buffer, scratch_) || scratch_.data() != work.buffer || !same_layout(tensor, scratch_))) {
    return "a momentum_buffer's storage changed";
  }
  // A negative view made by public functions is every second element of complex ones, and dense with one element only.
  if (!reader_->read(grad.ptr(), scratch_) || !same_layout(tensor, scratch_) ||
      ((work.size == 1 || first_gather_) && reader_->is_neg(grad.ptr()))) {
    leftover_.emplace_back(group, tensor.position);
    return nullptr;
  }
  work.grad = scratch_.data();
  updated_.push_back(tensor.param);
  grads_.push_back(std::move(grad));
  return nullptr;
}

const char* Plan::gather(py::list groups, py::dict state) {
  release();
  leftover_.clear();
  updated_.clear();
  if (groups.size() != groups_.size()) return "the number of param groups changed";
  if (const char* changed = check_state(state.ptr())) return changed;
  for (std::size_t i = 0; i < groups_.size(); ++i) {
    PyObject* dict = PyList_GET_ITEM(groups.ptr(), i);
    if (dict != groups_[i].dict) return "a param group was replaced";
    if (const char* changed = gather_group(groups_[i], dict, static_cast<int>(i))) return changed;
  }
  for (const auto& update : updates_) update->groups = rates_;
  first_gather_ = false;
  return nullptr;
}

py::object Plan::step_cpu(py::list groups, py::dict state, int num_threads) {
  const Release release(*this);
  if (gather(std::move(groups), std::move(state)) || !leftover_.empty()) return py::none();
  for (const auto& update : updates_) update->run_cpu(num_threads, -1.0, 1.0f);
  return updated();
}

bool Plan::read_scalar(py::handle object, dlpack::TypeCode code, int bits, const Update& update,
                       std::uintptr_t& address) {
  address = 0;
  if (object.is_none()) return true;
  if (!reader_->read(object.ptr(), scratch_) || scratch_.size() != 1) return false;
  const dlpack::Tensor& view = scratch_.view;
  address = reinterpret_cast<std::uintptr_t>(scratch_.data());
  return view.dtype.code == code && view.dtype.bits == bits && view.dtype.lanes == 1 &&
         view.device.type == update.device_type && view.device.index == update.device_index;
}

py::object Plan::step_cuda(py::list groups, py::dict state, const py::list& tables, py::handle step,
                           py::handle grad_scale, py::handle found_inf) {
  struct Launch {
    std::uintptr_t table, stream, step, grad_scale, found_inf;
  };
  std::vector<Launch> launches(updates_.size());
  for (std::size_t i = 0; i < updates_.size(); ++i) {
    const Update& update = *updates_[i];
    Launch& launch = launches[i];
    std::uintptr_t current;
    std::tie(launch.table, launch.stream) = tables[i].cast<std::pair<std::uintptr_t, std::uintptr_t>>();
    if (!reader_->current_stream(update.device_index, current) || current != launch.stream ||
        !read_scalar(step, dlpack::kIntCode, 64, update, launch.step) ||
        !read_scalar(grad_scale, dlpack::kFloatCode, 32, update, launch.grad_scale) ||
        !read_scalar(found_inf, dlpack::kFloatCode, 32, update, launch.found_inf)) {
      return py::none();
    }
  }
  const Release release(*this);
  if (gather(std::move(groups), std::move(state)) || !leftover_.empty()) return py::none();
  bool captured = false;
  for (std::size_t i = 0; i < updates_.size(); ++i) {
    const Launch& launch = launches[i];
    captured |= updates_[i]->run_cuda(launch.table, launch.step, launch.grad_scale, launch.found_inf, launch.stream);
  }
  return py::make_tuple(updated(), captured);
}

py::list Plan::updated() const {
  py::list list(updated_.size());
  for (std::size_t i = 0; i < updated_.size(); ++i) {
    Py_INCREF(updated_[i]);
    PyList_SET_ITEM(list.ptr(), i, updated_[i]);
  }
  return list;
}

void bind_plan(py::module_& module) {
  py::class_<TensorReader, std::shared_ptr<TensorReader>>(module, "TensorReader",
                                                          "Reads where a tensor's elements are.")
      .def(py::init<py::object, py::object, py::dict, bool>(), py::arg("tensor_type"), py::arg("parameter_type"),
           py::arg("dtypes"), py::kw_only(), py::arg("exchange"))
      .def_property_readonly("exchanges", &TensorReader::exchanges);
  py::class_<Plan>(module, "Plan", "What FusedSGD prepares once and checks at every step.")
      .def(py::init<std::shared_ptr<TensorReader>, py::list, py::dict, py::list, py::dict, py::object>(),
           py::arg("reader"), py::arg("groups"), py::arg("state"), py::kw_only(), py::arg("native"), py::arg("fresh"),
           py::arg("schedule"))
      .def("gather", &Plan::gather, py::arg("groups"), py::arg("state"))
      .def("step_cpu", &Plan::step_cpu, py::arg("groups"), py::arg("state"), py::arg("num_threads"))
      .def("step_cuda", &Plan::step_cuda, py::arg("groups"), py::arg("state"), py::arg("tables"), py::arg("step"),
           py::arg("grad_scale"), py::arg("found_inf"))
      .def_property_readonly("updates", &Plan::updates)
      .def("updated", &Plan::updated)
      .def_property_readonly("leftover", &Plan::leftover)
      .def("release", &Plan::release);
}

}  // namespace freezeout
