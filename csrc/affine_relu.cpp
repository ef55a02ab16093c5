// affine_relu on the host: rows shared among threads, a loop for each width of vector.
#include "affine_relu.h"

#include <algorithm>

#include "half_types.h"

namespace freezeout {
namespace {

// With fewer elements a thread, a second thread costs more than it saves.
constexpr std::int64_t kElementsPerThread = 1 << 15;

// Compiled for each width of vector, chosen when the module loads.
#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__)
#define FREEZEOUT_EACH_VECTOR_WIDTH __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define FREEZEOUT_EACH_VECTOR_WIDTH
#endif

template <class T>
FREEZEOUT_HOST_DEVICE void update_rows(const AffineSlices<T>& s, std::int64_t begin, std::int64_t end) {
  const float* const scale = s.scale;
  const float* const shift = s.shift;
  const float floor = s.relu ? 0.0f : -__builtin_inff();
  for (std::int64_t r = begin; r < end; ++r) {
    const T* x = s.x + r * s.x_stride;
    T* y = s.y + r * s.y_stride;
    for (std::int64_t c = 0; c < s.channels; ++c) {
      const float value = load(x[c]) * scale[c] + shift[c];
      y[c] = store<T, float>(value < floor ? floor : value);
    }
  }
}

FREEZEOUT_EACH_VECTOR_WIDTH
void rows_float(const AffineSlices<float>& s, std::int64_t begin, std::int64_t end) { update_rows(s, begin, end); }
FREEZEOUT_EACH_VECTOR_WIDTH
void rows_bfloat16(const AffineSlices<BFloat16>& s, std::int64_t begin, std::int64_t end) {
  update_rows(s, begin, end);
}
void rows(const AffineSlices<float>& s, std::int64_t begin, std::int64_t end) { rows_float(s, begin, end); }
void rows(const AffineSlices<BFloat16>& s, std::int64_t begin, std::int64_t end) { rows_bfloat16(s, begin, end); }

}  // namespace

template <class T>
void affine_relu(const AffineSlices<T>& s, int threads) {
  const std::int64_t most = std::max<std::int64_t>(1, s.rows * s.channels / kElementsPerThread);
  const std::int64_t parts = std::min<std::int64_t>({most, std::max(threads, 1), std::max<std::int64_t>(s.rows, 1)});
#pragma omp parallel for num_threads(static_cast<int>(parts)) schedule(static, 1)
  for (std::int64_t part = 0; part < parts; ++part) {
    rows(s, s.rows * part / parts, s.rows * (part + 1) / parts);
  }
}

template void affine_relu(const AffineSlices<float>&, int);
template void affine_relu(const AffineSlices<BFloat16>&, int);

}  // namespace freezeout
