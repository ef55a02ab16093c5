// A param group as the formulas read it, and its learning rate at a step of a schedule. For host and device.
#pragma once

#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define FREEZEOUT_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define FREEZEOUT_HOST_DEVICE inline __attribute__((always_inline))
#endif

namespace freezeout {

// What a formula does with a tensor, one bit each. Each formula adds bits of its own, from 4 on.
enum Option : unsigned { kWeightDecay = 1, kMaximize = 2 };
constexpr unsigned kOptionSets = 16;
// A bit beyond those of the formulas: the rate is a float32 tensor, with which torch computes in float.
constexpr std::uint64_t kFloatRate = kOptionSets;

struct ParamGroup {
  double lr;         // the rate itself, or the schedule's peak
  double milestone;  // in steps: a scheduled rate is 0 from here on
  double warmup;     // steps of a scheduled rate's linear rise
  double weight_decay;
  double coefficients[3];  // see enum Coefficient of each formula
  std::uint64_t options;
};
static_assert(sizeof(ParamGroup) == 64, "passed to kernels as eight 8-byte words");

// peak * cos^2(pi / 2 * (step - warmup) / (milestone - warmup)); 0 from the milestone on.
// Below warmup: peak * (step + 1) / (warmup + 1).
// FreezeOut's annealing has (1 + cos) / 2, which cancels near the end. cos^2 of half the angle equals it and does not.
FREEZEOUT_HOST_DEVICE double scheduled_rate(const ParamGroup& group, double step) {
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

}  // namespace freezeout
