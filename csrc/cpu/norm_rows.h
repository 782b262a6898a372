// Residual add, merge and LayerNorm in one pass: see Kernels in kernels.h. Included by
// kernels_<isa>.cpp only.
//
// A row stays in L1 from its sum to its normalised form: 2 n d values read and 2 rows d written,
// where the unfused chain reads and writes the sum again for the mean, the variance and the result.
#include "arena.h"
#include "lanes.h"

namespace fastast {
namespace FASTAST_ISA {
namespace {

// row = read, h = row; the sum of all. `one(k)`: a value of what `read(k)` reads a vector of. Sums
// are in two parts everywhere: an addition waits for the one before.
template <class T, class Read, class One>
FASTAST_INLINE Accumulate<T> store_and_sum(Read read, One one, int64_t d, Accumulate<T>* row,
                                           T* h) {
  using A = Accumulate<T>;
  Vec<A> sums[2] = {};
  A sum = 0;
  for_each_pair<A>(
      d,
      [&](int64_t k, auto count) {
        Vec<A> v[count.value];
        for (int i = 0; i < count.value; ++i) {
          v[i] = read(k + i * lanes<A>);
          store(row + k + i * lanes<A>, v[i]);
          sums[i] += v[i];
        }
        store(h + k, v);
      },
      [&](int64_t k) {
        row[k] = one(k);
        from_acc(row[k], h + k);
        sum += row[k];
      });
  return sum_lanes<A>(sums[0] + sums[1]) + sum;
}

template <class T>
void add_norm_rows(const AddNorm<T>& p, int64_t begin, int64_t end) {
  using A = Accumulate<T>;
  const RowBuffer<A> buffer(p.d);
  A* row = buffer.data;
  for (int64_t i = begin; i < end; ++i) {
    T* h = p.h + i * p.d;
    const int64_t first = p.sources.first(i);
    A sum;
    float total;
    if (p.sources.last(i) == first + 1) {
      const int64_t token = p.sources.token(first);
      const T* a = p.x + token * p.d;
      const T* b = p.residual + token * p.d;
      total = size_of(p.size, token);
      sum = store_and_sum<T>([&](int64_t k) { return load(a + k) + load(b + k); },
                             [&](int64_t k) { return to_acc(a[k]) + to_acc(b[k]); }, p.d, row, h);
    } else {
      total = mean_of_tokens<T>(p.x, p.residual, p.size, p.sources, i, p.d, 0, p.d, row);
      sum = store_and_sum<T>([&](int64_t k) { return load(row + k); },
                             [&](int64_t k) { return row[k]; }, p.d, row, h);
    }
    if (p.size_out != nullptr) p.size_out[i] = total;

    const A mean = sum / p.d;
    Vec<A> squares[2] = {};
    A square = 0;
    for_each_pair<A>(
        p.d,
        [&](int64_t k, auto count) {
          for (int part = 0; part < count.value; ++part) {
            const Vec<A> centred = load(row + k + part * lanes<A>) - mean;
            squares[part] += centred * centred;
          }
        },
        [&](int64_t k) { square += (row[k] - mean) * (row[k] - mean); });
    const A variance = (sum_lanes<A>(squares[0] + squares[1]) + square) / p.d;
    const A rstd = A(1) / __builtin_sqrt(variance + p.eps);
    T* y = p.y + i * p.y_row;
    for_each_pair<A>(
        p.d,
        [&](int64_t k, auto count) {
          Vec<A> v[count.value];
          for (int part = 0; part < count.value; ++part) {
            const int64_t at = k + part * lanes<A>;
            const Vec<A> unit = (load(row + at) - mean) * rstd;
            v[part] = unit * load(p.weight + at) + load(p.bias + at);
          }
          store(y + k, v);
        },
        [&](int64_t k) { from_acc((row[k] - mean) * rstd * p.weight[k] + p.bias[k], y + k); });
    if (p.mean == nullptr) continue;
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
    const A g_mean = (sum_lanes<A>(g_sums) + g_sum) / p.d;
    const A gu_mean = (sum_lanes<A>(gu_sums) + gu_sum) / p.d;
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

    const int64_t first = p.sources.first(i), last = p.sources.last(i);
    for (int64_t s = first; s < last; ++s) {
      const int64_t token = p.sources.token(s);
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
