#include "prepared_step.h"

#include <pybind11/stl.h>

#include <algorithm>
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

constexpr const char* kSharedGradient = "a gradient shares memory with a parameter or a state";

// How many tensors ahead of their reading memory is asked for them.
constexpr std::size_t kAhead = 4;
constexpr int kCacheLine = 64;

bool holds(PyObject* list, std::size_t index, PyObject* object) {
  return index < static_cast<std::size_t>(PyList_GET_SIZE(list)) && PyList_GET_ITEM(list, index) == object;
}

}  // namespace

PreparedStep::Turn::Turn(PreparedStep& step) : step(step) {
  if (step.is_running_) throw std::runtime_error("an optimizer's step must not run in two threads at once");
  step.is_running_ = true;
}

PreparedStep::Turn::~Turn() {
  step.leftover_.clear();
  for (Group& group : step.groups_) group.list = py::object();
  for (Gradient& grad : step.grads_) {
    if (std::exchange(grad.is_held, false)) Py_DECREF(grad.seen.object);
  }
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
  state_ = PreparedState(state.ptr());
  for (std::size_t i = 0; i < groups_.size(); ++i) {
    for (std::size_t j = 0; j < groups_[i].params.size(); ++j) {
      if (groups_[i].params[j].tensor >= 0) add_tensor(groups_[i], static_cast<int>(i), static_cast<int>(j));
    }
    groups_[i].list = py::object();
  }
  std::int64_t* at = layouts_.data();
  for (Tensor& tensor : tensors_) {
    tensor.layout.shape = at;
    tensor.layout.strides = at + tensor.layout.ndim;
    at += 2 * tensor.layout.ndim;
    written_.add_written(*tensor.work, tensor.layout.dtype.bits / 8);
  }
  if (!written_.sort_and_are_apart()) throw std::invalid_argument("parameters and states must not share memory");
  grads_.resize(tensors_.size());
}

void PreparedStep::add_group(const py::object& dict, const py::list& native, int index) {
  Group group{PreparedGroup(formula_, dict.ptr()), {}, false, 0, {}};
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
    group.params.push_back({PyTuple_GET_ITEM(group.list.ptr(), i), is_native ? static_cast<int>(num_tensors_++) : -1});
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

void PreparedStep::add_tensor(Group& group, int index, int position) {
  const std::string where = "group " + std::to_string(index) + ", parameter " + std::to_string(position);
  PyObject* const param = group.params[position].object;
  Tensor tensor{};
  TensorWork work{};
  TorchTensor read;
  if (!reader_->read(param, read)) throw std::invalid_argument(where + ": no address");
  tensor.param = {param, read.view.shape};
  tensor.layout = read.view;
  for (int k = 0; k < kMaxStates; ++k) {
    if (!(group.states >> k & 1)) continue;
    const char* name = kStateNames[static_cast<int>(formula_)][k];
    tensor.states[k].object = state_.value_of(param, name);
    if (!tensor.states[k].object) {
      tensor.lacks_state = true;
    } else if (!read_alike(tensor.states[k], tensor)) {
      throw std::invalid_argument(where + ": its " + name + " has another layout");
    } else {
      work.states[k] = scratch_.data();
    }
  }
  if (formula_ == Formula::kAdamW) {
    tensor.step.object = state_.value_of(param, "step");
    if (!tensor.step.object) {
      tensor.lacks_state = true;
    } else if (!reader_->read(tensor.step.object, scratch_) || scratch_.size() != 1 ||
               !scratch_.is(dlpack::kFloatCode, 32) || scratch_.view.device.type != read.view.device.type) {
      throw std::invalid_argument(where + ": its step must be one float32 on its device");
    } else {
      tensor.step.shape = scratch_.view.shape;
      work.step = static_cast<float*>(scratch_.data());
    }
  }
  std::vector<TensorWork>& of_batch = batch_of(read.view, where).work;
  work.param = read.data();
  work.size = read.size();
  work.group = static_cast<std::uint32_t>(index);
  of_batch.push_back(work);
  tensor.work = &of_batch.back();
  tensor.is_single = work.size == 1;
  layouts_.insert(layouts_.end(), read.view.shape, read.view.shape + read.view.ndim);
  layouts_.insert(layouts_.end(), read.view.strides, read.view.strides + read.view.ndim);
  tensors_.push_back(tensor);
  places_.emplace_back(index, position);
}

Batch& PreparedStep::batch_of(const dlpack::Tensor& view, const std::string& where) {
  const int dtype = dtype_of(view.dtype);
  if (dtype < 0) throw std::invalid_argument(where + ": its dtype is not supported");
  for (const auto& made : batches_) {
    if (static_cast<int>(made->batch.dtype) == dtype && made->device_type == view.device.type &&
        made->device_index == view.device.index) {
      return made->batch;
    }
  }
  batches_.push_back(std::make_shared<TensorBatch>(
      TensorBatch{{formula_, static_cast<Dtype>(dtype), {}, {}}, view.device.type, view.device.index}));
  batches_.back()->batch.work.reserve(num_tensors_);  // each Tensor points at its work
  return batches_.back()->batch;
}

const char* PreparedStep::read(const py::list& groups) {
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
    if ((changed = read_gradients(group))) return changed;
  }
  return groups.size() == groups_.size() ? nullptr : "the number of param groups changed";
}

const char* PreparedStep::read_gradients(const Group& group) {
  for (std::size_t i = 0; i < group.params.size(); ++i) {
    // Each gradient that is read may let another thread in.
    if (!holds(group.list.ptr(), i, group.params[i].object)) return "a group's parameters changed";
    const int index = group.params[i].tensor;
    if (index < 0) continue;
    if (index + kAhead < tensors_.size()) {
      prefetch(tensors_[index + kAhead].param);
      prefetch(grads_[index + kAhead].seen);
    }
    const Tensor& tensor = tensors_[index];
    py::object grad = reader_->grad(tensor.param.object);
    if (grad.is_none()) continue;
    if (tensor.lacks_state) return "a parameter got its first gradient";
    // Public functions make a negative view of complex elements only. The view is every second real number there, so
    // it is dense only where it has one element.
    if ((is_first_ || tensor.is_single) && reader_->is_plain(grad.ptr()) && reader_->is_neg(grad.ptr())) {
      leftover_.push_back(places_[index]);
      continue;
    }
    grads_[index].seen.object = grad.release().ptr();
    grads_[index].is_held = true;
  }
  return nullptr;
}

const char* PreparedStep::locate(PyObject* state) {
  if (const char* changed = state_.compare(state)) return changed;
  for (const Group& group : groups_) {
    if (!group.prepared.is_active()) continue;
    PyObject* const list = group.list.ptr();
    if (PyList_GET_SIZE(list) != static_cast<Py_ssize_t>(group.params.size())) return "a group's parameters changed";
    for (std::size_t i = 0; i < group.params.size(); ++i) {
      if (!holds(list, i, group.params[i].object)) return "a group's parameters changed";
    }
  }
  for (std::size_t i = 0; i < tensors_.size(); ++i) {
    if (i + kAhead < tensors_.size()) {
      const Tensor& next = tensors_[i + kAhead];
      for (const Seen& seen : next.states) prefetch(seen);
      prefetch(next.step);
    }
    if (const char* changed = locate_tensor(i)) return changed;
  }
  for (const auto& batch : batches_) batch->batch.groups = read_groups_;
  return nullptr;
}

const char* PreparedStep::locate_tensor(std::size_t index) {
  Tensor& tensor = tensors_[index];
  Gradient& grad = grads_[index];
  TensorWork& work = *tensor.work;
  work.grad = nullptr;
  if (!grad.is_held) return nullptr;
  if (!read_alike(tensor.param, tensor) || scratch_.data() != work.param) return "a parameter's storage changed";
  for (int k = 0; k < kMaxStates; ++k) {
    Seen& seen = tensor.states[k];
    if (seen.object && (!read_alike(seen, tensor) || scratch_.data() != work.states[k])) {
      return "a state's storage changed";
    }
  }
  if (tensor.step.object && (!reader_->read(tensor.step.object, scratch_) || scratch_.data() != work.step ||
                             !scratch_.is(dlpack::kFloatCode, 32))) {
    return "a step's storage changed";
  }
  if (!read_alike(grad.seen, tensor)) {
    leftover_.push_back(places_[index]);
    return nullptr;
  }
  if (scratch_.data() != grad.apart_at) {
    if (written_.overlap(scratch_.data(), work.size * tensor.layout.dtype.bits / 8)) return kSharedGradient;
    grad.apart_at = scratch_.data();
  }
  work.grad = work.size == 0 ? kNoElements : scratch_.data();
  return nullptr;
}

void PreparedStep::prefetch(const Seen& seen) {
  if (!seen.object) return;
  __builtin_prefetch(seen.object);
  // The shape lies in the middle of what torch reads. An address beyond that is no error.
  const auto* const shape = reinterpret_cast<const char*>(seen.shape);
  for (int line = -1; line <= 2; ++line) __builtin_prefetch(shape + line * kCacheLine);
}

bool PreparedStep::read_alike(Seen& seen, const Tensor& tensor) {
  if (!reader_->read(seen.object, scratch_)) return false;
  seen.shape = scratch_.view.shape;
  return same_layout(tensor.layout, scratch_.view);
}

py::list PreparedStep::updated() const {
  const auto is_updated = [](const Tensor& tensor) { return tensor.work->grad != nullptr; };
  py::list params(std::count_if(tensors_.begin(), tensors_.end(), is_updated));
  Py_ssize_t count = 0;
  for (const Tensor& tensor : tensors_) {
    if (is_updated(tensor)) PyList_SET_ITEM(params.ptr(), count++, Py_NewRef(tensor.param.object));
  }
  return params;
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
  const py::list changing = updated();
  bool captured = false;
  for (std::size_t i = 0; i < batches_.size(); ++i) captured |= batches_[i]->run(located[i], num_threads);
  // A step that raises has counted no change.
  for (const Tensor& tensor : tensors_) prefetch(tensor.param);
  reader_->increment_versions(changing);
  is_first_ = false;
  return py::make_tuple(leftover_.empty() ? py::object(py::none()) : py::cast(leftover_), captured);
}

}  // namespace freezeout
