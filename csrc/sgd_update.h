// d = g + weight_decay * p;  v = momentum * b + (1 - dampening) * d;  p -= lr * (nesterov ? d + momentum * v : v)
//
// THE formula of FusedSGD for one element, on host and device, in torch.optim.SGD's order of roundings: torch fuses
// `add(x, alpha)` into one fma and rounds `mul_(momentum)` by itself. Compile without implicit contraction
// (-ffp-contract=off, -fmad=false): then float and double are bit-equal to torch's for-loop on a CPU with FMA.
// On CUDA torch's foreach and for-loop kernels are compiled with -fmad and contract the same a + alpha * b, so the
// result is the same wherever nvcc did contract there: at most 1 ulp of the larger addend per operation.
#pragma once

#include <cmath>

#ifdef __CUDACC__
#define FREEZEOUT_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define FREEZEOUT_HOST_DEVICE inline __attribute__((always_inline))
#endif

namespace freezeout {

// What the update of a tensor does, one bit each.
enum Option : unsigned {
  kWeightDecay = 1,
  kMaximize = 2,
  kMomentum = 4,
  kNesterov = 8,   // with kMomentum only
  kFirstStep = 16  // with kMomentum only: v = d, the buffer is not read
};

// R: float for float, half and bfloat16 tensors; double for double.
template <class R>
struct Rates {
  R lr;
  R momentum;
  R undamped;  // 1 - dampening, rounded from double as torch does
  R weight_decay;
};

template <class R>
struct Updated {
  R param;
  R buffer;
};

// `b` is not used without kMomentum, nor with kFirstStep.
template <class R>
FREEZEOUT_HOST_DEVICE Updated<R> sgd_update(R p, R b, R g, const Rates<R>& rates, unsigned options) {
  R d = options & kMaximize ? -g : g;
  // Not for a decay of 0: 0 * p is NaN where p is infinite.
  if (options & kWeightDecay) d = std::fma(rates.weight_decay, p, d);
  R u = d;
  if (options & kMomentum) {
    b = options & kFirstStep ? d : std::fma(rates.undamped, d, rates.momentum * b);
    u = options & kNesterov ? std::fma(rates.momentum, b, d) : b;
  }
  return {std::fma(-rates.lr, u, p), b};
}

}  // namespace freezeout
