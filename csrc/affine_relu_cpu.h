// y[r, c] = relu?(scale[c] * x[r, c] + shift[c]) on channel slices of channels-last images.
#pragma once

#include <cstdint>

namespace freezeout {

enum class Storage { kFloat32, kBFloat16 };

struct AffineSlices {
  const void* x;       // [rows, channels], row r at x + r * x_stride elements
  void* y;             // likewise; y == x with equal strides is allowed
  const float* scale;  // [channels]
  const float* shift;  // [channels]
  int64_t rows;        // N * H * W
  int64_t channels;
  int64_t x_stride;  // channels of the buffer that x is a slice of
  int64_t y_stride;
  bool relu;
};

// NaN passes through the ReLU, as in torch. bfloat16 is computed in float32 and rounded to nearest even.
void affine_relu_cpu(const AffineSlices& slices, Storage storage, int threads);

}  // namespace freezeout
