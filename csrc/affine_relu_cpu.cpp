#include "affine_relu_cpu.h"

#include <algorithm>
#include <cstring>

namespace freezeout {
namespace {

// Below this a second thread costs more than it saves.
constexpr int64_t kElementsPerThread = 1 << 15;

// Compiled for each width of vector, chosen when the module loads.
#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__)
#define FREEZEOUT_EACH_VECTOR_WIDTH __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define FREEZEOUT_EACH_VECTOR_WIDTH
#endif

inline float to_float(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof(value));
  return value;
}

inline uint16_t to_bfloat16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  if (value != value) return static_cast<uint16_t>((bits >> 16) | 0x40);  // rounding could turn a NaN into infinity
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

FREEZEOUT_EACH_VECTOR_WIDTH
void rows_float32(const AffineSlices& s, int64_t begin, int64_t end) {
  const float* const scale = s.scale;
  const float* const shift = s.shift;
  const float floor = s.relu ? 0.0f : -__builtin_inff();
  for (int64_t r = begin; r < end; ++r) {
    const float* x = static_cast<const float*>(s.x) + r * s.x_stride;
    float* y = static_cast<float*>(s.y) + r * s.y_stride;
    for (int64_t c = 0; c < s.channels; ++c) {
      const float value = x[c] * scale[c] + shift[c];
      y[c] = value < floor ? floor : value;
    }
  }
}

FREEZEOUT_EACH_VECTOR_WIDTH
void rows_bfloat16(const AffineSlices& s, int64_t begin, int64_t end) {
  const float* const scale = s.scale;
  const float* const shift = s.shift;
  const float floor = s.relu ? 0.0f : -__builtin_inff();
  for (int64_t r = begin; r < end; ++r) {
    const uint16_t* x = static_cast<const uint16_t*>(s.x) + r * s.x_stride;
    uint16_t* y = static_cast<uint16_t*>(s.y) + r * s.y_stride;
    for (int64_t c = 0; c < s.channels; ++c) {
      const float value = to_float(x[c]) * scale[c] + shift[c];
      y[c] = to_bfloat16(value < floor ? floor : value);
    }
  }
}

}  // namespace

void affine_relu_cpu(const AffineSlices& s, Storage storage, int threads) {
  const int64_t most = std::max<int64_t>(1, s.rows * s.channels / kElementsPerThread);
  const int64_t parts = std::min<int64_t>({most, std::max(threads, 1), std::max<int64_t>(s.rows, 1)});
  const auto run = storage == Storage::kFloat32 ? rows_float32 : rows_bfloat16;
#pragma omp parallel for num_threads(static_cast<int>(parts)) schedule(static, 1)
  for (int64_t part = 0; part < parts; ++part) {
    run(s, s.rows * part / parts, s.rows * (part + 1) / parts);
  }
}

}  // namespace freezeout
