// m = beta1 * m + (1 - beta1) * g;  v = beta2 * v + (1 - beta2) * g^2;
// p -= lr / (1 - beta1^step) * m / (sqrt(v) / sqrt(1 - beta2^step) + eps)
//
// AdamW: p *= 1 - lr * weight_decay comes first.
// Adam: g + weight_decay * p takes g's place.
// amsgrad: the largest v so far takes v's place in the second line.
//
// THE formula of FusedAdamW and FusedAdam for one element, on host and device.
// The roundings are those of torch.optim.AdamW's for-loop, in its order. sgd_update.h says how to compile the formula.
//
// On a CPU, float and double are bit-equal to torch's loop but for the square root, for which torch calls MKL.
// MKL's AVX2 code rounds the roots of floats as IEEE 754 says, and then float is bit-equal.
// That code rounds the last place otherwise for 1.5 % of all double values, MKL's AVX-512 code for 0.6 % of all float
// and 0.8 % of all double values. Then the moments are still equal, and the parameter differs by at most 3 ulp after a
// step. That ulp is of the largest of three: the parameter before the step, the parameter after the step, and the
// change. The bound holds since one ulp of the root is up to two ulp of each quotient.
#pragma once

#include "param_group.h"

namespace freezeout {

struct AdamW {
  enum Option : unsigned { kAmsgrad = 4, kCoupled = 8 };  // kCoupled, Adam's decay, only together with kWeightDecay
  enum Coefficient { kBeta1, kBeta2, kEps };

  static constexpr int kStates = 3;  // exp_avg, exp_avg_sq, max_exp_avg_sq
  static constexpr bool kCounts = true;

  template <class R>
  struct Rates {
    R decay;  // 1 - lr * weight_decay, or weight_decay where the decay is coupled
    R lerp;   // positive: m moves towards g; else from g back: torch's lerp starts at the nearer end
    R beta2;
    R rest2;  // 1 - beta2
    R root_correction2;
    R root_reciprocal;
    R eps;
    R minus_step_size;
  };

  FREEZEOUT_HOST_DEVICE static constexpr bool is_valid(unsigned options) {
    return (options & kWeightDecay) || !(options & kCoupled);
  }
  FREEZEOUT_HOST_DEVICE static constexpr bool uses_state(int state, unsigned options) {
    return state < 2 || (options & kAmsgrad);
  }

  // step: how many updates there were, this one included.
  template <class R>
  FREEZEOUT_HOST_DEVICE static Rates<R> rates(const ParamGroup& group, double lr, float step) {
    const double beta1 = group.coefficients[kBeta1];
    const double beta2 = group.coefficients[kBeta2];
    const double correction1 = 1 - std::pow(beta1, static_cast<double>(step));
    const double correction2 = 1 - std::pow(beta2, static_cast<double>(step));
    const R weight = static_cast<R>(1 - beta1);
    const R root = static_cast<R>(std::sqrt(correction2));
    double kept = 1 - lr * group.weight_decay;
    double step_size = lr / correction1;
    if (group.options & kFloatRate) {
      kept = 1 - static_cast<float>(lr) * static_cast<float>(group.weight_decay);
      step_size = static_cast<float>(lr) / static_cast<float>(correction1);
    }
    return {static_cast<R>(group.options & kCoupled ? group.weight_decay : kept),
            weight < R{0.5} ? weight : weight - R{1},
            static_cast<R>(beta2),
            static_cast<R>(1 - beta2),
            root,
            R{1} / root,
            static_cast<R>(group.coefficients[kEps]),
            static_cast<R>(-step_size)};
  }

  // states[2] is neither read nor written without kAmsgrad.
  template <class R>
  FREEZEOUT_HOST_DEVICE static void update(R& p, R (&states)[kStates], R g, const Rates<R>& rates, unsigned options) {
    if (options & kMaximize) g = -g;
    if ((options & kWeightDecay) && (options & kCoupled)) g = std::fma(rates.decay, p, g);
    if ((options & kWeightDecay) && !(options & kCoupled)) p = p * rates.decay;
    states[0] = std::fma(rates.lerp, g - states[0], rates.lerp > 0 ? states[0] : g);
    states[1] = std::fma(rates.rest2 * g, g, rates.beta2 * states[1]);
    R largest = states[1];
    if (options & kAmsgrad) {
      // As torch.maximum: NaN where either is.
      if (states[2] > largest || states[2] != states[2]) largest = states[2];
      states[2] = largest;
    }
    const R root = root_over(std::sqrt(largest), rates.root_correction2, rates.root_reciprocal);
    p = p + rates.minus_step_size * states[0] / (root + rates.eps);
  }

  // x / c, rounded as a division rounds, in a third of a vector division's time.
  // y: 1 / c, rounded.
  // The first correction makes the quotient faithful. Then the remainder is exact, and the second correction rounds the
  // quotient right. Source: Markstein 1990, https://doi.org/10.1147/rd.341.0111.
  // x is a square root: in float 0 or between 2^-75 and 2^64. c is at most 1 and not tiny. So nothing overflows or
  // underflows that would not do so in a division. An infinite quotient is kept.
  template <class R>
  FREEZEOUT_HOST_DEVICE static R root_over(R x, R c, R y) {
    const R product = x * y;
    R quotient = std::fma(std::fma(-c, product, x), y, product);
    quotient = std::fma(std::fma(-c, quotient, x), y, quotient);
    return product < R{INFINITY} ? quotient : product;
  }
};

}  // namespace freezeout
