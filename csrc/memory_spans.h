// Stretches of memory, and whether any two of them overlap.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "fused_update.h"

namespace freezeout {

class MemorySpans {
 public:
  // What an update of the tensor writes: its parameter, its states and its step.
  void add_written(const TensorWork& work, int item_size) {
    add(work.param, work.size * item_size);
    for (const void* state : work.states) add(state, work.size * item_size);
    add(work.step, sizeof(float));
  }
  // A null pointer adds nothing.
  void add(const void* begin, std::int64_t bytes) {
    const auto address = reinterpret_cast<std::uintptr_t>(begin);
    if (begin && bytes > 0) spans_.push_back({address, address + static_cast<std::uintptr_t>(bytes)});
  }
  // To be called once all are added. Returns whether no two overlap.
  bool sort_and_are_apart() {
    std::sort(spans_.begin(), spans_.end(), [](const Span& a, const Span& b) { return a.begin < b.begin; });
    return std::adjacent_find(spans_.begin(), spans_.end(),
                              [](const Span& a, const Span& b) { return a.end > b.begin; }) == spans_.end();
  }
  // Whether some bytes overlap one of the sorted spans, which are apart.
  bool overlap(const void* begin, std::int64_t bytes) const {
    const auto address = reinterpret_cast<std::uintptr_t>(begin);
    const auto next = std::lower_bound(spans_.begin(), spans_.end(), address + static_cast<std::uintptr_t>(bytes),
                                       [](const Span& span, std::uintptr_t end) { return span.begin < end; });
    return bytes > 0 && next != spans_.begin() && (next - 1)->end > address;
  }

 private:
  struct Span {
    std::uintptr_t begin;
    std::uintptr_t end;
  };
  std::vector<Span> spans_;
};

}  // namespace freezeout
