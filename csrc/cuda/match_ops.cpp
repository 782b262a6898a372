// The ops of match.h on a CUDA device.
#include <string>

#include "../match.h"
#include "device.h"
#include "key_metric_params.h"

namespace fastast {

Tensor key_metric_cuda(const Tensor& k_) {
  const Dtype dtype = dtype_of(k_);
  const int64_t d = k_.size(3), widest = dtype == Dtype::kFloat ? 128 : 256;
  if (d % 8 != 0 || d < 8 || d > widest)
    throw std::runtime_error("k must have a head dimension of a multiple of 8 up to " +
                             std::to_string(widest) + ", got " + std::to_string(d));
  const OnDevice device(k_);
  const Tensor k = in_packs(k_);
  const Tensor out = torch::stable::new_empty(k, {k.size(0), k.size(2), d}, ScalarType::Float);
  launch(KeyMetric{k.const_data_ptr(), static_cast<float*>(out.mutable_data_ptr()), k.size(0),
                   k.size(2), k.size(1), d, k.stride(0), k.stride(1), k.stride(2)},
         dtype, device.stream());
  return out;
}

}  // namespace fastast
