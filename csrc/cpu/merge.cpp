#include "../merge.h"

#include "common.h"

namespace fastast {

Inverse::Inverse(const Tensor& assignment_, int64_t n_out)
    : n_(assignment_.size(1)), n_out_(n_out) {
  const Tensor assignment = dense(assignment_);
  const int64_t batch = assignment.size(0);
  offsets_.assign(batch * (n_out + 1), 0);
  tokens_.resize(batch * n_);
  for (int64_t b = 0; b < batch; ++b) {
    const int32_t* row_of = data<int32_t>(assignment) + b * n_;
    int32_t* offsets = offsets_.data() + b * (n_out + 1);
    for (int64_t j = 0; j < n_; ++j) {
      if (row_of[j] < -1 || row_of[j] >= n_out)
        throw std::runtime_error(
            "assignment must be between -1 and n_out - 1 = " + std::to_string(n_out - 1) +
            ", but token " + std::to_string(j) + " of sample " + std::to_string(b) + " has " +
            std::to_string(row_of[j]));
      if (row_of[j] >= 0)
        ++offsets[row_of[j]];
      else
        dropped_ = true;
    }
    // Counts become ends; walking the tokens backwards turns ends into starts, in ascending order.
    for (int64_t i = 1; i <= n_out; ++i) offsets[i] += offsets[i - 1];
    for (int64_t j = n_ - 1; j >= 0; --j)
      if (row_of[j] >= 0) tokens_[b * n_ + --offsets[row_of[j]]] = static_cast<int32_t>(j);
  }
}

std::tuple<Tensor, Tensor> merge_cpu(const Tensor& x_, const Tensor& assignment, int64_t n_out,
                                     const std::optional<Tensor>& size_,
                                     const std::optional<Tensor>&) {
  const Tensor x = dense(x_);
  const OptionalSize size(size_);
  const Inverse inverse(assignment, n_out);
  const int64_t batch = x.size(0), n = x.size(1), d = x.size(2);
  Tensor out = empty(x, {batch, n_out, d});
  Tensor size_out = empty(x, {batch, n_out}, ScalarType::Float);
  dispatch(x.scalar_type(), [&](auto t) {
    using T = decltype(t);
    parallel_rows(batch, n_out, d, [&](int64_t b, int64_t begin, int64_t end) {
      kernels<T>().merge_rows(data<T>(x) + b * n * d, size.row(b * n), inverse[b], d, begin, end,
                              mutable_data<T>(out) + b * n_out * d,
                              mutable_data<float>(size_out) + b * n_out);
    });
  });
  return {out, size_out};
}

// Both gathers: unmerge, and with sizes the backward of merge.
static Tensor gather(const Tensor& rows_, const Tensor& assignment_,
                     const std::optional<Tensor>& size_, const std::optional<Tensor>& size_out_) {
  const Tensor rows = dense(rows_), assignment = dense(assignment_);
  const OptionalSize size(size_), size_out(size_out_);
  const int64_t batch = rows.size(0), n_out = rows.size(1), d = rows.size(2);
  const int64_t n = assignment.size(1);
  const int32_t* row_of = data<int32_t>(assignment);
  const int32_t* bad = std::find_if(row_of, row_of + batch * n,
                                    [&](int32_t row) { return row < -1 || row >= n_out; });
  if (bad != row_of + batch * n)
    throw std::runtime_error("assignment must be between -1 and the last row, " +
                             std::to_string(n_out - 1) + ", but holds " + std::to_string(*bad));
  Tensor out = empty(rows, {batch, n, d});
  dispatch(rows.scalar_type(), [&](auto t) {
    using T = decltype(t);
    parallel_rows(batch, n, d, [&](int64_t b, int64_t begin, int64_t end) {
      kernels<T>().gather_rows(data<T>(rows) + b * n_out * d, row_of + b * n, size.row(b * n),
                               size_out.row(b * n_out), d, begin, end,
                               mutable_data<T>(out) + b * n * d);
    });
  });
  return out;
}

Tensor merge_backward_cpu(const Tensor& grad, const Tensor& assignment,
                          const std::optional<Tensor>& size, const Tensor& size_out) {
  return gather(grad, assignment, size, size_out);
}

Tensor unmerge_cpu(const Tensor& x, const Tensor& assignment) {
  return gather(x, assignment, std::nullopt, std::nullopt);
}

Tensor unmerge_backward_cpu(const Tensor& grad_, const Tensor& assignment, int64_t n_out) {
  const Tensor grad = dense(grad_);
  const Inverse inverse(assignment, n_out);
  const int64_t batch = grad.size(0), n = grad.size(1), d = grad.size(2);
  Tensor out = empty(grad, {batch, n_out, d});
  dispatch(grad.scalar_type(), [&](auto t) {
    using T = decltype(t);
    parallel_rows(batch, n_out, d, [&](int64_t b, int64_t begin, int64_t end) {
      kernels<T>().sum_rows(data<T>(grad) + b * n * d, inverse[b], d, begin, end,
                            mutable_data<T>(out) + b * n_out * d);
    });
  });
  return out;
}

}  // namespace fastast
