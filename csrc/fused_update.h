// p, states <- formula(p, states, grad) for every element of a list of tensors, on the CPU or in one launch on CUDA.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "adamw_update.h"
#include "half_types.h"
#include "sgd_update.h"
#include "tensor_table.h"

namespace freezeout {

enum class Formula : int { kSgd, kAdamW };

// visit(F{}), F being the formula's type.
template <class Visit>
auto visit_formula(Formula formula, const Visit& visit) {
  return formula == Formula::kSgd ? visit(Sgd{}) : visit(AdamW{});
}

// The rates of formula F for elements of type T.
template <class F, class T>
using RatesOf = typename F::template Rates<typename Compute<T>::type>;

// One tensor of one step; param, states and grad have the same dense layout.
struct TensorWork {
  void* param;
  void* states[kMaxStates];  // null where the formula uses none
  void* grad;                // null: the tensor is not updated; written only where gradients are unscaled
  float* step;  // how often the tensor was updated; each update advances it; null unless the formula counts
  std::int64_t size;
  std::uint32_t group;
};

// The gradient's address of an empty tensor, which has no elements to point at.
inline void* const kNoElements = reinterpret_cast<void*>(std::uintptr_t{64});

// Tensors of one dtype, in the ascending order of their groups.
struct Batch {
  Formula formula;
  Dtype dtype;
  std::vector<TensorWork> work;
  std::vector<ParamGroup> groups;
};

// visit(F{}, T{}), F being the type of the batch's formula, T that of its elements.
template <class Visit>
void visit_types(const Batch& batch, const Visit& visit) {
  visit_formula(batch.formula, [&](auto formula) {
    switch (batch.dtype) {
      case Dtype::kFloat:
        return visit(formula, float{});
      case Dtype::kDouble:
        return visit(formula, double{});
      case Dtype::kHalf:
        return visit(formula, Half{});
      case Dtype::kBFloat16:
        return visit(formula, BFloat16{});
    }
  });
}

// Addresses of the numbers that all tensors of a step share: on the batch's device.
struct SharedInputs {
  const std::int64_t* schedule_step;  // null: each group's lr is its rate; else the schedule gives the rate
  const float* grad_scale;            // null: gradients are not scaled; else gradients are divided by it, in place
  const float* found_inf;             // not null and not 0: nothing is updated
};

void fused_update_cpu(const Batch& batch, const SharedInputs& inputs, int num_threads);

// Instruction sets that were compiled in and that this CPU has, fastest first.
std::vector<std::string> cpu_isas();
// The instruction set in use.
std::string cpu_isa();
void use_cpu_isa(const std::string& name);  // throws std::invalid_argument

#ifdef FREEZEOUT_WITH_CUDA
// One launch on `stream` of `device`. There are more launches only where addresses and rates outgrow 32 KB of kernel
// arguments.
// table: on the device; make_tensor_table of batch.work made it.
// Returns whether the stream is being captured into a graph.
// Throws std::runtime_error with CUDA's message.
bool fused_update_cuda(const Batch& batch, TensorEntry* table, const SharedInputs& inputs, int device,
                       std::uintptr_t stream);
#endif

// The table of `work`, in the same order. Gradients are not in the table, since each step may bring others.
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
