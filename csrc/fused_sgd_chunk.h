// One block's work of fused_sgd_cuda: the kernel's body, compiled for the device and, for tests, for the host.
#pragma once

#include <cstdint>
#include <cstring>
#include <vector>

#include "fused_sgd.h"
#include "half_types.h"

namespace freezeout {

constexpr int kThreads = 256;
// Vectors in flight per operand and thread.
constexpr int kInFlight = 2;
constexpr int kGroupWords = sizeof(GroupRates) / sizeof(std::uint64_t);

// A kernel's arguments; all of them together may have 32,764 bytes (CUDA 12.1 and later).
template <int kWords>
struct LaunchArguments {
  DeviceInputs inputs;
  std::int32_t first_tensor;  // of the table
  std::int32_t num_tensors;
  std::uint32_t first_chunk;  // block 0's
  std::uint32_t first_group;
  std::uint64_t words[kWords];  // num_tensors tagged gradients, then the GroupRates from first_group on
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
// Pointers out of a table are generic to the compiler; these are global, which makes LDG and STG of them.
#define FREEZEOUT_ASSUME_GLOBAL(pointer) __builtin_assume(__isGlobal(pointer))
#define FREEZEOUT_UNROLL _Pragma("unroll")
#else
#define FREEZEOUT_ASSUME_GLOBAL(pointer)
#define FREEZEOUT_UNROLL
#endif

// What a block works on.
template <class T>
struct Chunk {
  T* param;
  T* buffer;
  T* grad;
  std::int64_t size;
  unsigned options;
};

FREEZEOUT_HOST_DEVICE bool is_aligned(const void* pointer) {
  return reinterpret_cast<std::uintptr_t>(pointer) % 16 == 0;
}

template <class T, class R>
FREEZEOUT_HOST_DEVICE void update_element(T& param, T& buffer, T& grad, const Rates<R>& rates, unsigned options,
                                          R inverse_scale) {
  // Rounded before use: the update sees what the gradient is left with.
  grad = store<T, R>(load(grad) * inverse_scale);
  const Updated<R> updated = sgd_update<R>(load(param), load(buffer), load(grad), rates, options);
  param = store<T, R>(updated.param);
  buffer = store<T, R>(updated.buffer);
}

// The elements [begin, chunk.size), one by one.
template <class T, class R>
FREEZEOUT_HOST_DEVICE void update_scalars(const Chunk<T>& chunk, std::int64_t begin, const Rates<R>& rates,
                                          R inverse_scale, bool scaled, int thread) {
  const bool reads = (chunk.options & kMomentum) && !(chunk.options & kFirstStep);
  for (std::int64_t i = begin + thread; i < chunk.size; i += kThreads) {
    T param = chunk.param[i];
    T buffer = reads ? chunk.buffer[i] : T{};
    T grad = chunk.grad[i];
    update_element(param, buffer, grad, rates, chunk.options, inverse_scale);
    chunk.param[i] = param;
    if (chunk.options & kMomentum) chunk.buffer[i] = buffer;
    if (scaled) chunk.grad[i] = grad;
  }
}

// As many whole vectors as there are; returns the number of elements done. Param and buffer are aligned; a gradient may
// be off (DDP's bucket views are by 8 bytes) and is then read lane by lane, out of the same cache lines.
template <class T, class R>
FREEZEOUT_HOST_DEVICE std::int64_t update_vectors(const Chunk<T>& chunk, const Rates<R>& rates, R inverse_scale,
                                                  bool scaled, int thread) {
  using V = Vector<T>;
  constexpr int kLanes = V::kLanes;
  const bool reads = (chunk.options & kMomentum) && !(chunk.options & kFirstStep);
  const bool grad_aligned = is_aligned(chunk.grad);
  const std::int64_t count = chunk.size / kLanes;
  V* const params = reinterpret_cast<V*>(chunk.param);
  V* const buffers = reinterpret_cast<V*>(chunk.buffer);
  V* const grads = reinterpret_cast<V*>(chunk.grad);

  for (std::int64_t i = thread; i < count; i += kInFlight * kThreads) {
    V param[kInFlight], buffer[kInFlight], grad[kInFlight];
    FREEZEOUT_UNROLL
    for (int k = 0; k < kInFlight; ++k) {
      const std::int64_t j = i + k * kThreads;
      if (j >= count) continue;
      param[k] = params[j];
      if (reads) buffer[k] = buffers[j];
      if (grad_aligned) {
        grad[k] = grads[j];
      } else {
        FREEZEOUT_UNROLL
        for (int lane = 0; lane < kLanes; ++lane) grad[k].lane[lane] = chunk.grad[j * kLanes + lane];
      }
    }
    FREEZEOUT_UNROLL
    for (int k = 0; k < kInFlight; ++k) {
      const std::int64_t j = i + k * kThreads;
      if (j >= count) continue;
      if (!reads) buffer[k] = V{};
      FREEZEOUT_UNROLL
      for (int lane = 0; lane < kLanes; ++lane) {
        update_element(param[k].lane[lane], buffer[k].lane[lane], grad[k].lane[lane], rates, chunk.options,
                       inverse_scale);
      }
      params[j] = param[k];
      if (chunk.options & kMomentum) buffers[j] = buffer[k];
      if (scaled && grad_aligned) {
        grads[j] = grad[k];
      } else if (scaled) {
        FREEZEOUT_UNROLL
        for (int lane = 0; lane < kLanes; ++lane) chunk.grad[j * kLanes + lane] = grad[k].lane[lane];
      }
    }
  }
  return count * kLanes;
}

// The block's tensor within the launch, or -1 where there is nothing to do.
template <int kWords>
FREEZEOUT_HOST_DEVICE int tensor_of_block(const LaunchArguments<kWords>& arguments, std::uint32_t block) {
  if (arguments.inputs.found_inf && *arguments.inputs.found_inf != 0.0f) return -1;
  const int tensor = find_tensor(arguments.inputs.table + arguments.first_tensor, arguments.num_tensors,
                                 arguments.first_chunk + block);
  return arguments.words[tensor] ? tensor : -1;
}

template <int kWords>
FREEZEOUT_HOST_DEVICE const GroupRates& group_of_tensor(const LaunchArguments<kWords>& arguments, int tensor) {
  const std::uint32_t group = arguments.inputs.table[arguments.first_tensor + tensor].group - arguments.first_group;
  return reinterpret_cast<const GroupRates*>(arguments.words + arguments.num_tensors)[group];
}

template <int kWords>
FREEZEOUT_HOST_DEVICE double rate_of_group(const LaunchArguments<kWords>& arguments, const GroupRates& group) {
  return arguments.inputs.step ? scheduled_rate(group, static_cast<double>(*arguments.inputs.step)) : group.lr;
}

// `thread`'s share of the block's work, at the rate that rate_of_group gave.
template <class T, int kWords>
FREEZEOUT_HOST_DEVICE void update_block(const LaunchArguments<kWords>& arguments, std::uint32_t block, int tensor,
                                        double lr, int thread) {
  using R = typename Compute<T>::type;
  const TensorEntry entry = arguments.inputs.table[arguments.first_tensor + tensor];
  const GroupRates& group = group_of_tensor(arguments, tensor);
  const std::uint64_t tagged = arguments.words[tensor];
  const std::uint32_t chunk_in_tensor = arguments.first_chunk + block - (entry.chunk_end - chunks_of(entry.size));
  const std::int64_t begin = std::int64_t{chunk_in_tensor} * kChunk;

  Chunk<T> chunk;
  chunk.options = static_cast<unsigned>(group.options);
  if ((chunk.options & kMomentum) && (tagged & 1)) chunk.options |= kFirstStep;
  chunk.param = static_cast<T*>(entry.param) + begin;
  chunk.buffer = chunk.options & kMomentum ? static_cast<T*>(entry.buffer) + begin : nullptr;
  chunk.grad = reinterpret_cast<T*>(tagged & ~std::uint64_t{1}) + begin;
  chunk.size = entry.size - begin < kChunk ? entry.size - begin : kChunk;
  FREEZEOUT_ASSUME_GLOBAL(chunk.param);
  FREEZEOUT_ASSUME_GLOBAL(chunk.grad);
  // A null buffer is never dereferenced.
  FREEZEOUT_ASSUME_GLOBAL(chunk.buffer);

  const bool scaled = arguments.inputs.grad_scale != nullptr;
  const R inverse_scale = scaled ? static_cast<R>(inverse_of_scale(*arguments.inputs.grad_scale)) : R{1};
  const Rates<R> rates = rates_of<R>(group, lr);
  std::int64_t done = 0;
  if (is_aligned(chunk.param) && is_aligned(chunk.buffer))
    done = update_vectors(chunk, rates, inverse_scale, scaled, thread);
  update_scalars(chunk, done, rates, inverse_scale, scaled, thread);
}

// Calls launch(arguments, num_blocks) for consecutive tensors, as many at a time as the arguments hold. Tensors without
// a gradient at either end of a launch get no blocks.
template <class Launch>
int for_each_launch(const std::vector<TensorWork>& work, const std::vector<GroupRates>& groups,
                    const DeviceInputs& inputs, const Launch& launch) {
  const auto words_of = [&](std::size_t begin, std::size_t end) {
    return end - begin + kGroupWords * (work[end - 1].group - work[begin].group + std::size_t{1});
  };
  const auto idle = [](const TensorWork& tensor) { return !tensor.grad || tensor.size == 0; };
  int launches = 0;
  std::uint32_t chunks_before = 0;
  for (std::size_t begin = 0; begin < work.size();) {
    if (idle(work[begin])) {
      chunks_before += chunks_of(work[begin].size);
      ++begin;
      continue;
    }
    std::size_t end = begin + 1;
    while (end < work.size() && words_of(begin, end + 1) <= kMaxWords) ++end;
    const std::size_t next = end;
    while (idle(work[end - 1])) --end;

    const auto fill = [&](auto& arguments) {
      arguments.inputs = inputs;
      arguments.first_tensor = static_cast<std::int32_t>(begin);
      arguments.num_tensors = static_cast<std::int32_t>(end - begin);
      arguments.first_chunk = chunks_before;
      arguments.first_group = work[begin].group;
      std::uint32_t blocks = 0;
      for (std::size_t i = begin; i < end; ++i) {
        blocks += chunks_of(work[i].size);
        arguments.words[i - begin] =
            work[i].grad ? tag_gradient(reinterpret_cast<std::uint64_t>(work[i].grad), work[i].first) : 0;
      }
      const std::size_t num_groups = work[end - 1].group - work[begin].group + std::size_t{1};
      std::memcpy(arguments.words + (end - begin), &groups[work[begin].group], num_groups * sizeof(GroupRates));
      launch(arguments, blocks);
    };
    const std::size_t words = words_of(begin, end);
    if (words <= kWordSizes[0]) {
      LaunchArguments<kWordSizes[0]> arguments;
      fill(arguments);
    } else if (words <= kWordSizes[1]) {
      LaunchArguments<kWordSizes[1]> arguments;
      fill(arguments);
    } else {
      LaunchArguments<kWordSizes[2]> arguments;
      fill(arguments);
    }
    ++launches;
    for (std::size_t i = begin; i < next; ++i) chunks_before += chunks_of(work[i].size);
    begin = next;
  }
  return launches;
}

}  // namespace freezeout
