#include "prepared_step.h"

#include <pybind11/stl.h>

#include <stdexcept>
#include <tuple>

namespace py = pybind11;

namespace freezeout {

namespace {

constexpr const char* kStateNames[2][kMaxStates] = {{"momentum_buffer", nullptr, nullptr},
                                                    {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"}};

// The dtype's code in the kernels, or -1.
int dtype_of(const dlpack::DataType& dtype) {
  const auto is = [&](int code, int bits) { return dtype.code == code && dtype.bits == bits && dtype.lanes == 1; };
  if (is(dlpack::kFloatCode, 32)) return static_cast<int>(Dtype::kFloat);
  if (is(dlpack::kFloatCode, 64)) return static_cast<int>(Dtype::kDouble);
  if (is(dlpack::kFloatCode, 16)) return static_cast<int>(Dtype::kHalf);
  if (is(dlpack::kBFloatCode, 16)) return static_cast<int>(Dtype::kBFloat16);
  return -1;
}

bool is_named(PyObject* key, const char* name) {
  return PyUnicode_Check(key) && PyUnicode_CompareWithASCIIString(key, name) == 0;
}

}  // namespace

PreparedStep::Turn::Turn(PreparedStep& step) : step(step) {
  if (step.is_running_) throw std::runtime_error("an optimizer's step must not run in two threads at once");
  step.is_running_ = true;
}

PreparedStep::Turn::~Turn() {
  step.leftover_.clear();
  for (Group& group : step.groups_) group.list = py::object();
  for (Tensor& tensor : step.tensors_) tensor.grad = py::object();
  // Last: where a gradient goes, another thread may run, and would gather what is then dropped here.
  step.is_running_ = false;
}

PreparedStep::PreparedStep(std::shared_ptr<TensorReader> reader, int formula, const py::list& groups,
                           const py::dict& state, const py::list& native, const py::object& schedule)
    : reader_(std::move(reader)), formula_(checked_formula(formula)) {
  const auto check_size = [&](const char* name, std::size_t size) {
    if (size == groups.size()) return;
    throw std::invalid_argument(std::string(name) + " must have one entry for each of the " +
                                std::to_string(groups.size()) + " param groups, got " + std::to_string(size));
  };
  check_size("native", native.size());
  if (!schedule.is_none()) {
    for (const py::handle entry : schedule) {
      const auto [peak, milestone, warmup] = entry.cast<std::tuple<double, double, double>>();
      schedule_.push_back({peak, milestone, warmup, 0, {}, 0});
    }
    check_size("schedule", schedule_.size());
  }
  read_groups_.resize(groups.size());
  for (std::size_t i = 0; i < native.size() && i < groups.size(); ++i) {
    add_group(groups[i], native[i].cast<py::list>(), static_cast<int>(i));
  }
  // From here on no Python code runs.
  add_states(state);
  for (std::size_t i = 0; i < groups_.size(); ++i) {
    for (std::size_t j = 0; j < groups_[i].params.size(); ++j) {
      if (groups_[i].tensor_of[j] >= 0) add_tensor(groups_[i], static_cast<int>(i), static_cast<int>(j));
    }
    groups_[i].list = py::object();
  }
}

void PreparedStep::add_group(const py::object& dict, const py::list& native, int index) {
  Group group{PreparedGroup(formula_, dict.ptr()), {}, {}, false, 0, {}};
  if (group.prepared.is_active() || !native.empty()) {
    // A copy of the list, which keeps the parameters alive until they are read.
    if (group.prepared.is_active()) {
      group.list = py::reinterpret_steal<py::object>(PyList_AsTuple(group.prepared.list()));
    }
    if (!group.list || PyTuple_GET_SIZE(group.list.ptr()) != static_cast<Py_ssize_t>(native.size())) {
      throw std::invalid_argument("native must have one entry for each parameter of a list in a dict (group " +
                                  std::to_string(index) + ")");
    }
  }
  for (std::size_t i = 0; i < native.size(); ++i) {
    const bool is_native = native[i].cast<bool>();
    group.params.push_back(PyTuple_GET_ITEM(group.list.ptr(), i));
    group.tensor_of.push_back(is_native ? 0 : -1);
    group.is_native = group.is_native || is_native;
  }
  if (group.is_native) {
    ParamGroup read{};
    py::object list;
    if (const char* changed = group.prepared.read(*reader_, !schedule_.empty(), &read, list)) {
      throw std::invalid_argument(changed);
    }
    group.states = states_of(formula_, read.options);
  }
  groups_.push_back(std::move(group));
}

void PreparedStep::add_states(const py::dict& state) {
  PyObject *param, *values, *key, *value;
  for (Py_ssize_t i = 0; PyDict_Next(state.ptr(), &i, &param, &values);) {
    bool any = false;
    for (Py_ssize_t j = 0; PyDict_Check(values) && PyDict_Next(values, &j, &key, &value); any = true) {
      state_.push_back({param, values, key, value});
    }
    if (!any) state_.push_back({param, values, nullptr, nullptr});
  }
}

PyObject* PreparedStep::state_of(PyObject* param, const char* name) const {
  for (const StateItem& item : state_) {
    if (item.param == param && item.key && is_named(item.key, name))
      return item.value == Py_None ? nullptr : item.value;
  }
  return nullptr;
}

void PreparedStep::add_tensor(Group& group, int index, int position) {
  const std::string where = "group " + std::to_string(index) + ", parameter " + std::to_string(position);
  PyObject* const param = group.params[position];
  group.tensor_of[position] = static_cast<int>(tensors_.size());
  Tensor tensor{};
  TensorWork work{};
  tensor.param = param;
  tensor.position = position;
  if (!reader_->read(param, tensor.layout)) throw std::invalid_argument(where + ": no address");
  tensor.layout.own_layout();
  tensor.is_single = tensor.layout.size() == 1;
  for (int k = 0; k < kMaxStates; ++k) {
    if (!(group.states >> k & 1)) continue;
    const char* name = kStateNames[static_cast<int>(formula_)][k];
    tensor.states[k] = state_of(param, name);
    if (!tensor.states[k]) {
      tensor.lacks_state = true;
    } else if (!reader_->read(tensor.states[k], scratch_) || !same_layout(tensor.layout, scratch_)) {
      throw std::invalid_argument(where + ": its " + name + " has another layout");
    } else {
      work.states[k] = scratch_.data();
    }
  }
  if (formula_ == Formula::kAdamW) {
    tensor.step = state_of(param, "step");
    if (!tensor.step) {
      tensor.lacks_state = true;
    } else if (!reader_->read(tensor.step, scratch_) || scratch_.size() != 1 || !scratch_.is(dlpack::kFloatCode, 32) ||
               scratch_.view.device.type != tensor.layout.view.device.type) {
      throw std::invalid_argument(where + ": its step must be one float32 on its device");
    } else {
      work.step = static_cast<float*>(scratch_.data());
    }
  }
  tensor.batch = batch_of(tensor.layout.view, where);
  Batch& batch = batches_[tensor.batch]->batch;
  tensor.slot = batch.work.size();
  work.param = tensor.layout.data();
  work.size = tensor.layout.size();
  work.group = static_cast<std::uint32_t>(index);
  batch.work.push_back(work);
  tensors_.push_back(std::move(tensor));
}

std::size_t PreparedStep::batch_of(const dlpack::Tensor& view, const std::string& where) {
  const int dtype = dtype_of(view.dtype);
  if (dtype < 0) throw std::invalid_argument(where + ": its dtype is not supported");
  for (std::size_t i = 0; i < batches_.size(); ++i) {
    const TensorBatch& batch = *batches_[i];
    if (static_cast<int>(batch.batch.dtype) == dtype && batch.device_type == view.device.type &&
        batch.device_index == view.device.index) {
      return i;
    }
  }
  batches_.push_back(std::make_shared<TensorBatch>(
      TensorBatch{{formula_, static_cast<Dtype>(dtype), {}, {}}, view.device.type, view.device.index}));
  return batches_.size() - 1;
}

const char* PreparedStep::read(const py::list& groups, py::list& updated) {
  for (std::size_t i = 0; i < groups_.size(); ++i) {
    Group& group = groups_[i];
    if (groups.size() != groups_.size()) return "the number of param groups changed";
    const auto dict = py::reinterpret_borrow<py::object>(PyList_GET_ITEM(groups.ptr(), i));
    if (dict.ptr() != group.prepared.dict()) return "a param group was replaced";
    if (!PyDict_Check(dict.ptr())) continue;
    ParamGroup& read = read_groups_[i];
    const char* changed =
        group.prepared.read(*reader_, !schedule_.empty(), group.is_native ? &read : nullptr, group.list);
    if (changed) return changed;
    if (!group.prepared.is_active()) continue;
    if (group.is_native && states_of(formula_, read.options) != group.states) return "other states are used";
    if (!schedule_.empty()) {
      read.lr = schedule_[i].lr;
      read.milestone = schedule_[i].milestone;
      read.warmup = schedule_[i].warmup;
    }
    if ((changed = read_gradients(group, static_cast<int>(i), updated))) return changed;
  }
  return groups.size() == groups_.size() ? nullptr : "the number of param groups changed";
}

const char* PreparedStep::read_gradients(Group& group, int index, py::list& updated) {
  PyObject* const list = group.list.ptr();
  for (std::size_t j = 0; j < group.params.size(); ++j) {
    if (j >= static_cast<std::size_t>(PyList_GET_SIZE(list)) || PyList_GET_ITEM(list, j) != group.params[j]) {
      return "a group's parameters changed";
    }
    if (group.tensor_of[j] < 0) continue;
    Tensor& tensor = tensors_[group.tensor_of[j]];
    tensor.grad = reader_->grad(tensor.param);
    if (tensor.grad.is_none()) continue;
    if (tensor.lacks_state) return "a parameter got its first gradient";
    updated.append(py::handle(tensor.param));
    // Public functions make a negative view of complex elements only. The view is every second real number there, so
    // it is dense only where it has one element.
    if ((is_first_ || tensor.is_single) && reader_->is_plain(tensor.grad.ptr()) && reader_->is_neg(tensor.grad.ptr())) {
      leftover_.emplace_back(index, tensor.position);
      tensor.grad = py::none();
    }
  }
  return static_cast<std::size_t>(PyList_GET_SIZE(list)) == group.params.size() ? nullptr
                                                                                : "a group's parameters changed";
}

const char* PreparedStep::compare_state(PyObject* state) const {
  std::size_t count = 0;
  const auto is_next = [&](PyObject* param, PyObject* values, PyObject* key, PyObject* value) {
    if (count == state_.size()) return false;
    const StateItem& item = state_[count++];
    return item.param == param && item.values == values && item.key == key && item.value == value;
  };
  PyObject *param, *values, *key, *value;
  for (Py_ssize_t i = 0; PyDict_Next(state, &i, &param, &values);) {
    bool any = false;
    for (Py_ssize_t j = 0; PyDict_Check(values) && PyDict_Next(values, &j, &key, &value); any = true) {
      if (!is_next(param, values, key, value)) return "a state was added or replaced";
    }
    if (!any && !is_next(param, values, nullptr, nullptr)) return "a state was added or replaced";
  }
  return count == state_.size() ? nullptr : "a state was removed";
}

const char* PreparedStep::locate(PyObject* state) {
  if (const char* changed = compare_state(state)) return changed;
  for (std::size_t i = 0; i < groups_.size(); ++i) {
    const Group& group = groups_[i];
    if (!group.prepared.is_active()) continue;
    PyObject* const list = group.list.ptr();
    if (PyList_GET_SIZE(list) != static_cast<Py_ssize_t>(group.params.size())) return "a group's parameters changed";
    for (std::size_t j = 0; j < group.params.size(); ++j) {
      if (PyList_GET_ITEM(list, j) != group.params[j]) return "a group's parameters changed";
      if (group.tensor_of[j] < 0) continue;
      if (const char* changed = locate_tensor(tensors_[group.tensor_of[j]], static_cast<int>(i))) return changed;
    }
  }
  for (const auto& batch : batches_) batch->batch.groups = read_groups_;
  return nullptr;
}

const char* PreparedStep::locate_tensor(Tensor& tensor, int group) {
  TensorWork& work = batches_[tensor.batch]->batch.work[tensor.slot];
  work.grad = nullptr;
  if (tensor.grad.is_none()) return nullptr;
  if (!reader_->read(tensor.param, scratch_) || scratch_.data() != work.param ||
      !same_layout(tensor.layout, scratch_)) {
    return "a parameter's storage changed";
  }
  for (int k = 0; k < kMaxStates; ++k) {
    if (tensor.states[k] && (!reader_->read(tensor.states[k], scratch_) || scratch_.data() != work.states[k] ||
                             !same_layout(tensor.layout, scratch_))) {
      return "a state's storage changed";
    }
  }
  if (tensor.step &&
      (!reader_->read(tensor.step, scratch_) || scratch_.data() != work.step || !scratch_.is(dlpack::kFloatCode, 32))) {
    return "a step's storage changed";
  }
  if (!reader_->read(tensor.grad.ptr(), scratch_) || !same_layout(tensor.layout, scratch_)) {
    leftover_.emplace_back(group, tensor.position);
    tensor.grad = py::none();
    return nullptr;
  }
  work.grad = work.size == 0 ? kNoElements : scratch_.data();
  return nullptr;
}

bool PreparedStep::locate_inputs(const py::object& inputs, std::vector<SharedInputs>& located) {
  located.resize(batches_.size());
  if (inputs.is_none()) return true;
  const auto list = inputs.cast<py::list>();
  for (std::size_t i = 0; i < batches_.size(); ++i) {
    const auto tuple = list[i].cast<py::tuple>();
    const auto address = [&](int k, dlpack::TypeCode code, int bits, auto& target) {
      const py::object object = tuple[k];
      target = nullptr;
      if (object.is_none()) return true;
      if (!reader_->read(object.ptr(), scratch_) || scratch_.size() != 1 || !scratch_.is(code, bits) ||
          scratch_.view.device.type != batches_[i]->device_type ||
          scratch_.view.device.index != batches_[i]->device_index) {
        return false;
      }
      target = static_cast<std::remove_reference_t<decltype(target)>>(scratch_.data());
      return true;
    };
    if (!address(0, dlpack::kIntCode, 64, located[i].schedule_step) ||
        !address(1, dlpack::kFloatCode, 32, located[i].grad_scale) ||
        !address(2, dlpack::kFloatCode, 32, located[i].found_inf)) {
      return false;
    }
  }
  return true;
}

py::object PreparedStep::run(const py::object& groups, const py::object& state, int num_threads,
                             const py::object& inputs) {
  const Turn turn(*this);
  if (!PyList_Check(groups.ptr()) || !PyDict_Check(state.ptr())) return py::str("param_groups or state was replaced");
  py::list updated;
  if (const char* changed = read(py::reinterpret_borrow<py::list>(groups), updated)) return py::str(changed);

  // From here on no Python code runs until all is updated.
  struct NoCollection {
    int was_enabled = PyGC_Disable();
    ~NoCollection() {
      if (was_enabled) PyGC_Enable();
    }
  } const no_collection;
  if (const char* changed = locate(state.ptr())) return py::str(changed);
  std::vector<SharedInputs> located;
  if (!locate_inputs(inputs, located)) {
    throw std::invalid_argument("inputs must be an int64 step, a float32 scale and a float32 found_inf on the device");
  }
  for (const auto& batch : batches_) {
    std::uintptr_t current;
    if (batch->device_type == dlpack::kCuda && reader_->current_stream(batch->device_index, current) &&
        current != batch->stream) {
      return py::str("another stream is current");
    }
  }
  bool captured = false;
  for (std::size_t i = 0; i < batches_.size(); ++i) captured |= batches_[i]->run(located[i], num_threads);
  // A step that raises has counted no change.
  reader_->increment_versions(updated);
  is_first_ = false;
  return py::make_tuple(leftover_.empty() ? py::object(py::none()) : py::cast(leftover_), captured);
}

}  // namespace freezeout
