// The ops of match.h on a CUDA device.
#include <optional>
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

namespace {

Tensor integers(const Tensor& like, std::vector<int64_t> shape) {
  return torch::stable::new_empty(like, shape, ScalarType::Int);
}

int32_t* data(const Tensor& t) { return static_cast<int32_t*>(t.mutable_data_ptr()); }

// What a match of N tokens writes: the assignment, and its sources if wanted.
struct Matched {
  Matched(const Tensor& like, int64_t n, int64_t r, bool wants_sources)
      : rows(integers(like, {like.size(0), n})) {
    if (wants_sources) sources = integers(like, {like.size(0), 2 * n - r + 1});
  }
  int32_t* sources_data() const { return sources ? data(*sources) : nullptr; }

  Tensor rows;
  std::optional<Tensor> sources;
};

Matched match(const Tensor& metric_, int64_t r, bool class_token, bool distill_token,
              bool wants_sources) {
  const Dtype dtype = dtype_of(metric_);
  const OnDevice device(metric_);
  const int64_t batch = metric_.size(0), n = metric_.size(1), c = metric_.size(2);
  const int64_t na = (n + 1) / 2;
  const Matched out(metric_, n, r, wants_sources);

  ClusterMatch in_cluster = {
      nullptr,           batch, n, c, 1, r, 0, 0, 0, class_token, distill_token, 0, data(out.rows),
      out.sources_data()};
  if (r > 0 && can_match_in_cluster(in_cluster)) {
    const Tensor metric = in_packs(metric_);
    in_cluster.tokens = metric.const_data_ptr();
    in_cluster.sample = metric.stride(0);
    in_cluster.token = metric.stride(1);
    launch(in_cluster, dtype, device.stream());
    return out;
  }
  const Tensor metric = metric_.stride(2) == 1 ? metric_ : torch::stable::contiguous(metric_);
  const Tensor best = torch::stable::new_empty(metric, {batch, na}, ScalarType::Float);
  const Tensor partner = integers(metric, {batch, na}), rank = integers(metric, {batch, na});
  const Tensor arrived = torch::stable::new_zeros(metric, {batch}, ScalarType::Int);
  launch(Match{metric.const_data_ptr(), batch, n, c, r, metric.stride(0), metric.stride(1),
               class_token, distill_token, static_cast<float*>(best.mutable_data_ptr()),
               data(partner), data(rank), data(arrived), data(out.rows), out.sources_data()},
         dtype, device.stream());
  return out;
}

Matched match_of_keys(const Tensor& k_, int64_t r, bool class_token, bool distill_token,
                      bool wants_sources) {
  const OnDevice device(k_);
  const int64_t batch = k_.size(0), heads = k_.size(1), n = k_.size(2), c = k_.size(3);
  ClusterMatch p = {nullptr,     batch,         n, c,       heads,  r, 0, 0, 0,
                    class_token, distill_token, 0, nullptr, nullptr};
  if (r == 0 || !can_match_in_cluster(p))
    return match(key_metric_cuda(k_), r, class_token, distill_token, wants_sources);
  const Tensor k = in_packs(k_);
  const Matched out(k, n, r, wants_sources);
  p.tokens = k.const_data_ptr();
  p.sample = k.stride(0);
  p.head = k.stride(1);
  p.token = k.stride(2);
  p.rows = data(out.rows);
  p.sources = out.sources_data();
  launch(p, dtype_of(k), device.stream());
  return out;
}

}  // namespace

Tensor bipartite_match_cuda(const Tensor& metric, int64_t r, bool class_token, bool distill_token) {
  return match(metric, r, class_token, distill_token, false).rows;
}

std::tuple<Tensor, Tensor> bipartite_match_sources_cuda(const Tensor& metric, int64_t r,
                                                        bool class_token, bool distill_token) {
  const Matched out = match(metric, r, class_token, distill_token, true);
  return {out.rows, *out.sources};
}

Tensor match_keys_cuda(const Tensor& k, int64_t r, bool class_token, bool distill_token) {
  return match_of_keys(k, r, class_token, distill_token, false).rows;
}

std::tuple<Tensor, Tensor> match_keys_sources_cuda(const Tensor& k, int64_t r, bool class_token,
                                                   bool distill_token) {
  const Matched out = match_of_keys(k, r, class_token, distill_token, true);
  return {out.rows, *out.sources};
}

}  // namespace fastast
