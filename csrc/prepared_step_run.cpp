// PreparedStep::run: one step, compared with what was prepared.
#include <pybind11/stl.h>

#include <algorithm>
#include <stdexcept>
#include <utility>

#include "prepared_step.h"

namespace py = pybind11;

namespace freezeout {

namespace {

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
    if (group.is_native && read.options != group.options &&
        states_of(formula_, read.options) != states_of(formula_, group.options)) {
      return "other states are used";
    }
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
  for (std::size_t i = 0; i < batches_.size(); ++i) {
    if (located[i].grad_scale) batches_[i]->check_scaled();
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
