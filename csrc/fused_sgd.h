// p, momentum_buffer <- sgd_update(p, momentum_buffer, grad) for every element of a list of tensors.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "tensor_table.h"

namespace freezeout {

// One tensor of one step; param, buffer and grad have the same dense layout.
struct TensorWork {
  void* param;
  void* buffer;  // null without momentum
  void* grad;    // null: not updated; written only where gradients are unscaled
  std::int64_t size;
  std::uint32_t group;
  bool first;  // the buffer holds nothing yet
};

// `step` >= 0: the groups' rates are scheduled_rate at that step. `inverse_scale` != 1: gradients are multiplied by it,
// in place.
void fused_sgd_cpu(Dtype dtype, const std::vector<TensorWork>& work, const std::vector<GroupRates>& groups,
                   int num_threads, double step, float inverse_scale);

// Instruction sets that were compiled in and that this CPU has, fastest first; and the one in use.
std::vector<std::string> cpu_isas();
std::string cpu_isa();
void use_cpu_isa(const std::string& name);  // throws std::invalid_argument

// The table that the launches below read, in the order of `work`; grads and `first` are not in it.
std::vector<TensorEntry> make_tensor_table(const std::vector<TensorWork>& work);

// What one launch reads on the device.
struct DeviceInputs {
  const TensorEntry* table;  // on the device, as made by make_tensor_table
  const std::int64_t* step;  // null: rates as given
  const float* grad_scale;   // null: gradients are not scaled
  const float* found_inf;    // null, or nothing happens where it is not 0
};

#ifdef FREEZEOUT_WITH_CUDA
// One launch (more only where addresses and rates outgrow 32 KB of kernel arguments) on `stream` of `device`.
// Returns whether the stream is being captured into a graph. Throws std::runtime_error with CUDA's message.
bool fused_sgd_cuda(Dtype dtype, const std::vector<TensorWork>& work, const std::vector<GroupRates>& groups,
                    const DeviceInputs& inputs, int device, std::uintptr_t stream);
#endif

// fused_sgd_cuda's blocks run one after another on the host, on host addresses: for tests.
// Returns the number of launches.
int fused_sgd_emulated(Dtype dtype, const std::vector<TensorWork>& work, const std::vector<GroupRates>& groups,
                       const DeviceInputs& inputs);

}  // namespace freezeout
