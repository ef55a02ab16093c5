// The table of tensors that host and device share: plain structs, and the search of a block for its tensor.
#pragma once

#include <cmath>
#include <cstdint>

#include "sgd_update.h"

namespace freezeout {

enum class Dtype : int { kFloat, kDouble, kHalf, kBFloat16 };

// A group's hyperparameters. With a device step counter the rate is scheduled_rate, else it is `lr`.
struct GroupRates {
  double lr;         // the rate itself, or the schedule's peak
  double milestone;  // in steps: the rate is 0 from here on
  double warmup;     // steps of linear rise
  double momentum;
  double undamped;  // 1 - dampening
  double weight_decay;
  std::uint64_t options;  // of Option; kFirstStep is per tensor
};
static_assert(sizeof(GroupRates) == 56, "passed to kernels as seven 8-byte words");

// peak * cos^2(pi / 2 * (step - warmup) / (milestone - warmup)), 0 from the milestone on; FreezeOut's annealing with
// cos^2 of half the angle for (1 + cos) / 2, which cancels near the end.
FREEZEOUT_HOST_DEVICE double scheduled_rate(const GroupRates& group, double step) {
  if (step >= group.milestone) return 0.0;
  if (step < group.warmup) return group.lr * (step + 1.0) / (group.warmup + 1.0);
  const double progress = (step - group.warmup) / (group.milestone - group.warmup);
#ifdef __CUDA_ARCH__
  const double cosine = cospi(0.5 * progress);  // no slow path for large angles, hence no stack
#else
  const double cosine = std::cos(1.57079632679489661923 * progress);
#endif
  return group.lr * cosine * cosine;
}

template <class R>
FREEZEOUT_HOST_DEVICE Rates<R> rates_of(const GroupRates& group, double lr) {
  return {static_cast<R>(lr), static_cast<R>(group.momentum), static_cast<R>(group.undamped),
          static_cast<R>(group.weight_decay)};
}

// As torch.amp.GradScaler rounds it.
FREEZEOUT_HOST_DEVICE float inverse_of_scale(float scale) {
  return static_cast<float>(1.0 / static_cast<double>(scale));
}

// One tensor as a device sees it; does not change from step to step.
struct TensorEntry {
  void* param;
  void* buffer;             // momentum_buffer, null without momentum
  std::int64_t size;        // elements
  std::uint32_t chunk_end;  // chunks of this tensor and of all before it
  std::uint32_t group;
};
static_assert(sizeof(TensorEntry) == 32, "32 bytes a tensor");

// A gradient's address, its lowest bit set on the tensor's first step; 0 for a tensor that is not updated.
FREEZEOUT_HOST_DEVICE std::uint64_t tag_gradient(std::uint64_t address, bool first) {
  return address | (first ? 1u : 0u);
}

// Elements of one block's work: 2 to the 13 keeps 256 threads busy with 8 vectors each in float.
constexpr std::int64_t kChunk = 8192;

FREEZEOUT_HOST_DEVICE std::uint32_t chunks_of(std::int64_t size) {
  return static_cast<std::uint32_t>((size + kChunk - 1) / kChunk);
}

// The tensor that holds `chunk`: the first entry whose chunk_end exceeds it. Entries without chunks are never found.
FREEZEOUT_HOST_DEVICE int find_tensor(const TensorEntry* entries, int count, std::uint32_t chunk) {
  int low = 0;
  int high = count - 1;
  while (low < high) {
    const int middle = (low + high) / 2;
    if (entries[middle].chunk_end > chunk) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return low;
}

}  // namespace freezeout
