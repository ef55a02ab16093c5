// The table of tensors that host and device share, and a block's search for its tensor.
#pragma once

#include <cstdint>

#include "param_group.h"

namespace freezeout {

enum class Dtype : int { kFloat, kDouble, kHalf, kBFloat16 };

// Bytes of an element.
inline int item_size_of(Dtype dtype) { return dtype == Dtype::kFloat ? 4 : dtype == Dtype::kDouble ? 8 : 2; }

constexpr int kMaxStates = 3;

// 1 / scale, rounded as torch.amp.GradScaler rounds it.
FREEZEOUT_HOST_DEVICE float inverse_of_scale(float scale) {
  return static_cast<float>(1.0 / static_cast<double>(scale));
}

// One tensor as a device sees it. Only `arrived` changes, and each launch leaves it at 0.
struct TensorEntry {
  void* param;
  void* states[kMaxStates];  // null for a state that the formula does not use
  float* step;               // null unless the formula counts
  std::int64_t size;         // elements
  std::uint32_t chunk_end;   // chunks of this tensor and of all before it
  std::uint32_t group;
  std::uint32_t arrived;  // how many blocks of this launch have read `step`; the last one advances `step`
  std::uint32_t unused;
};
static_assert(sizeof(TensorEntry) == 64, "64 bytes a tensor");

// Elements of one block's work. 2^13 of them are 8 float vectors for each of 256 threads.
constexpr std::int64_t kChunk = 8192;

// At least one chunk, since an empty tensor's step is advanced too.
FREEZEOUT_HOST_DEVICE std::uint32_t chunks_of(std::int64_t size) {
  return size == 0 ? 1u : static_cast<std::uint32_t>((size + kChunk - 1) / kChunk);
}

// The tensor that holds `chunk`: the first entry whose chunk_end exceeds it.
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
