#include "../match.h"

#include "common.h"

namespace fastast {
namespace {

// The r best of scores [na], then the output row of every token of one sample.
template <class A>
void assign_rows(const A* best, const int32_t* partner, int64_t n, int64_t r, bool class_token,
                 bool distill_token, int32_t* order, int32_t* assignment) {
  const int64_t na = (n + 1) / 2;
  const int32_t kept = static_cast<int32_t>(na - r);
  const auto better = [best](int32_t i, int32_t j) {
    return best[i] > best[j] || (best[i] == best[j] && i < j);
  };
  for (int64_t i = 0; i < na; ++i) order[i] = static_cast<int32_t>(i);
  std::nth_element(order, order + r, order + na, better);
  if (class_token)
    std::sort(order + r, order + na);
  else
    std::sort(order + r, order + na, better);

  // DIST is the first of B and goes to row 1; the kept of A but the first then start at row 2.
  const auto row_of_b = [&](int32_t j) { return distill_token && j == 0 ? 1 : kept + j; };
  for (int32_t k = 0; k < kept; ++k)
    assignment[2 * order[r + k]] = distill_token && k > 0 ? k + 1 : k;
  for (int64_t k = 0; k < r; ++k) assignment[2 * order[k]] = row_of_b(partner[order[k]]);
  for (int32_t j = 0; j < n / 2; ++j) assignment[2 * j + 1] = row_of_b(j);
}

// One sample's matching, with the memory it needs.
template <class T>
class Match {
  using A = Accumulate<T>;

 public:
  Match(int64_t n, int64_t c, bool class_token, bool distill_token)
      : n_(n),
        c_(c),
        class_token_(class_token),
        distill_token_(distill_token),
        inverse_(n),
        panels_(padded(n / 2) * c),
        scales_(padded(n / 2)),
        best_(n),
        partner_(n),
        order_(n) {}

  int64_t tiles() const {
    const int64_t rows = kernels<T>().tile_rows;
    return ((n_ + 1) / 2 + rows - 1) / rows;
  }

  bool pack(const T* metric) {
    const bool finite = kernels<T>().inverse_norms(metric, n_, c_, inverse_.get());
    kernels<T>().pack_b(metric, n_, c_, inverse_.get(), panels_.get(), scales_.get());
    return finite;
  }

  void score(const T* metric, int64_t first_tile, int64_t last_tile) {
    const int64_t rows = kernels<T>().tile_rows;
    kernels<T>().best_partner(
        metric, n_, c_, inverse_.get(), panels_.get(), scales_.get(), distill_token_,
        first_tile * rows, std::min(last_tile * rows, (n_ + 1) / 2), best_.get(), partner_.get());
  }

  void select(int64_t r, int32_t* assignment) {
    if (class_token_) best_.get()[0] = -std::numeric_limits<A>::infinity();
    assign_rows(best_.get(), partner_.get(), n_, r, class_token_, distill_token_, order_.get(),
                assignment);
  }

 private:
  // Tokens of B that whole panels have room for.
  static int64_t padded(int64_t nb) {
    const int64_t cols = kernels<T>().panel_cols;
    return (nb + cols - 1) / cols * cols;
  }

  int64_t n_, c_;
  bool class_token_, distill_token_;
  Scratch<A> inverse_;
  Scratch<T> panels_;
  Scratch<A> scales_, best_;
  Scratch<int32_t> partner_, order_;
};

template <class T>
void match_batch(const Tensor& metric, int64_t r, bool class_token, bool distill_token,
                 int32_t* assignment) {
  const int64_t batch = metric.size(0), n = metric.size(1), c = metric.size(2);
  const T* tokens = data<T>(metric);
  std::vector<char> finite(batch, 0);
  if (batch >= static_cast<int64_t>(torch::stable::get_num_threads())) {
    torch::stable::parallel_for(0, batch, 1, [&](int64_t begin, int64_t end) {
      Match<T> match(n, c, class_token, distill_token);
      for (int64_t b = begin; b < end; ++b) {
        finite[b] = match.pack(tokens + b * n * c);
        match.score(tokens + b * n * c, 0, match.tiles());
        match.select(r, assignment + b * n);
      }
    });
  } else {  // too few samples for the threads: they share the tiles of each
    Match<T> match(n, c, class_token, distill_token);
    for (int64_t b = 0; b < batch; ++b) {
      const T* sample = tokens + b * n * c;
      finite[b] = match.pack(sample);
      const int64_t tiles_worth_a_thread = std::max<int64_t>(1, (1 << 20) / (n * c * 4));
      torch::stable::parallel_for(
          0, match.tiles(), tiles_worth_a_thread,
          [&](int64_t begin, int64_t end) { match.score(sample, begin, end); });
      match.select(r, assignment + b * n);
    }
  }
  for (int64_t b = 0; b < batch; ++b)
    if (!finite[b])
      throw std::runtime_error("metric must be finite, but sample " + std::to_string(b) +
                               " has a NaN or infinite value");
}

// Tokens that are merged when asked for r: at most half of the unprotected ones.
int64_t effective_r(int64_t n, int64_t r, bool class_token, bool distill_token) {
  const int64_t most = n / 2 - distill_token < 1 ? 0 : (n - class_token - distill_token) / 2;
  return std::clamp<int64_t>(r, 0, most);
}

// The sources of an assignment to n_out rows: offsets, then tokens.
Tensor sources_of(const Tensor& assignment, int64_t n_out) {
  const int64_t batch = assignment.size(0), n = assignment.size(1), width = n_out + 1 + n;
  const Inverse inverse(assignment, n_out);
  const Tensor out = torch::stable::new_empty(assignment, {batch, width});
  for (int64_t b = 0; b < batch; ++b) {
    int32_t* offsets = mutable_data<int32_t>(out) + b * width;
    std::copy_n(inverse[b].offsets, n_out + 1, offsets);
    std::copy_n(inverse[b].tokens, n, offsets + n_out + 1);
  }
  return out;
}

}  // namespace

Tensor bipartite_match_cpu(const Tensor& metric_, int64_t r, bool class_token, bool distill_token) {
  const Tensor metric = dense(metric_);
  const int64_t batch = metric.size(0), n = metric.size(1);
  Tensor out = torch::stable::new_empty(metric, {batch, n}, ScalarType::Int);
  int32_t* assignment = mutable_data<int32_t>(out);
  r = effective_r(n, r, class_token, distill_token);
  if (r == 0) {
    for (int64_t i = 0; i < batch * n; ++i) assignment[i] = static_cast<int32_t>(i % n);
    return out;
  }
  dispatch(metric.scalar_type(), [&](auto t) {
    match_batch<decltype(t)>(metric, r, class_token, distill_token, assignment);
  });
  return out;
}

Tensor key_metric_cpu(const Tensor& k_) {
  const int64_t last = k_.dim() - 1;
  const Tensor k = k_.stride(last) == 1 || k_.size(last) < 2 ? k_ : torch::stable::contiguous(k_);
  const int64_t batch = k.size(0), heads = k.size(1), n = k.size(2), d = k.size(3);
  Tensor out = torch::stable::new_empty(k, {batch, n, d}, ScalarType::Float);
  dispatch(k.scalar_type(), [&](auto t) {
    using T = decltype(t);
    parallel_rows(batch, n, heads * d, [&](int64_t b, int64_t begin, int64_t end) {
      kernels<T>().key_metric_rows(data<T>(k) + b * k.stride(0), heads, k.stride(1), k.stride(2), d,
                                   begin, end, mutable_data<float>(out) + b * n * d);
    });
  });
  return out;
}

Tensor match_keys_cpu(const Tensor& k, int64_t r, bool class_token, bool distill_token) {
  return bipartite_match_cpu(key_metric_cpu(k), r, class_token, distill_token);
}

std::tuple<Tensor, Tensor> bipartite_match_sources_cpu(const Tensor& metric, int64_t r,
                                                       bool class_token, bool distill_token) {
  const Tensor rows = bipartite_match_cpu(metric, r, class_token, distill_token);
  const int64_t n = metric.size(1);
  return {rows, sources_of(rows, n - effective_r(n, r, class_token, distill_token))};
}

std::tuple<Tensor, Tensor> match_keys_sources_cpu(const Tensor& k, int64_t r, bool class_token,
                                                  bool distill_token) {
  return bipartite_match_sources_cpu(key_metric_cpu(k), r, class_token, distill_token);
}

}  // namespace fastast
