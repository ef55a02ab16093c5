// The table of tensors that host and device share: plain structs, and the search of a block for its tensor.
#pragma once

#include <cstdint>

#include "param_group.h"

namespace freezeout {

enum class Dtype : int { kFloat, kDouble, kHalf, kBFloat16 };

constexpr int kMaxStates = 3;

// As torch.amp.GradScaler rounds it.
FREEZEOUT_HOST_DEVICE float inverse_of_scale(float scale) {
  return static_cast<float>(1.0 / static_cast<double>(scale));
}

// One tensor as a device sees it; only `arrived` changes, and is 0 again after each launch.
struct TensorEntry {
  void* param;
  void* states[kMaxStates];  // the formula's; null where it uses none
  float* step;               // null unless the formula counts
  std::int64_t size;         // elements
  std::uint32_t chunk_end;   // chunks of this tensor and of all before it
  std::uint32_t group;
  std::uint32_t arrived;  // blocks of this launch that have read `step`: the last one advances it
  std::uint32_t unused;
};
static_assert(sizeof(TensorEntry) == 64, "64 bytes a tensor");

// Elements of one block's work: 2 to the 13 keeps 256 threads busy with 8 vectors each in float.
constexpr std::int64_t kChunk = 8192;

// At least one: an empty tensor's step is advanced too.
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
