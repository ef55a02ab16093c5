// One block's work of fused_update_cuda: the kernel's body, for the device; tests compile it for the host.
#pragma once

#include <cstdint>
#include <cstring>
#include <vector>

#include "fused_update.h"

namespace freezeout {

constexpr int kThreads = 256;
// Vectors in flight per operand and thread.
template <class F>
constexpr int kInFlight = F::kStates > 1 ? 1 : 2;
constexpr int kGroupWords = sizeof(ParamGroup) / sizeof(std::uint64_t);

// A kernel's arguments. CUDA 12.1 and later take 32,764 bytes of them.
template <int kWords>
struct LaunchArguments {
  SharedInputs inputs;
  TensorEntry* table;
  std::int32_t first_tensor;  // its index in the table
  std::int32_t num_tensors;
  std::uint32_t first_chunk;  // block 0's
  std::uint32_t first_group;
  // First the gradients of num_tensors tensors, 0 for one that is not updated. Then the ParamGroups from first_group
  // on.
  std::uint64_t words[kWords];
};
constexpr int kWordSizes[] = {512, 1024, 4064};
constexpr int kMaxWords = kWordSizes[2];
static_assert(sizeof(LaunchArguments<kMaxWords>) <= 32764, "kernel arguments");

template <class T>
struct alignas(16) Vector {
  static constexpr int kLanes = 16 / sizeof(T);
  T lane[kLanes];
};

#ifdef __CUDA_ARCH__
// To the compiler a pointer out of a table is generic. Told that the pointer is global, it emits LDG and STG.
#define FREEZEOUT_ASSUME_GLOBAL(pointer) __builtin_assume(__isGlobal(pointer))
#define FREEZEOUT_UNROLL _Pragma("unroll")
#else
#define FREEZEOUT_ASSUME_GLOBAL(pointer)
#define FREEZEOUT_UNROLL
#endif

// What a block works on.
template <class F, class T>
struct Chunk {
  T* param;
  T* states[F::kStates];
  T* grad;
  std::int64_t size;
  unsigned options;

  FREEZEOUT_HOST_DEVICE bool uses(int state) const { return F::uses_state(state, options); }
};

FREEZEOUT_HOST_DEVICE bool is_aligned(const void* pointer) {
  return reinterpret_cast<std::uintptr_t>(pointer) % 16 == 0;
}

template <class F, class T>
FREEZEOUT_HOST_DEVICE void update_element(T& param, T* (&states)[F::kStates], T& grad, const RatesOf<F, T>& rates,
                                          unsigned options, float inverse_scale) {
  using R = typename Compute<T>::type;
  // Rounded before use, so that the update sees the value that is written back to the gradient.
  grad = store<T, R>(load(grad) * static_cast<R>(inverse_scale));
  R p = load(param);
  R s[F::kStates];
  FREEZEOUT_UNROLL
  for (int k = 0; k < F::kStates; ++k) s[k] = load(*states[k]);
  F::template update<R>(p, s, load(grad), rates, options);
  param = store<T, R>(p);
  FREEZEOUT_UNROLL
  for (int k = 0; k < F::kStates; ++k) *states[k] = store<T, R>(s[k]);
}

// The elements [begin, chunk.size), one by one.
template <class F, class T>
FREEZEOUT_HOST_DEVICE void update_scalars(const Chunk<F, T>& chunk, std::int64_t begin, const RatesOf<F, T>& rates,
                                          float inverse_scale, bool scaled, int thread) {
  for (std::int64_t i = begin + thread; i < chunk.size; i += kThreads) {
    T param = chunk.param[i];
    T grad = chunk.grad[i];
    T values[F::kStates];
    T* states[F::kStates];
    FREEZEOUT_UNROLL
    for (int k = 0; k < F::kStates; ++k) {
      values[k] = chunk.uses(k) ? chunk.states[k][i] : T{};
      states[k] = &values[k];
    }
    update_element<F, T>(param, states, grad, rates, chunk.options, inverse_scale);
    chunk.param[i] = param;
    FREEZEOUT_UNROLL
    for (int k = 0; k < F::kStates; ++k) {
      if (chunk.uses(k)) chunk.states[k][i] = values[k];
    }
    if (scaled) chunk.grad[i] = grad;
  }
}

// Updates the chunk's whole vectors. Returns the number of elements updated.
// Param and states are aligned. The gradient may not be: DDP's bucket views are off by 8 bytes. Such a gradient is read
// lane by lane, out of the same cache lines.
template <class F, class T>
FREEZEOUT_HOST_DEVICE std::int64_t update_vectors(const Chunk<F, T>& chunk, const RatesOf<F, T>& rates,
                                                  float inverse_scale, bool scaled, int thread) {
  using V = Vector<T>;
  constexpr int kLanes = V::kLanes;
  constexpr int kVectors = kInFlight<F>;
  const bool grad_aligned = is_aligned(chunk.grad);
  const std::int64_t count = chunk.size / kLanes;
  V* const params = reinterpret_cast<V*>(chunk.param);
  V* const grads = reinterpret_cast<V*>(chunk.grad);

  for (std::int64_t i = thread; i < count; i += kVectors * kThreads) {
    V param[kVectors], grad[kVectors], state[F::kStates][kVectors];
    FREEZEOUT_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      const std::int64_t j = i + v * kThreads;
      if (j >= count) continue;
      param[v] = params[j];
      FREEZEOUT_UNROLL
      for (int k = 0; k < F::kStates; ++k) {
        state[k][v] = chunk.uses(k) ? reinterpret_cast<const V*>(chunk.states[k])[j] : V{};
      }
      if (grad_aligned) {
        grad[v] = grads[j];
      } else {
        FREEZEOUT_UNROLL
        for (int lane = 0; lane < kLanes; ++lane) grad[v].lane[lane] = chunk.grad[j * kLanes + lane];
      }
    }
    FREEZEOUT_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      const std::int64_t j = i + v * kThreads;
      if (j >= count) continue;
      FREEZEOUT_UNROLL
      for (int lane = 0; lane < kLanes; ++lane) {
        T* states[F::kStates];
        FREEZEOUT_UNROLL
        for (int k = 0; k < F::kStates; ++k) states[k] = &state[k][v].lane[lane];
        update_element<F, T>(param[v].lane[lane], states, grad[v].lane[lane], rates, chunk.options, inverse_scale);
      }
      params[j] = param[v];
      FREEZEOUT_UNROLL
      for (int k = 0; k < F::kStates; ++k) {
        if (chunk.uses(k)) reinterpret_cast<V*>(chunk.states[k])[j] = state[k][v];
      }
      if (scaled && grad_aligned) {
        grads[j] = grad[v];
      } else if (scaled) {
        FREEZEOUT_UNROLL
        for (int lane = 0; lane < kLanes; ++lane) chunk.grad[j * kLanes + lane] = grad[v].lane[lane];
      }
    }
  }
  return count * kLanes;
}

// The block's tensor within the launch, or -1 where there is nothing to do.
template <int kWords>
FREEZEOUT_HOST_DEVICE int tensor_of_block(const LaunchArguments<kWords>& arguments, std::uint32_t block) {
  if (arguments.inputs.found_inf && *arguments.inputs.found_inf != 0.0f) return -1;
  const int tensor =
      find_tensor(arguments.table + arguments.first_tensor, arguments.num_tensors, arguments.first_chunk + block);
  return arguments.words[tensor] ? tensor : -1;
}

template <int kWords>
FREEZEOUT_HOST_DEVICE const ParamGroup& group_of_tensor(const LaunchArguments<kWords>& arguments, int tensor) {
  const std::uint32_t group = arguments.table[arguments.first_tensor + tensor].group - arguments.first_group;
  return reinterpret_cast<const ParamGroup*>(arguments.words + arguments.num_tensors)[group];
}

// The tensor's step, this update counted. One thread of each block calls.
// The last of the tensor's blocks to call advances the counter, since all other blocks have then read the counter.
FREEZEOUT_HOST_DEVICE float advance_step(TensorEntry& entry) {
  float* const counter = entry.step;
  FREEZEOUT_ASSUME_GLOBAL(counter);
  const float step = *static_cast<volatile float*>(counter) + 1.0f;
#ifdef __CUDA_ARCH__
  __threadfence();
  const std::uint32_t before = atomicAdd(&entry.arrived, 1u);
#else
  const std::uint32_t before = entry.arrived++;
#endif
  if (before + 1 == chunks_of(entry.size)) {
    entry.arrived = 0;
    *counter = step;
  }
  return step;
}

// Only one thread of the block calls, since powers and cosines in double are slow.
template <class F, class T, int kWords>
FREEZEOUT_HOST_DEVICE RatesOf<F, T> rates_of_block(const LaunchArguments<kWords>& arguments, int tensor) {
  const ParamGroup& group = group_of_tensor(arguments, tensor);
  const std::int64_t* schedule_step = arguments.inputs.schedule_step;
  const double lr = schedule_step ? scheduled_rate(group, static_cast<double>(*schedule_step)) : group.lr;
  float step = 0;
  if constexpr (F::kCounts) step = advance_step(arguments.table[arguments.first_tensor + tensor]);
  return F::template rates<typename Compute<T>::type>(group, lr, step);
}

// `thread`'s share of the block's work.
template <class F, class T, int kWords>
FREEZEOUT_HOST_DEVICE void update_block(const LaunchArguments<kWords>& arguments, std::uint32_t block, int tensor,
                                        const RatesOf<F, T>& rates, int thread) {
  const TensorEntry& entry = arguments.table[arguments.first_tensor + tensor];
  const std::uint32_t chunk_in_tensor = arguments.first_chunk + block - (entry.chunk_end - chunks_of(entry.size));
  const std::int64_t begin = std::int64_t{chunk_in_tensor} * kChunk;

  Chunk<F, T> chunk;
  chunk.options = static_cast<unsigned>(group_of_tensor(arguments, tensor).options % kOptionSets);
  chunk.param = static_cast<T*>(entry.param) + begin;
  chunk.grad = reinterpret_cast<T*>(arguments.words[tensor]) + begin;
  chunk.size = entry.size - begin < kChunk ? entry.size - begin : kChunk;
  FREEZEOUT_ASSUME_GLOBAL(chunk.param);
  FREEZEOUT_ASSUME_GLOBAL(chunk.grad);
  bool aligned = is_aligned(chunk.param);
  FREEZEOUT_UNROLL
  for (int k = 0; k < F::kStates; ++k) {
    // A null state is never dereferenced.
    chunk.states[k] = chunk.uses(k) ? static_cast<T*>(entry.states[k]) + begin : nullptr;
    FREEZEOUT_ASSUME_GLOBAL(chunk.states[k]);
    aligned = aligned && is_aligned(chunk.states[k]);
  }

  const bool scaled = arguments.inputs.grad_scale != nullptr;
  const float inverse_scale = scaled ? inverse_of_scale(*arguments.inputs.grad_scale) : 1.0f;
  std::int64_t done = 0;
  if (aligned) done = update_vectors<F, T>(chunk, rates, inverse_scale, scaled, thread);
  update_scalars<F, T>(chunk, done, rates, inverse_scale, scaled, thread);
}

// Calls launch(arguments, num_blocks) for consecutive tensors, as many at a time as the arguments hold. Returns the
// number of launches. Tensors without a gradient at either end of a launch get no blocks.
template <class Launch>
int for_each_launch(const Batch& batch, TensorEntry* table, const SharedInputs& inputs, const Launch& launch) {
  const std::vector<TensorWork>& work = batch.work;
  const auto words_of = [&](std::size_t begin, std::size_t end) {
    return end - begin + kGroupWords * (work[end - 1].group - work[begin].group + std::size_t{1});
  };
  int launches = 0;
  std::uint32_t chunks_before = 0;
  for (std::size_t begin = 0; begin < work.size();) {
    if (!work[begin].grad) {
      chunks_before += chunks_of(work[begin].size);
      ++begin;
      continue;
    }
    std::size_t end = begin + 1;
    while (end < work.size() && words_of(begin, end + 1) <= kMaxWords) ++end;
    const std::size_t next = end;
    while (!work[end - 1].grad) --end;

    const auto fill = [&](auto&& arguments) {
      arguments.inputs = inputs;
      arguments.table = table;
      arguments.first_tensor = static_cast<std::int32_t>(begin);
      arguments.num_tensors = static_cast<std::int32_t>(end - begin);
      arguments.first_chunk = chunks_before;
      arguments.first_group = work[begin].group;
      std::uint32_t blocks = 0;
      for (std::size_t i = begin; i < end; ++i) {
        blocks += chunks_of(work[i].size);
        arguments.words[i - begin] = reinterpret_cast<std::uint64_t>(work[i].grad);
      }
      const std::size_t num_groups = work[end - 1].group - work[begin].group + std::size_t{1};
      std::memcpy(arguments.words + (end - begin), &batch.groups[work[begin].group], num_groups * sizeof(ParamGroup));
      launch(arguments, blocks);
    };
    const std::size_t words = words_of(begin, end);
    if (words <= kWordSizes[0]) {
      fill(LaunchArguments<kWordSizes[0]>{});
    } else if (words <= kWordSizes[1]) {
      fill(LaunchArguments<kWordSizes[1]>{});
    } else {
      fill(LaunchArguments<kWordSizes[2]>{});
    }
    ++launches;
    for (std::size_t i = begin; i < next; ++i) chunks_before += chunks_of(work[i].size);
    begin = next;
  }
  return launches;
}

}  // namespace freezeout
