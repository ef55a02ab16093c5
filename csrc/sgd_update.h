// d = g + weight_decay * p;  v = momentum * b + (1 - dampening) * d;  p -= lr * (nesterov ? d + momentum * v : v)
//
// THE formula of FusedSGD for one element, on host and device.
// The roundings are those of torch.optim.SGD, in its order: torch fuses `add(x, alpha)` into one fma and rounds
// `mul_(momentum)` by itself.
// Compile without implicit contraction (-ffp-contract=off, -fmad=false). Then float and double are bit-equal to torch's
// for-loop on a CPU with FMA.
// torch's CUDA kernels, foreach and for-loop, are compiled with -fmad, which may contract the same a + alpha * b.
// Where nvcc contracted there, the result is the same. Elsewhere it differs by at most 1 ulp of the larger addend per
// operation.
#pragma once

#include "param_group.h"

namespace freezeout {

struct Sgd {
  enum Option : unsigned { kMomentum = 4, kNesterov = 8 };  // kNesterov only together with kMomentum
  enum Coefficient { kMomentumOf, kUndamped };  // momentum; 1 - dampening, rounded from double as torch rounds it

  static constexpr int kStates = 1;  // momentum_buffer, which starts as zeros
  static constexpr bool kCounts = false;

  // R: float for float, half and bfloat16 tensors; double for double.
  template <class R>
  struct Rates {
    R lr;
    R momentum;
    R undamped;
    R weight_decay;
  };

  FREEZEOUT_HOST_DEVICE static constexpr bool is_valid(unsigned options) {
    return (options & kMomentum) || !(options & kNesterov);
  }
  FREEZEOUT_HOST_DEVICE static constexpr bool uses_state(int, unsigned options) { return options & kMomentum; }

  template <class R>
  FREEZEOUT_HOST_DEVICE static Rates<R> rates(const ParamGroup& group, double lr, float /* step */) {
    return {static_cast<R>(lr), static_cast<R>(group.coefficients[kMomentumOf]),
            static_cast<R>(group.coefficients[kUndamped]), static_cast<R>(group.weight_decay)};
  }

  // states[0] is neither read nor written without kMomentum.
  template <class R>
  FREEZEOUT_HOST_DEVICE static void update(R& p, R (&states)[kStates], R g, const Rates<R>& rates, unsigned options) {
    R d = options & kMaximize ? -g : g;
    // Not for a decay of 0: 0 * p is NaN where p is infinite.
    if (options & kWeightDecay) d = std::fma(rates.weight_decay, p, d);
    R u = d;
    if (options & kMomentum) {
      states[0] = std::fma(rates.undamped, d, rates.momentum * states[0]);
      u = options & kNesterov ? std::fma(rates.momentum, states[0], d) : states[0];
    }
    p = std::fma(-rates.lr, u, p);
  }
};

}  // namespace freezeout
