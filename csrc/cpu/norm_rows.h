// Residual add, merge and LayerNorm in one pass: see Kernels in kernels.h. Included by
// kernels_<isa>.cpp only.
//
// A row stays in L1 from its sum to its normalised form: 2 n d values read and 2 rows d written,
// where the unfused chain reads and writes the sum again for the mean, the variance and the result.
#include "arena.h"

namespace fastast {
namespace FASTAST_ISA {
namespace {

template <class T>
void add_norm_rows(const AddNorm<T>& p, int64_t begin, int64_t end) {
  using A = Accumulate<T>;
  const RowBuffer<A> buffer(p.d);
  A* row = buffer.data;
  for (int64_t i = begin; i < end; ++i) {
    const float total = mean_of_tokens<T>(p.x, p.residual, p.size, p.sources, i, p.d, 0, p.d, row);
    if (p.size_out != nullptr) p.size_out[i] = total;
    store_row<T>(row, p.d, p.h + i * p.d);

    Vec<A> sums{};
    A sum = 0;
    for_each_lane<A>(
        p.d, [&](int64_t k) { sums += load(row + k); }, [&](int64_t k) { sum += row[k]; });
    const A mean = (reduce_add<A>(sums) + sum) / p.d;
    Vec<A> squares{};
    A square = 0;
    for_each_lane<A>(
        p.d,
        [&](int64_t k) {
          const Vec<A> centred = load(row + k) - mean;
          squares += centred * centred;
        },
        [&](int64_t k) { square += (row[k] - mean) * (row[k] - mean); });
    const A rstd = A(1) / __builtin_sqrt((reduce_add<A>(squares) + square) / p.d + p.eps);
    T* y = p.y + i * p.d;
    for_each_lane<A>(
        p.d,
        [&](int64_t k) {
          const Vec<A> unit = (load(row + k) - mean) * rstd;
          store(y + k, unit * load(p.weight + k) + load(p.bias + k));
        },
        [&](int64_t k) { from_acc((row[k] - mean) * rstd * p.weight[k] + p.bias[k], y + k); });
    p.mean[i] = mean;
    p.rstd[i] = rstd;
  }
}

// With u = (h - mean) rstd and g = grad_y weight, the gradient of h is
// rstd (g - mean(g) - u mean(g u)) + grad_h; a token of the row gets its share size_j / size_out.
template <class T>
void add_norm_grad_rows(const AddNormGrad<T>& p, int64_t begin, int64_t end,
                        Accumulate<T>* grad_weight, Accumulate<T>* grad_bias) {
  using A = Accumulate<T>;
  const RowBuffer<A> buffer(p.d);
  A* row = buffer.data;
  for (int64_t i = begin; i < end; ++i) {
    const T* h = p.h + i * p.d;
    const T* grad_h = p.grad_h + i * p.d;
    const T* grad_y = p.grad_y + i * p.d;
    const A mean = p.mean[i];
    const A rstd = p.rstd[i];
    Vec<A> g_sums{}, gu_sums{};
    A g_sum = 0, gu_sum = 0;
    for_each_lane<A>(
        p.d,
        [&](int64_t k) {
          const Vec<A> unit = (load(h + k) - mean) * rstd;
          const Vec<A> of_y = load(grad_y + k);
          const Vec<A> g = of_y * load(p.weight + k);
          store(grad_weight + k, load(grad_weight + k) + of_y * unit);
          store(grad_bias + k, load(grad_bias + k) + of_y);
          g_sums += g;
          gu_sums += g * unit;
        },
        [&](int64_t k) {
          const A unit = (to_acc(h[k]) - mean) * rstd;
          const A of_y = to_acc(grad_y[k]);
          grad_weight[k] += of_y * unit;
          grad_bias[k] += of_y;
          g_sum += of_y * p.weight[k];
          gu_sum += of_y * p.weight[k] * unit;
        });
    const A g_mean = (reduce_add<A>(g_sums) + g_sum) / p.d;
    const A gu_mean = (reduce_add<A>(gu_sums) + gu_sum) / p.d;
    for_each_lane<A>(
        p.d,
        [&](int64_t k) {
          const Vec<A> unit = (load(h + k) - mean) * rstd;
          const Vec<A> g = load(grad_y + k) * load(p.weight + k);
          store(row + k, (g - g_mean - unit * gu_mean) * rstd + load(grad_h + k));
        },
        [&](int64_t k) {
          const A unit = (to_acc(h[k]) - mean) * rstd;
          const A g = to_acc(grad_y[k]) * p.weight[k];
          row[k] = (g - g_mean - unit * gu_mean) * rstd + to_acc(grad_h[k]);
        });

    const int64_t first = p.sources.offsets == nullptr ? i : p.sources.offsets[i];
    const int64_t last = p.sources.offsets == nullptr ? i + 1 : p.sources.offsets[i + 1];
    for (int64_t s = first; s < last; ++s) {
      const int64_t token = p.sources.tokens == nullptr ? s : p.sources.tokens[s];
      const A share = last == first + 1 ? A(1) : A(size_of(p.size, token)) / A(p.size_out[i]);
      T* grad = p.grad + token * p.d;
      for_each_lane<A>(
          p.d, [&](int64_t k) { store(grad + k, load(row + k) * share); },
          [&](int64_t k) { from_acc(row[k] * share, grad + k); });
    }
  }
}

}  // namespace
}  // namespace FASTAST_ISA
}  // namespace fastast
