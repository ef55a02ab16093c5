// y[r, c] = relu?(scale[c] * x[r, c] + shift[c]) on channel slices of channels-last images.
#pragma once

#include <cstdint>

namespace freezeout {

template <class T>  // float or BFloat16
struct AffineSlices {
  const T* x;          // [rows, channels], row r at x + r * x_stride
  T* y;                // likewise, with y_stride; y may be x where the strides are equal
  const float* scale;  // [channels]
  const float* shift;  // [channels]
  std::int64_t rows;   // N * H * W
  std::int64_t channels;
  std::int64_t x_stride;  // channels of the buffer that x is a slice of
  std::int64_t y_stride;
  bool relu;
};

// NaN passes through the ReLU, as in torch. bfloat16 is computed in float32 and rounded to nearest even.
template <class T>
void affine_relu(const AffineSlices<T>& slices, int threads);

}  // namespace freezeout
