#include "../layer_norm.h"

#include <cmath>
#include <cstring>

#include "common.h"

namespace fastast {
namespace {

// weight or bias [D] of any floating dtype in the accumulation type.
template <class A>
Tensor accumulator(const Tensor& p) {
  if (p.scalar_type() == scalar_type_of<A>) return dense(p);
  if (p.scalar_type() != ScalarType::BFloat16 || !p.is_contiguous())
    return dense(torch::stable::to(p, scalar_type_of<A>));
  // The dispatcher would take longer than few tokens do.
  const Tensor out = empty(p, {p.numel()}, scalar_type_of<A>);
  const bf16* from = data<bf16>(p);
  A* to = mutable_data<A>(out);
  for (int64_t i = 0; i < p.numel(); ++i) {
    uint16_t bits;
    std::memcpy(&bits, from + i, sizeof bits);
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float value;
    std::memcpy(&value, &wide, sizeof value);
    to[i] = value;
  }
  return out;
}

// Where a batch of rows comes from: with an assignment `n` tokens a sample become `rows` rows;
// without one, all rows of the tensor are one sample.
struct Layout {
  int64_t batch, n, rows, d;
};

// Uninitialised, like `like` but with `rows` in place of the token dimension.
Tensor rows_like(const Tensor& like, int64_t rows, std::optional<ScalarType> dtype = {},
                 bool with_d = true) {
  std::vector<int64_t> shape(like.sizes().begin(), like.sizes().end());
  if (shape.size() > 1) shape[shape.size() - 2] = rows;
  if (!with_d) shape.pop_back();
  return empty(like, shape, dtype);
}

template <class T>
void forward(const Layout& l, AddNorm<T> whole, const Inverse* inverse) {
  parallel_rows(l.batch, l.rows, l.d, [&](int64_t b, int64_t begin, int64_t end) {
    AddNorm<T> p = whole;
    p.x += b * l.n * l.d;
    p.residual += b * l.n * l.d;
    if (p.size != nullptr) p.size += b * l.n;
    if (inverse != nullptr) p.sources = (*inverse)[b];
    p.h += b * l.rows * l.d;
    if (p.size_out != nullptr) p.size_out += b * l.rows;
    p.y += b * l.rows * p.y_row;
    if (p.mean != nullptr) p.mean += b * l.rows;
    if (p.rstd != nullptr) p.rstd += b * l.rows;
    kernels<T>().add_norm_rows(p, begin, end);
  });
}

// Weight and bias gradients are summed over a fixed share of the rows per thread and then over
// threads in order: the same bits at the same thread count.
template <class T>
void backward(const Layout& l, AddNormGrad<T> whole, const Inverse* inverse,
              Accumulate<T>* grad_weight, Accumulate<T>* grad_bias) {
  using A = Accumulate<T>;
  const int64_t total = l.batch * l.rows;
  const int64_t shares =
      std::clamp<int64_t>(total / grain(l.d), 1, torch::stable::get_num_threads());
  std::vector<A> partial(shares * 2 * l.d, A(0));
  torch::stable::parallel_for(0, shares, 1, [&](int64_t first, int64_t last) {
    for (int64_t s = first; s < last; ++s) {
      int64_t begin = total * s / shares;
      const int64_t end = total * (s + 1) / shares;
      while (begin < end) {
        const int64_t b = begin / l.rows;
        const int64_t stop = std::min(end, (b + 1) * l.rows);
        AddNormGrad<T> p = whole;
        p.grad_h += b * l.rows * l.d;
        p.grad_y += b * l.rows * l.d;
        p.h += b * l.rows * l.d;
        p.mean += b * l.rows;
        p.rstd += b * l.rows;
        if (p.size != nullptr) p.size += b * l.n;
        if (p.size_out != nullptr) p.size_out += b * l.rows;
        if (inverse != nullptr) p.sources = (*inverse)[b];
        p.grad += b * l.n * l.d;
        kernels<T>().add_norm_grad_rows(p, begin - b * l.rows, stop - b * l.rows,
                                        partial.data() + s * 2 * l.d,
                                        partial.data() + (s * 2 + 1) * l.d);
        begin = stop;
      }
    }
  });
  std::fill(grad_weight, grad_weight + l.d, A(0));
  std::fill(grad_bias, grad_bias + l.d, A(0));
  for (int64_t s = 0; s < shares; ++s)
    for (int64_t k = 0; k < l.d; ++k) {
      grad_weight[k] += partial[s * 2 * l.d + k];
      grad_bias[k] += partial[(s * 2 + 1) * l.d + k];
    }
}

struct Normed {
  Tensor h, y;
  std::optional<Tensor> mean, rstd;  // for a backward
};

Normed run_forward(const Layout& l, const Tensor& x_, const Tensor& residual_, int64_t rows_shape,
                   const float* size, const Inverse* inverse, float* size_out,
                   const Tensor& weight_, const Tensor& bias_, double eps, bool statistics,
                   int64_t y_row) {
  const Tensor x = dense(x_), residual = dense(residual_);
  return dispatch(x.scalar_type(), [&](auto t) {
    using T = decltype(t);
    using A = Accumulate<T>;
    const Tensor weight = accumulator<A>(weight_), bias = accumulator<A>(bias_);
    const Tensor h = rows_like(x, rows_shape);
    std::vector<int64_t> strides(h.strides().begin(), h.strides().end());
    for (size_t i = 0; i + 1 < strides.size(); ++i) strides[i] = strides[i] / l.d * y_row;
    Normed out{h, empty_rows(h, l.batch * l.rows, y_row, h.sizes(), strides), {}, {}};
    if (statistics) {
      out.mean = rows_like(x, rows_shape, scalar_type_of<A>, false);
      out.rstd = rows_like(x, rows_shape, scalar_type_of<A>, false);
    }
    forward<T>(l,
               {data<T>(x),
                data<T>(residual),
                size,
                {},
                data<A>(weight),
                data<A>(bias),
                A(eps),
                l.d,
                mutable_data<T>(out.h),
                size_out,
                mutable_data<T>(out.y),
                y_row,
                statistics ? mutable_data<A>(*out.mean) : nullptr,
                statistics ? mutable_data<A>(*out.rstd) : nullptr},
               inverse);
    return out;
  });
}

std::tuple<Tensor, Tensor, Tensor> run_backward(const Layout& l, Tensor grad, const Tensor& grad_h_,
                                                const Tensor& grad_y_, const Tensor& h_,
                                                const Tensor& weight_, const Tensor& mean,
                                                const Tensor& rstd, const float* size,
                                                const float* size_out, const Inverse* inverse) {
  const Tensor grad_h = dense(grad_h_), grad_y = dense(grad_y_), h = dense(h_);
  return dispatch(h.scalar_type(), [&](auto t) {
    using T = decltype(t);
    using A = Accumulate<T>;
    const Tensor weight = accumulator<A>(weight_);
    Tensor grad_weight = empty(weight, {l.d});
    Tensor grad_bias = empty(weight, {l.d});
    backward<T>(l,
                {data<T>(grad_h),
                 data<T>(grad_y),
                 data<T>(h),
                 data<A>(weight),
                 data<A>(mean),
                 data<A>(rstd),
                 size,
                 size_out,
                 {},
                 l.d,
                 mutable_data<T>(grad)},
                inverse, mutable_data<A>(grad_weight), mutable_data<A>(grad_bias));
    return std::make_tuple(grad, grad_weight, grad_bias);
  });
}

int64_t width(const Tensor& x) { return x.size(x.dim() - 1); }

Layout one_sample(const Tensor& x) {
  const int64_t d = width(x);
  const int64_t rows = d == 0 ? 0 : x.numel() / d;
  return {1, rows, rows, d};
}

Normed add_norm(const Tensor& x, const Tensor& residual, const Tensor& weight, const Tensor& bias,
                double eps, bool statistics, int64_t y_row) {
  const int64_t rows_shape = x.dim() > 1 ? x.size(x.dim() - 2) : 1;
  return run_forward(one_sample(x), x, residual, rows_shape, nullptr, nullptr, nullptr, weight,
                     bias, eps, statistics, y_row);
}

struct MergedNormed {
  Tensor size, log_size;
  Normed normed;
};

MergedNormed merge_add_norm(const Tensor& x, const Tensor& residual, const Tensor& assignment,
                            int64_t n_out, const std::optional<Tensor>& size_, const Tensor& weight,
                            const Tensor& bias, double eps, bool statistics, int64_t y_row) {
  const Layout l{x.size(0), x.size(1), n_out, x.size(2)};
  const OptionalSize size(size_);
  const Inverse inverse(assignment, n_out);
  const Tensor size_out = empty(x, {l.batch, n_out}, ScalarType::Float);
  Normed out = run_forward(l, x, residual, n_out, size.row(0), &inverse,
                           mutable_data<float>(size_out), weight, bias, eps, statistics, y_row);
  const Tensor log_size = empty(x, {l.batch, n_out}, ScalarType::Float);
  std::transform(data<float>(size_out), data<float>(size_out) + size_out.numel(),
                 mutable_data<float>(log_size), [](float s) { return s == 1 ? 0 : std::log(s); });
  return {size_out, log_size, out};
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> add_layer_norm_cpu(const Tensor& x,
                                                              const Tensor& residual,
                                                              const Tensor& weight,
                                                              const Tensor& bias, double eps) {
  const Normed out = add_norm(x, residual, weight, bias, eps, true, width(x));
  return {out.h, out.y, *out.mean, *out.rstd};
}

std::tuple<Tensor, Tensor> add_norm_cpu(const Tensor& x, const Tensor& residual,
                                        const Tensor& weight, const Tensor& bias, double eps) {
  return add_norm_spread_cpu(x, residual, weight, bias, eps, width(x));
}

std::tuple<Tensor, Tensor> add_norm_spread_cpu(const Tensor& x, const Tensor& residual,
                                               const Tensor& weight, const Tensor& bias, double eps,
                                               int64_t y_row) {
  const Normed out = add_norm(x, residual, weight, bias, eps, false, y_row);
  return {out.h, out.y};
}

std::tuple<Tensor, Tensor, Tensor> add_layer_norm_backward_cpu(
    const Tensor& grad_h, const Tensor& grad_y, const Tensor& h, const Tensor& weight,
    const Tensor& mean, const Tensor& rstd) {
  return run_backward(one_sample(h), torch::stable::empty_like(dense(h)), grad_h, grad_y, h, weight,
                      mean, rstd, nullptr, nullptr, nullptr);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> merge_add_layer_norm_cpu(
    const Tensor& x, const Tensor& residual, const Tensor& assignment, int64_t n_out,
    const std::optional<Tensor>& size, const Tensor& weight, const Tensor& bias, double eps,
    const std::optional<Tensor>&) {
  const auto [size_out, log_size, out] =
      merge_add_norm(x, residual, assignment, n_out, size, weight, bias, eps, true, width(x));
  return {out.h, size_out, log_size, out.y, *out.mean, *out.rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> merge_add_norm_cpu(
    const Tensor& x, const Tensor& residual, const Tensor& assignment, int64_t n_out,
    const std::optional<Tensor>& size, const Tensor& weight, const Tensor& bias, double eps) {
  return merge_add_norm_spread_cpu(x, residual, assignment, n_out, size, weight, bias, eps,
                                   width(x));
}

std::tuple<Tensor, Tensor, Tensor, Tensor> merge_add_norm_spread_cpu(
    const Tensor& x, const Tensor& residual, const Tensor& assignment, int64_t n_out,
    const std::optional<Tensor>& size, const Tensor& weight, const Tensor& bias, double eps,
    int64_t y_row) {
  const auto [size_out, log_size, out] =
      merge_add_norm(x, residual, assignment, n_out, size, weight, bias, eps, false, y_row);
  return {out.h, size_out, log_size, out.y};
}

std::tuple<Tensor, Tensor, Tensor> merge_add_layer_norm_backward_cpu(
    const Tensor& grad_h, const Tensor& grad_y, const Tensor& h, const Tensor& weight,
    const Tensor& mean, const Tensor& rstd, const Tensor& assignment,
    const std::optional<Tensor>& size_, const Tensor& size_out) {
  const Layout l{h.size(0), assignment.size(1), h.size(1), h.size(2)};
  const OptionalSize size(size_);
  const Inverse inverse(assignment, l.rows);
  // Every kept token is written by its row; a dropped one has no row and no gradient.
  const std::vector<int64_t> shape = {l.batch, l.n, l.d};
  Tensor grad = inverse.drops() ? torch::stable::new_zeros(h, shape) : empty(h, shape);
  return run_backward(l, grad, grad_h, grad_y, h, weight, mean, rstd, size.row(0),
                      data<float>(size_out), &inverse);
}

}  // namespace fastast
