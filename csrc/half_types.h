// float16 and bfloat16 as torch stores them: 16 bits in memory, float in registers, rounded to nearest even.
//
// On the host in plain integer code, which vectorises. GCC's C++ has no _Float16 before GCC 13.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

#include "param_group.h"

namespace freezeout {

struct Half {
  std::uint16_t bits;
};
struct BFloat16 {
  std::uint16_t bits;
};

template <class T>
struct Compute {
  using type = float;
};
template <>
struct Compute<double> {
  using type = double;
};

template <class To, class From>
FREEZEOUT_HOST_DEVICE To bit_copy(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_copy keeps the size");
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

FREEZEOUT_HOST_DEVICE float load(float x) { return x; }
FREEZEOUT_HOST_DEVICE double load(double x) { return x; }

FREEZEOUT_HOST_DEVICE float load(BFloat16 x) { return bit_copy<float>(std::uint32_t{x.bits} << 16); }

FREEZEOUT_HOST_DEVICE float load(Half x) {
#ifdef __CUDA_ARCH__
  return __half2float(bit_copy<__half>(x.bits));
#else
  // The 15 bits below the sign, placed where a float's are, read as the value times 2^-112. Subnormals are exact too.
  const float magnitude = bit_copy<float>((std::uint32_t{x.bits} & 0x7fffu) << 13) * 0x1p112f;
  std::uint32_t bits = bit_copy<std::uint32_t>(magnitude);
  bits |= magnitude >= 0x1p16f ? 0x7f800000u : 0u;  // infinities and NaN
  return bit_copy<float>(bits | (std::uint32_t{x.bits} & 0x8000u) << 16);
#endif
}

template <class T, class R>
FREEZEOUT_HOST_DEVICE T store(R x);

template <>
FREEZEOUT_HOST_DEVICE float store<float, float>(float x) {
  return x;
}
template <>
FREEZEOUT_HOST_DEVICE double store<double, double>(double x) {
  return x;
}

template <>
FREEZEOUT_HOST_DEVICE BFloat16 store<BFloat16, float>(float x) {
#ifdef __CUDA_ARCH__
  return {bit_copy<std::uint16_t>(__float2bfloat16_rn(x))};
#else
  const std::uint32_t bits = bit_copy<std::uint32_t>(x);
  // Half a unit in the last place, less one where the kept part is even: ties go to even.
  const std::uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  return {static_cast<std::uint16_t>(x != x ? 0x7fc0u : rounded)};
#endif
}

template <>
FREEZEOUT_HOST_DEVICE Half store<Half, float>(float x) {
#ifdef __CUDA_ARCH__
  return {bit_copy<std::uint16_t>(__float2half_rn(x))};
#else
  const std::uint32_t bits = bit_copy<std::uint32_t>(x);
  const std::uint32_t sign = bits >> 16 & 0x8000u;
  const std::uint32_t magnitude = bits & 0x7fffffffu;
  // Normal halves: rebias the exponent by 112, round the 13 dropped bits to even; a carry grows the exponent.
  const std::uint32_t normal = (magnitude - (112u << 23) + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
  // Subnormal halves: after adding 1/2 the last place counts units of 2^-24, and the addition itself has rounded.
  const std::uint32_t subnormal = bit_copy<std::uint32_t>(bit_copy<float>(magnitude) + 0.5f) - 0x3f000000u;
  std::uint32_t half = magnitude < 0x38800000u ? subnormal : normal;  // 2^-14
  half = magnitude >= 0x477ff000u ? 0x7c00u : half;                   // 65520 rounds to infinity
  half = magnitude > 0x7f800000u ? 0x7e00u : half;                    // NaN
  return {static_cast<std::uint16_t>(sign | half)};
#endif
}

}  // namespace freezeout
