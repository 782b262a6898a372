// Arguments of the key metric's kernel (key_metric.h says what it computes), and its launch.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace fastast {

struct KeyMetric {
  const void* k;
  float* out;  // [B, N, D]
  int64_t batch, n, heads, d;
  int64_t sample, head, token;  // strides in elements
};

// On a stream (cudaStream_t) of the current device. Throws std::runtime_error if the launch fails.
void launch(const KeyMetric& p, Dtype dtype, void* stream);

}  // namespace fastast
