// What a TensorBatch refuses, its table, and its update on the host or on CUDA.
#include "tensor_batch.h"

#include <stdexcept>
#include <string>

#include "memory_spans.h"
#include "torch_tensor.h"

namespace py = pybind11;

namespace freezeout {

namespace {

template <class T>
T* pointer(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

bool is_valid(Formula formula, std::uint64_t options) {
  const auto bits = static_cast<unsigned>(options);
  return options < kOptionSets && visit_formula(formula, [&](auto f) { return f.is_valid(bits); });
}

void check_work(const TensorWork& work, const Batch& batch) {
  const std::string where = " (group " + std::to_string(work.group) + ")";
  if (work.group >= batch.groups.size()) {
    throw std::invalid_argument("group must be below " + std::to_string(batch.groups.size()) + ", got " +
                                std::to_string(work.group));
  }
  if (!batch.work.empty() && work.group < batch.work.back().group) {
    throw std::invalid_argument("groups must ascend, got " + std::to_string(work.group) + " after " +
                                std::to_string(batch.work.back().group));
  }
  if (work.size < 0) throw std::invalid_argument("size must be >= 0, got " + std::to_string(work.size) + where);
  if (batch.formula == Formula::kAdamW && !work.step) throw std::invalid_argument("step must not be null" + where);
  if (work.size == 0) return;
  if (!work.param) throw std::invalid_argument("param must not be null" + where);
  for (int k = 0; k < kMaxStates; ++k) {
    if (states_of(batch.formula, batch.groups[work.group].options) >> k & 1 && !work.states[k]) {
      throw std::invalid_argument("states[" + std::to_string(k) + "] must not be null" + where);
    }
  }
}

}  // namespace

Formula checked_formula(int formula) {
  if (formula < 0 || formula > static_cast<int>(Formula::kAdamW)) {
    throw std::invalid_argument("formula must be 0 or 1, got " + std::to_string(formula));
  }
  return static_cast<Formula>(formula);
}

unsigned states_of(Formula formula, std::uint64_t options) {
  return visit_formula(formula, [&](auto f) {
    unsigned states = 0;
    for (int k = 0; k < f.kStates; ++k) states |= f.uses_state(k, static_cast<unsigned>(options)) ? 1u << k : 0u;
    return states;
  });
}

TensorBatch make_tensor_batch(int formula, int dtype, int device_type, int device_index,
                              const std::vector<WorkTuple>& work, const std::vector<GroupTuple>& groups) {
  if (dtype < 0 || dtype > static_cast<int>(Dtype::kBFloat16)) {
    throw std::invalid_argument("dtype must be 0 to 3, got " + std::to_string(dtype));
  }
  TensorBatch made{{checked_formula(formula), static_cast<Dtype>(dtype), {}, {}}, device_type, device_index};
  for (const auto& [lr, milestone, warmup, weight_decay, coefficients, options] : groups) {
    if (!is_valid(made.batch.formula, options)) {
      throw std::invalid_argument("options must be ones that the formula has, got " + std::to_string(options));
    }
    made.batch.groups.push_back(
        {lr, milestone, warmup, weight_decay, {coefficients[0], coefficients[1], coefficients[2]}, options});
  }
  for (const auto& [param, states, grad, step, size, group] : work) {
    TensorWork tensor{pointer<void>(param), {}, pointer<void>(grad), pointer<float>(step), size, group};
    for (int k = 0; k < kMaxStates; ++k) tensor.states[k] = pointer<void>(states[k]);
    check_work(tensor, made.batch);
    made.batch.work.push_back(tensor);
  }
  made.check_memory();
  return made;
}

void TensorBatch::check_memory() const {
  const int item_size = item_size_of(batch.dtype);
  MemorySpans written;
  for (const TensorWork& work : batch.work) written.add_written(work, item_size);
  if (!written.sort_and_are_apart()) throw std::invalid_argument("params, states and steps must not share memory");
  for (const TensorWork& work : batch.work) {
    if (written.overlap(work.grad, work.grad ? work.size * item_size : 0)) {
      throw std::invalid_argument("grads must not share memory with params, states or steps (group " +
                                  std::to_string(work.group) + ")");
    }
  }
}

void TensorBatch::check_scaled() const {
  MemorySpans grads;
  for (const TensorWork& work : batch.work) grads.add(work.grad, work.size * item_size_of(batch.dtype));
  if (!grads.sort_and_are_apart()) throw std::invalid_argument("gradients that are unscaled must not share memory");
}

py::bytes TensorBatch::table() const {
  const std::vector<TensorEntry> table = make_tensor_table(batch.work);
  return py::bytes(reinterpret_cast<const char*>(table.data()), table.size() * sizeof(TensorEntry));
}

bool TensorBatch::run_addresses(int num_threads, std::uintptr_t schedule_step, std::uintptr_t grad_scale,
                                std::uintptr_t found_inf) const {
  if (grad_scale) check_scaled();
  return run(
      {pointer<const std::int64_t>(schedule_step), pointer<const float>(grad_scale), pointer<const float>(found_inf)},
      num_threads);
}

bool TensorBatch::run(const SharedInputs& inputs, int num_threads) const {
  if (device_type == dlpack::kCpu) {
    fused_update_cpu(batch, inputs, num_threads);
    return false;
  }
#ifdef FREEZEOUT_WITH_CUDA
  return fused_update_cuda(batch, pointer<TensorEntry>(table_address), inputs, device_index, stream);
#else
  throw std::runtime_error("fused_update_cuda: freezeout_ext was compiled without CUDA");
#endif
}

}  // namespace freezeout
