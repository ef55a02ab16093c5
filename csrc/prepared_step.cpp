// PreparedStep's making: which tensors there are, where they lie, what of them is compared later.
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

}  // namespace

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
    group.options = read.options;
  }
  groups_.push_back(std::move(group));
}

void PreparedStep::add_tensor(Group& group, int index, int position) {
  const std::string where = "group " + std::to_string(index) + ", parameter " + std::to_string(position);
  PyObject* const param = group.params[position].object;
  Tensor tensor{};
  TensorWork work{};
  const unsigned states = states_of(formula_, group.options);
  TorchTensor read;
  if (!reader_->read(param, read)) throw std::invalid_argument(where + ": no address");
  tensor.param = {param, read.view.shape};
  tensor.layout = read.view;
  for (int k = 0; k < kMaxStates; ++k) {
    if (!(states >> k & 1)) continue;
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

}  // namespace freezeout
