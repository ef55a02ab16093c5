// p, states <- formula(p, states, grad) for every element of a list of tensors, on the CPU or in one launch on CUDA.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "tensor_table.h"

namespace freezeout {

enum class Formula : int { kSgd, kAdamW };

// One tensor of one step; param, states and grad have the same dense layout.
struct TensorWork {
  void* param;
  void* states[kMaxStates];  // null where the formula uses none
  void* grad;                // null: not updated; written only where gradients are unscaled
  float* step;  // how often the tensor was updated, advanced by each update; null unless the formula counts
  std::int64_t size;
  std::uint32_t group;
};

// What an empty tensor has for the address of its gradient.
inline void* const kNoElements = reinterpret_cast<void*>(std::uintptr_t{64});

// Tensors of one dtype, in the ascending order of their groups.
struct Batch {
  Formula formula;
  Dtype dtype;
  std::vector<TensorWork> work;
  std::vector<ParamGroup> groups;
};

// Where the numbers lie that all tensors of a step share: on the device, or on the host for the CPU.
struct SharedInputs {
  const std::int64_t* schedule_step;  // null: rates as given
  const float* grad_scale;            // null: gradients are not scaled; else they are divided by it, in place
  const float* found_inf;             // null, or nothing happens where it is not 0
};

void fused_update_cpu(const Batch& batch, const SharedInputs& inputs, int num_threads);

// Instruction sets that were compiled in and that this CPU has, fastest first; and the one in use.
std::vector<std::string> cpu_isas();
std::string cpu_isa();
void use_cpu_isa(const std::string& name);  // throws std::invalid_argument

#ifdef FREEZEOUT_WITH_CUDA
// One launch (more only where addresses and rates outgrow 32 KB of kernel arguments) on `stream` of `device`.
// `table` is on the device, as made by make_tensor_table of the same work.
// Returns whether the stream is being captured into a graph. Throws std::runtime_error with CUDA's message.
bool fused_update_cuda(const Batch& batch, TensorEntry* table, const SharedInputs& inputs, int device,
                       std::uintptr_t stream);
#endif

// In the order of `work`; gradients are not in it.
inline std::vector<TensorEntry> make_tensor_table(const std::vector<TensorWork>& work) {
  std::vector<TensorEntry> table;
  table.reserve(work.size());
  std::uint32_t chunk_end = 0;
  for (const TensorWork& tensor : work) {
    chunk_end += chunks_of(tensor.size);
    TensorEntry entry{tensor.param, {}, tensor.step, tensor.size, chunk_end, tensor.group, 0, 0};
    for (int k = 0; k < kMaxStates; ++k) entry.states[k] = tensor.states[k];
    table.push_back(entry);
  }
  return table;
}

}  // namespace freezeout
