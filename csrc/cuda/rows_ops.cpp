// The ops of the row kernels on tensors: layouts, outputs, the current device and stream.
#include "../rows_cuda.h"

#include <algorithm>
#include <vector>

#include "device.h"
#include "rows_params.h"

namespace fastast {
namespace {

constexpr int64_t kRuns = 1024;  // shares of the weight gradients

Tensor fp32(const Tensor& t) {
  return in_packs(t.scalar_type() == ScalarType::Float ? t
                                                       : torch::stable::to(t, ScalarType::Float));
}

// A tensor [B, N, D] as kernels read it, kept alive here.
class Rows {
 public:
  explicit Rows(const Tensor& t) : tensor_(in_packs(t)) {}
  operator Tokens() const {
    return {tensor_.const_data_ptr(), tensor_.stride(0), tensor_.stride(1)};
  }

 private:
  Tensor tensor_;
};

// Data of a dense optional tensor, or null.
class Optional {
 public:
  explicit Optional(const std::optional<Tensor>& t) {
    if (t.has_value()) tensor_ = dense(*t);
  }
  const float* data() const {
    return tensor_ ? static_cast<const float*>(tensor_->const_data_ptr()) : nullptr;
  }

 private:
  std::optional<Tensor> tensor_;
};

template <class T = float>
const T* data(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}

float* floats(const Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }

Tensor empty(const Tensor& like, std::vector<int64_t> shape) {
  return torch::stable::new_empty(like, shape);
}

Tensor empty_floats(const Tensor& like, std::vector<int64_t> shape) {
  return torch::stable::new_empty(like, shape, ScalarType::Float);
}

// What a merge writes; a norm's y is null where none is wanted.
ReduceRows reduction(const Rows& x, const Tensor& assignment, const Optional& size,
                     const Tensor& h) {
  ReduceRows p{};
  p.x = x;
  p.assignment = data<int32_t>(assignment);
  p.size = size.data();
  p.h = h.mutable_data_ptr();
  p.batch = assignment.size(0);
  p.n = assignment.size(1);
  p.n_out = h.size(1);
  p.d = h.size(2);
  p.mean = true;
  return p;
}

// Rows are listed where the sources are there.
void launch(const ReduceRows& p, const std::optional<Tensor>& sources_, Dtype dtype, void* stream) {
  if (!sources_.has_value()) return launch(p, dtype, stream);
  const Tensor sources = dense(*sources_);
  if (sources.numel() != p.batch * (p.n_out + 1 + p.n))
    throw std::runtime_error("sources must have n_out + 1 + N values a sample");
  launch(ReduceListedRows{p, data<int32_t>(sources)}, dtype, stream);
}

Tensor gather(const Tensor& x, const Tensor& assignment_, const Optional& size,
              const Optional& size_out) {
  const Tensor assignment = dense(assignment_);
  const OnDevice device(x);
  const Rows rows(x);
  const Tensor out = empty(x, {assignment.size(0), assignment.size(1), x.size(2)});
  launch(GatherRows{rows, data<int32_t>(assignment), size.data(), size_out.data(),
                    out.mutable_data_ptr(), assignment.size(0), assignment.size(1), x.size(1),
                    x.size(2)},
         dtype_of(x), device.stream());
  return out;
}

// Three dimensions, whatever x has: all but the last two in one.
Tensor as_tokens(const Tensor& x) {
  if (x.dim() == 3) return x;
  const int64_t d = x.size(x.dim() - 1);
  return torch::stable::view(dense(x), {1, d == 0 ? 0 : x.numel() / d, d});
}

std::vector<int64_t> shape_of(const Tensor& t, bool with_last = true) {
  std::vector<int64_t> shape(t.sizes().begin(), t.sizes().end());
  if (!with_last) shape.pop_back();
  return shape;
}

std::tuple<Tensor, Tensor, Tensor> norm_backward(const Tensor& grad_h_, const Tensor& grad_y_,
                                                 const Tensor& h_, const Tensor& weight_,
                                                 const Tensor& mean, const Tensor& rstd,
                                                 const Tensor* assignment, const Optional& size,
                                                 const Optional& size_out) {
  const Tensor grad_h = dense(grad_h_), grad_y = dense(grad_y_), h = dense(h_);
  const Tensor weight = fp32(weight_), dense_mean = dense(mean), dense_rstd = dense(rstd);
  const OnDevice device(h);
  const int64_t d = h.size(h.dim() - 1);
  const Tensor rows = as_tokens(h);
  const int64_t batch = rows.size(0), n_out = rows.size(1);
  const int64_t n = assignment == nullptr ? n_out : assignment->size(1);
  const Tensor dx = assignment == nullptr ? torch::stable::empty_like(h) : empty(h, {batch, n, d});
  const int64_t run = std::max<int64_t>(1, (batch * n + kRuns - 1) / kRuns);
  const int64_t runs = (batch * n + run - 1) / run;
  const Tensor dweight = empty_floats(h, {runs, d}), dbias = empty_floats(h, {runs, d});
  launch(NormGradRuns{grad_h.const_data_ptr(), grad_y.const_data_ptr(), h.const_data_ptr(),
                      data(weight), data(dense_mean), data(dense_rstd),
                      assignment == nullptr ? nullptr : data<int32_t>(*assignment), size.data(),
                      size_out.data(), dx.mutable_data_ptr(), floats(dweight), floats(dbias), batch,
                      n, n_out, d, run},
         dtype_of(h), device.stream());
  const std::vector<int64_t> first = {0};
  return {dx, torch::stable::sum(dweight, first), torch::stable::sum(dbias, first)};
}

}  // namespace

std::tuple<Tensor, Tensor> merge_cuda(const Tensor& x, const Tensor& assignment_, int64_t n_out,
                                      const std::optional<Tensor>& size_,
                                      const std::optional<Tensor>& sources) {
  const Tensor assignment = dense(assignment_);
  const OnDevice device(x);
  const Rows rows(x);
  const Optional size(size_);
  const Tensor h = empty(x, {x.size(0), n_out, x.size(2)});
  const Tensor size_out = empty_floats(x, {x.size(0), n_out});
  ReduceRows p = reduction(rows, assignment, size, h);
  p.size_out = floats(size_out);
  launch(p, sources, dtype_of(x), device.stream());
  return {h, size_out};
}

Tensor merge_backward_cuda(const Tensor& grad, const Tensor& assignment,
                           const std::optional<Tensor>& size, const Tensor& size_out) {
  return gather(grad, assignment, Optional(size), Optional(size_out));
}

Tensor unmerge_cuda(const Tensor& x, const Tensor& assignment) {
  return gather(x, assignment, Optional({}), Optional({}));
}

Tensor unmerge_backward_cuda(const Tensor& grad, const Tensor& assignment_, int64_t n_out) {
  const Tensor assignment = dense(assignment_);
  const OnDevice device(grad);
  const Rows rows(grad);
  const Tensor h = empty(grad, {grad.size(0), n_out, grad.size(2)});
  ReduceRows p = reduction(rows, assignment, Optional({}), h);
  p.mean = false;
  launch(p, dtype_of(grad), device.stream());
  return h;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> add_layer_norm_cuda(const Tensor& x,
                                                               const Tensor& residual,
                                                               const Tensor& weight_,
                                                               const Tensor& bias_, double eps) {
  const Tensor weight = fp32(weight_), bias = fp32(bias_);
  const OnDevice device(x);
  const Tensor tokens = as_tokens(x);
  const Rows rows(tokens), added(as_tokens(residual));
  const Tensor h = empty(x, shape_of(x)), y = empty(x, shape_of(x));
  const Tensor mean = empty_floats(x, shape_of(x, false)), rstd = torch::stable::empty_like(mean);
  launch(AddNormRows{rows, added, h.mutable_data_ptr(),
                     Norm{data(weight), data(bias), static_cast<float>(eps), y.mutable_data_ptr(),
                          floats(mean), floats(rstd)},
                     tokens.size(0), tokens.size(1), tokens.size(2)},
         dtype_of(x), device.stream());
  return {h, y, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> add_layer_norm_backward_cuda(
    const Tensor& grad_h, const Tensor& grad_y, const Tensor& h, const Tensor& weight,
    const Tensor& mean, const Tensor& rstd) {
  return norm_backward(grad_h, grad_y, h, weight, mean, rstd, nullptr, Optional({}), Optional({}));
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> merge_add_layer_norm_cuda(
    const Tensor& x, const Tensor& residual, const Tensor& assignment_, int64_t n_out,
    const std::optional<Tensor>& size_, const Tensor& weight_, const Tensor& bias_, double eps,
    const std::optional<Tensor>& sources) {
  const Tensor assignment = dense(assignment_), weight = fp32(weight_), bias = fp32(bias_);
  const OnDevice device(x);
  const Rows rows(x), added(residual);
  const Optional size(size_);
  const Tensor h = empty(x, {x.size(0), n_out, x.size(2)}), y = torch::stable::empty_like(h);
  const Tensor size_out = empty_floats(x, {x.size(0), n_out});
  const Tensor log_size = torch::stable::empty_like(size_out);
  const Tensor mean = torch::stable::empty_like(size_out);
  const Tensor rstd = torch::stable::empty_like(size_out);
  ReduceRows p = reduction(rows, assignment, size, h);
  p.residual = added;
  p.size_out = floats(size_out);
  p.log_size_out = floats(log_size);
  p.norm = {data(weight),         data(bias),   static_cast<float>(eps),
            y.mutable_data_ptr(), floats(mean), floats(rstd)};
  launch(p, sources, dtype_of(x), device.stream());
  return {h, size_out, log_size, y, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> merge_add_layer_norm_backward_cuda(
    const Tensor& grad_h, const Tensor& grad_y, const Tensor& h, const Tensor& weight,
    const Tensor& mean, const Tensor& rstd, const Tensor& assignment_,
    const std::optional<Tensor>& size, const Tensor& size_out) {
  const Tensor assignment = dense(assignment_);
  return norm_backward(grad_h, grad_y, h, weight, mean, rstd, &assignment, Optional(size),
                       Optional(size_out));
}

}  // namespace fastast
