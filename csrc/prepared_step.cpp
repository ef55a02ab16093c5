#include "prepared_step.h"

#include <pybind11/stl.h>

#include <iterator>
#include <stdexcept>
#include <string>
#include <tuple>

#include "adamw_update.h"
#include "sgd_update.h"

namespace py = pybind11;

namespace freezeout {

enum PreparedStep::Role : int {
  kIgnored,
  kParams,
  kFrozen,
  kLr,
  kDecay,
  kMaximizes,
  kDifferentiable,
  kMomentumKey,
  kDampening,
  kNesterovKey,
  kBetas,
  kEpsKey,
  kAmsgradKey,
  kDecoupled,
  kCapturable,
  kRoles
};

namespace {

// In the order of PreparedStep::Role from kParams on.
constexpr const char* kKeys[] = {
    "params",    "frozen",   "lr",    "weight_decay", "maximize", "differentiable",         "momentum",
    "dampening", "nesterov", "betas", "eps",          "amsgrad",  "decoupled_weight_decay", "capturable"};
static_assert(std::size(kKeys) == 14, "one name a role");

constexpr const char* kStateNames[2][kMaxStates] = {{"momentum_buffer", nullptr, nullptr},
                                                    {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"}};

double as_number(PyObject* object) {
  if (PyFloat_CheckExact(object)) return PyFloat_AS_DOUBLE(object);
  // Numbers of other kinds run code of their own, which may let other threads in.
  const py::object held = py::reinterpret_borrow<py::object>(object);
  const double value = PyFloat_AsDouble(object);
  if (value == -1.0 && PyErr_Occurred()) throw py::error_already_set();
  return value;
}

bool as_bool(PyObject* object) {
  if (object == Py_False) return false;
  if (object == Py_True) return true;
  const py::object held = py::reinterpret_borrow<py::object>(object);
  const int value = PyObject_IsTrue(object);
  if (value < 0) throw py::error_already_set();
  return value != 0;
}

// The two numbers of a pair; false if it is none.
bool as_pair(PyObject* object, double (&pair)[2]) {
  if (PyTuple_CheckExact(object) && PyTuple_GET_SIZE(object) == 2 && PyFloat_CheckExact(PyTuple_GET_ITEM(object, 0)) &&
      PyFloat_CheckExact(PyTuple_GET_ITEM(object, 1))) {
    for (int i = 0; i < 2; ++i) pair[i] = PyFloat_AS_DOUBLE(PyTuple_GET_ITEM(object, i));
    return true;
  }
  const py::object held = py::reinterpret_borrow<py::object>(object);
  if (!PySequence_Check(object) || PySequence_Size(object) != 2) {
    PyErr_Clear();
    return false;
  }
  for (int i = 0; i < 2; ++i) {
    const py::object item = py::reinterpret_steal<py::object>(PySequence_GetItem(object, i));
    if (!item) throw py::error_already_set();
    pair[i] = as_number(item.ptr());
  }
  return true;
}

// The dtype's code in the kernels, or -1.
int dtype_of(const TorchTensor& tensor) {
  if (tensor.is(dlpack::kFloatCode, 32)) return static_cast<int>(Dtype::kFloat);
  if (tensor.is(dlpack::kFloatCode, 64)) return static_cast<int>(Dtype::kDouble);
  if (tensor.is(dlpack::kFloatCode, 16)) return static_cast<int>(Dtype::kHalf);
  if (tensor.is(dlpack::kBFloatCode, 16)) return static_cast<int>(Dtype::kBFloat16);
  return -1;
}

// A bit for each state that the formula uses.
unsigned states_of(Formula formula, std::uint64_t options) {
  const auto bits = static_cast<unsigned>(options);
  if (formula == Formula::kSgd) return bits & Sgd::kMomentum ? 1 : 0;
  return bits & AdamW::kAmsgrad ? 7 : 3;
}

std::string place(int group, int position) {
  return "group " + std::to_string(group) + ", parameter " + std::to_string(position);
}

}  // namespace

PreparedStep::Turn::Turn(PreparedStep& step) : step(step) {
  if (step.is_running_) throw std::runtime_error("an optimizer's step must not run in two threads at once");
  step.is_running_ = true;
}

PreparedStep::Turn::~Turn() {
  step.is_running_ = false;
  step.leftover_.clear();
  for (Group& group : step.groups_) group.held = py::object();
  for (Tensor& tensor : step.tensors_) tensor.grad = py::object();
}

PreparedStep::PreparedStep(std::shared_ptr<TensorReader> reader, int formula, py::list groups, py::dict state,
                           py::list native, py::object schedule)
    : reader_(std::move(reader)), formula_(static_cast<Formula>(formula)) {
  if (formula < 0 || formula > static_cast<int>(Formula::kAdamW)) {
    throw std::invalid_argument("formula must be 0 or 1, got " + std::to_string(formula));
  }
  if (native.size() != groups.size()) {
    throw std::invalid_argument("native must have one entry for each of the " + std::to_string(groups.size()) +
                                " param groups, got " + std::to_string(native.size()));
  }
  if (!schedule.is_none()) {
    for (const py::handle entry : schedule) {
      const auto [peak, milestone, warmup] = entry.cast<std::tuple<double, double, double>>();
      schedule_.push_back({peak, milestone, warmup, 0, {}, 0});
    }
    if (schedule_.size() != groups.size()) {
      throw std::invalid_argument("schedule must have one entry for each of the " + std::to_string(groups.size()) +
                                  " param groups, got " + std::to_string(schedule_.size()));
    }
  }
  read_groups_.resize(groups.size());
  for (std::size_t i = 0; i < native.size() && i < groups.size(); ++i) {
    add_group(groups[i], native[i].cast<py::list>(), static_cast<int>(i));
  }
  // From here on no Python code runs.
  PyObject *param, *values, *key, *value;
  for (Py_ssize_t i = 0; PyDict_Next(state.ptr(), &i, &param, &values);) {
    Py_ssize_t j = 0;
    bool any = false;
    while (PyDict_Check(values) && PyDict_Next(values, &j, &key, &value)) {
      state_.push_back({param, values, key, value});
      any = true;
    }
    if (!any) state_.push_back({param, values, nullptr, nullptr});
  }
  for (std::size_t i = 0; i < groups_.size(); ++i) {
    for (std::size_t j = 0; j < groups_[i].params.size(); ++j) {
      if (groups_[i].tensor_of[j] >= 0) add_tensor(groups_[i], static_cast<int>(i), static_cast<int>(j));
    }
    groups_[i].held = py::object();
  }
}

void PreparedStep::add_group(const py::object& dict, const py::list& native, int index) {
  Group group{};
  group.dict = dict.ptr();
  PyObject *key, *value;
  for (Py_ssize_t i = 0; PyDict_Check(dict.ptr()) && PyDict_Next(dict.ptr(), &i, &key, &value);) {
    int role = kIgnored;
    for (std::size_t k = 0; k < std::size(kKeys); ++k) {
      if (PyUnicode_Check(key) && PyUnicode_CompareWithASCIIString(key, kKeys[k]) == 0) role = static_cast<int>(k) + 1;
    }
    group.keys.emplace_back(py::reinterpret_borrow<py::object>(key), static_cast<Role>(role));
    if (role == kParams) group.params_list = value;
    if (role == kFrozen) group.is_frozen = as_bool(value);
    if (role == kCapturable) group.is_capturable = as_bool(value);
  }
  group.is_updated = !group.is_frozen && group.params_list && PyList_Check(group.params_list);
  if (group.is_updated || !native.empty()) {
    // A copy, which keeps the parameters until they are read.
    if (group.is_updated) group.held = py::reinterpret_steal<py::object>(PyList_AsTuple(group.params_list));
    if (!group.held || PyTuple_GET_SIZE(group.held.ptr()) != static_cast<Py_ssize_t>(native.size())) {
      throw std::invalid_argument("native must have one entry for each parameter of a list in a dict (group " +
                                  std::to_string(index) + ")");
    }
  }
  for (std::size_t i = 0; i < native.size(); ++i) {
    const bool is_native = native[i].cast<bool>();
    group.params.push_back(PyTuple_GET_ITEM(group.held.ptr(), i));
    group.tensor_of.push_back(is_native ? 0 : -1);
    group.is_native = group.is_native || is_native;
  }
  if (group.is_native) {
    ParamGroup read{};
    py::object held_list;
    if (const char* changed = read_group(group, dict.ptr(), &read, held_list)) throw std::invalid_argument(changed);
    group.states = states_of(formula_, read.options);
  }
  groups_.push_back(std::move(group));
}

PyObject* PreparedStep::state_of(PyObject* param, const char* name) const {
  for (const StateItem& item : state_) {
    if (item.param == param && item.key && PyUnicode_Check(item.key) &&
        PyUnicode_CompareWithASCIIString(item.key, name) == 0) {
      return item.value == Py_None ? nullptr : item.value;
    }
  }
  return nullptr;
}

void PreparedStep::add_tensor(Group& group, int index, int position) {
  const std::string where = place(index, position);
  PyObject* const param = group.params[position];
  group.tensor_of[position] = static_cast<int>(tensors_.size());
  Tensor tensor{};
  TensorWork work{};
  tensor.param = param;
  tensor.position = position;
  if (!reader_->read(param, tensor.layout)) throw std::invalid_argument(where + ": no address");
  tensor.layout.own_layout();
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
  const int dtype = dtype_of({view, {}});
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

const char* PreparedStep::read_group(const Group& group, PyObject* dict, ParamGroup* read,
                                     py::object& held_list) const {
  double lr = 0, decay = 0, momentum = 0, dampening = 0, eps = 0;
  bool maximizes = false, nesterov = false, amsgrad = false, decoupled = false;
  double betas[2] = {};
  bool is_float_rate = false;
  std::size_t count = 0;
  PyObject *key, *value;
  for (Py_ssize_t i = 0; PyDict_Next(dict, &i, &key, &value); ++count) {
    if (count == group.keys.size() || group.keys[count].first.ptr() != key) return "a group's keys changed";
    const Role role = group.keys[count].second;
    if (!read && role != kParams && role != kFrozen) continue;
    switch (role) {
      case kParams:
        if (value != group.params_list) return "a group's list of parameters was replaced";
        held_list = py::reinterpret_borrow<py::object>(value);
        break;
      case kFrozen:
        if (as_bool(value) != group.is_frozen) return "a group was frozen or thawed";
        break;
      case kCapturable:
        if (as_bool(value) != group.is_capturable) return "a group became capturable, or is so no longer";
        break;
      case kDifferentiable:
        if (as_bool(value)) return "a group became differentiable";
        break;
      case kLr:
        if (!PyFloat_CheckExact(value) && reader_->is_tensor(value)) {
          const auto held = py::reinterpret_borrow<py::object>(value);
          if (held.attr("requires_grad").cast<bool>()) return "a learning rate requires grad";
          is_float_rate = held.attr("itemsize").cast<int>() == 4 && schedule_.empty();
        }
        lr = as_number(value);
        break;
      case kMomentumKey:
        if (formula_ == Formula::kSgd) momentum = as_number(value);
        break;
      case kDampening:
        if (formula_ == Formula::kSgd) dampening = as_number(value);
        break;
      case kDecay:
        decay = as_number(value);
        break;
      case kEpsKey:
        if (formula_ == Formula::kAdamW) eps = as_number(value);
        break;
      case kBetas:
        if (formula_ == Formula::kAdamW && !as_pair(value, betas)) return "a group's betas are no pair";
        break;
      case kMaximizes:
        maximizes = as_bool(value);
        break;
      case kNesterovKey:
        nesterov = as_bool(value);
        break;
      case kAmsgradKey:
        amsgrad = as_bool(value);
        break;
      case kDecoupled:
        decoupled = as_bool(value);
        break;
      case kIgnored:
      case kRoles:
        break;
    }
  }
  if (count != group.keys.size()) return "a group's keys changed";
  if (!read) return nullptr;
  read->lr = lr;
  read->weight_decay = decay;
  const bool decays = decay != 0;
  read->options = (decays ? kWeightDecay : 0u) | (maximizes ? kMaximize : 0u);
  if (is_float_rate) read->options |= kFloatRate;
  if (formula_ == Formula::kSgd) {
    const bool has_momentum = momentum != 0;
    read->coefficients[Sgd::kMomentumOf] = momentum;
    read->coefficients[Sgd::kUndamped] = 1 - dampening;
    read->options |= (has_momentum ? Sgd::kMomentum : 0u) | (has_momentum && nesterov ? Sgd::kNesterov : 0u);
  } else {
    read->coefficients[AdamW::kBeta1] = betas[0];
    read->coefficients[AdamW::kBeta2] = betas[1];
    read->coefficients[AdamW::kEps] = eps;
    read->options |= (amsgrad ? AdamW::kAmsgrad : 0u) | (decays && !decoupled ? AdamW::kCoupled : 0u);
  }
  return nullptr;
}

const char* PreparedStep::read(const py::list& groups) {
  if (groups.size() != groups_.size()) return "the number of param groups changed";
  for (std::size_t i = 0; i < groups_.size(); ++i) {
    Group& group = groups_[i];
    if (i >= groups.size()) return "the number of param groups changed";
    const auto dict = py::reinterpret_borrow<py::object>(PyList_GET_ITEM(groups.ptr(), i));
    if (dict.ptr() != group.dict) return "a param group was replaced";
    if (!PyDict_Check(dict.ptr())) continue;
    ParamGroup& read = read_groups_[i];
    if (const char* changed = read_group(group, dict.ptr(), group.is_native ? &read : nullptr, group.held)) {
      return changed;
    }
    if (!group.is_updated) continue;
    if (group.is_native && states_of(formula_, read.options) != group.states) return "other states are used";
    if (!schedule_.empty()) {
      read.lr = schedule_[i].lr;
      read.milestone = schedule_[i].milestone;
      read.warmup = schedule_[i].warmup;
    }
    PyObject* const list = group.held.ptr();
    for (std::size_t j = 0; j < group.params.size(); ++j) {
      if (j >= static_cast<std::size_t>(PyList_GET_SIZE(list)) || PyList_GET_ITEM(list, j) != group.params[j]) {
        return "a group's parameters changed";
      }
      if (group.tensor_of[j] < 0) continue;
      Tensor& tensor = tensors_[group.tensor_of[j]];
      tensor.grad = reader_->grad(tensor.param);
      if (tensor.grad.is_none()) continue;
      if (tensor.lacks_state) return "a parameter got its first gradient";
      // A negative view made by public functions is every second element of complex ones, and dense with one element
      // only.
      const bool may_be_negative = is_first_ || batches_[tensor.batch]->batch.work[tensor.slot].size == 1;
      if (may_be_negative && reader_->is_plain(tensor.grad.ptr()) && reader_->is_neg(tensor.grad.ptr())) {
        leftover_.emplace_back(static_cast<int>(i), tensor.position);
        tensor.grad = py::none();
      }
    }
    if (static_cast<std::size_t>(PyList_GET_SIZE(list)) != group.params.size()) return "a group's parameters changed";
  }
  return nullptr;
}

const char* PreparedStep::compare_state(PyObject* state) const {
  std::size_t count = 0;
  PyObject *param, *values, *key, *value;
  for (Py_ssize_t i = 0; PyDict_Next(state, &i, &param, &values);) {
    Py_ssize_t j = 0;
    bool any = false;
    while (PyDict_Check(values) && PyDict_Next(values, &j, &key, &value)) {
      if (count == state_.size()) return "a state was added";
      const StateItem& item = state_[count++];
      if (item.param != param || item.values != values || item.key != key || item.value != value) {
        return "a state was replaced";
      }
      any = true;
    }
    if (any) continue;
    if (count == state_.size()) return "a state was added";
    const StateItem& item = state_[count++];
    if (item.param != param || item.values != values || item.key) return "a state was replaced";
  }
  return count == state_.size() ? nullptr : "a state was removed";
}

const char* PreparedStep::locate(PyObject* state) {
  if (const char* changed = compare_state(state)) return changed;
  for (std::size_t i = 0; i < groups_.size(); ++i) {
    const Group& group = groups_[i];
    if (!group.is_updated) continue;
    PyObject* const list = group.held.ptr();
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

py::object PreparedStep::run(py::object groups, py::object state, int num_threads, py::object inputs) {
  const Turn turn(*this);
  if (!PyList_Check(groups.ptr()) || !PyDict_Check(state.ptr())) return py::str("param_groups or state was replaced");
  if (const char* changed = read(py::reinterpret_borrow<py::list>(groups))) return py::str(changed);

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
  is_first_ = false;

  py::list updated;
  for (const Tensor& tensor : tensors_) {
    if (tensor.grad && !tensor.grad.is_none()) updated.append(py::handle(tensor.param));
  }
  return py::make_tuple(updated, leftover_.empty() ? py::object(py::none()) : py::cast(leftover_), captured);
}

}  // namespace freezeout
