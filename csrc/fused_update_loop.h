// A formula over a slice of one tensor: the host's loop. Each function is inlined into one that names an instruction
// set.
#pragma once

#include <cstdint>
#include <utility>

#include "fused_update.h"

namespace freezeout {

// Elements unscaled at a time, so that the update finds them in the first-level cache.
constexpr std::int64_t kUnscaleBlock = 1024;
// Bytes ahead in each operand. The hardware's own prefetching stops at each page, which costs a tenth of the bandwidth.
constexpr int kPrefetchAhead = 2048;
constexpr int kPrefetchBlock = 256;
constexpr int kCacheLine = 64;

template <class T>
struct Slice {
  T* param;
  T* states[kMaxStates];
  T* grad;
  std::int64_t size;
};

template <class T>
Slice<T> slice_of(const TensorWork& tensor, std::int64_t begin, std::int64_t size) {
  Slice<T> slice{static_cast<T*>(tensor.param) + begin, {}, static_cast<T*>(tensor.grad) + begin, size};
  for (int k = 0; k < kMaxStates; ++k) {
    slice.states[k] = tensor.states[k] ? static_cast<T*>(tensor.states[k]) + begin : nullptr;
  }
  return slice;
}

template <class F, unsigned kOptions, class T, class R>
FREEZEOUT_HOST_DEVICE void update_span(const Slice<T>& slice, std::int64_t begin, std::int64_t end,
                                       const typename F::template Rates<R>& rates) {
  T* __restrict param = slice.param;
  T* __restrict first = slice.states[0];
  T* __restrict second = slice.states[1];
  T* __restrict third = slice.states[2];
  const T* __restrict grad = slice.grad;
#pragma GCC ivdep
  for (std::int64_t i = begin; i < end; ++i) {
    R states[F::kStates] = {};
    if constexpr (F::uses_state(0, kOptions)) states[0] = load(first[i]);
    if constexpr (F::kStates > 1 && F::uses_state(1, kOptions)) states[1] = load(second[i]);
    if constexpr (F::kStates > 2 && F::uses_state(2, kOptions)) states[2] = load(third[i]);
    R p = load(param[i]);
    F::template update<R>(p, states, load(grad[i]), rates, kOptions);
    param[i] = store<T, R>(p);
    if constexpr (F::uses_state(0, kOptions)) first[i] = store<T, R>(states[0]);
    if constexpr (F::kStates > 1 && F::uses_state(1, kOptions)) second[i] = store<T, R>(states[1]);
    if constexpr (F::kStates > 2 && F::uses_state(2, kOptions)) third[i] = store<T, R>(states[2]);
  }
}

// Prefetches what the loop reads kPrefetchAhead bytes later. An address beyond the tensor is no error.
template <class F, unsigned kOptions, class T>
FREEZEOUT_HOST_DEVICE void prefetch_block(const Slice<T>& slice, std::int64_t begin) {
  const auto ask = [&](const T* array) {
    const char* const bytes = reinterpret_cast<const char*>(array + begin) + kPrefetchAhead;
    for (int k = 0; k < kPrefetchBlock; k += kCacheLine) __builtin_prefetch(bytes + k);
  };
  ask(slice.param);
  ask(slice.grad);
  for (int k = 0; k < F::kStates; ++k) {
    if (F::uses_state(k, kOptions)) ask(slice.states[k]);
  }
}

template <class F, unsigned kOptions, class T, class R>
FREEZEOUT_HOST_DEVICE void update_slice(const Slice<T>& slice, const typename F::template Rates<R> rates) {
  constexpr std::int64_t kBlock = kPrefetchBlock / sizeof(T);
  std::int64_t begin = 0;
  for (; begin + kBlock <= slice.size; begin += kBlock) {
    prefetch_block<F, kOptions>(slice, begin);
    update_span<F, kOptions, T, R>(slice, begin, begin + kBlock, rates);
  }
  update_span<F, kOptions, T, R>(slice, begin, slice.size, rates);
}

// The loop with `options` known to the compiler.
template <class F, class T, class R, unsigned... kOptions>
FREEZEOUT_HOST_DEVICE void update_with(unsigned options, const Slice<T>& slice,
                                       const typename F::template Rates<R>& rates,
                                       std::integer_sequence<unsigned, kOptions...>) {
  const auto update_if = [&](auto constant) __attribute__((always_inline)) {
    if constexpr (F::is_valid(constant.value)) {
      if (options == constant.value) update_slice<F, constant.value, T, R>(slice, rates);
    }
  };
  (update_if(std::integral_constant<unsigned, kOptions>{}), ...);
}

template <class T, class R>
FREEZEOUT_HOST_DEVICE void unscale(const Slice<T>& slice, float inverse_scale) {
  for (std::int64_t i = 0; i < slice.size; ++i) {
    slice.grad[i] = store<T, R>(load(slice.grad[i]) * static_cast<R>(inverse_scale));
  }
}

template <class F, class T>
FREEZEOUT_HOST_DEVICE void update(const Slice<T>& slice, const RatesOf<F, T>& rates, unsigned options,
                                  float inverse_scale) {
  using R = typename Compute<T>::type;
  const bool scaled = inverse_scale != 1.0f;
  const std::int64_t block_size = scaled ? kUnscaleBlock : slice.size;
  for (std::int64_t begin = 0; begin < slice.size; begin += block_size) {
    Slice<T> block = slice;
    block.param += begin;
    block.grad += begin;
    for (T*& state : block.states) state = state ? state + begin : nullptr;
    block.size = slice.size - begin < block_size ? slice.size - begin : block_size;
    if (scaled) unscale<T, R>(block, inverse_scale);
    update_with<F, T, R>(options, block, rates, std::make_integer_sequence<unsigned, kOptionSets>{});
  }
}

}  // namespace freezeout
