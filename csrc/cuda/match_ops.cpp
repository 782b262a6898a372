// The ops of match.h on a CUDA device.
#include <string>
#include <vector>

#include "../match.h"
#include "device.h"
#include "key_metric_params.h"
#include "match_params.h"

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

Tensor bipartite_match_cuda(const Tensor& metric_, int64_t r, bool class_token,
                            bool distill_token) {
  const Dtype dtype = dtype_of(metric_);
  const Tensor metric = metric_.stride(2) == 1 ? metric_ : torch::stable::contiguous(metric_);
  const int64_t batch = metric.size(0), n = metric.size(1), na = (n + 1) / 2;
  const OnDevice device(metric);
  const auto integers = [&](std::vector<int64_t> shape) {
    return torch::stable::new_empty(metric, shape, ScalarType::Int);
  };
  const Tensor best = torch::stable::new_empty(metric, {batch, na}, ScalarType::Float);
  const Tensor partner = integers({batch, na}), rank = integers({batch, na});
  const Tensor arrived = torch::stable::new_zeros(metric, {batch}, ScalarType::Int);
  const Tensor rows = integers({batch, n});
  const auto data = [](const Tensor& t) { return static_cast<int32_t*>(t.mutable_data_ptr()); };
  launch(Match{metric.const_data_ptr(), batch, n, metric.size(2), r, metric.stride(0),
               metric.stride(1), class_token, distill_token,
               static_cast<float*>(best.mutable_data_ptr()), data(partner), data(rank),
               data(arrived), data(rows)},
         dtype, device.stream());
  return rows;
}

}  // namespace fastast
