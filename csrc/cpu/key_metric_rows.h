// The metric of keys: see Kernels in kernels.h. Included by kernels_<isa>.cpp only.
//
// out[n] = s / |s| for s = sum_h k[h, n]: the mean at unit length. Sums are in registers; heads d
// values read and d fp32 written a token. What takes the time is waiting for keys that another core
// has just written or that are no longer in L2: rows of the packed qkv buffer lie too far apart for
// the hardware to guess the next.
#include "arena.h"
#include "lanes.h"

namespace fastast {
namespace FASTAST_ISA {
namespace {

// Two vectors of a row, and how they are put in order: of bf16 the even values and the odd, which
// takes half of the operations that neighbours take.
template <class T, class V>
FASTAST_INLINE void load_two(const T* row, V& first, V& second) {
  first = load(row);
  second = load(row + sizeof(V) / sizeof(first[0]));
}
template <class T, class V>
FASTAST_INLINE void put_in_order(const T*, V&, V&) {}
FASTAST_INLINE void load_two(const bf16* row, Vec<float>& even, Vec<float>& odd) {
  Words pairs;
  std::memcpy(&pairs, row, sizeof pairs);
  even = (Vec<float>)(pairs << 16);
  odd = (Vec<float>)(pairs & 0xffff0000u);
}
template <int64_t... i>
FASTAST_INLINE void interleave(Vec<float>& a, Vec<float>& b, std::integer_sequence<int64_t, i...>) {
  constexpr int64_t L = lanes<float>;
  const Vec<float> low = chosen(a, b, std::integer_sequence<int64_t, (i / 2 + i % 2 * L)...>());
  b = chosen(a, b, std::integer_sequence<int64_t, ((L + i) / 2 + i % 2 * L)...>());
  a = low;
}
FASTAST_INLINE void put_in_order(const bf16*, Vec<float>& even, Vec<float>& odd) {
  interleave(even, odd, Lanes<lanes<float>>());
}

template <class T>
void key_metric_rows(const T* k, int64_t heads, int64_t head_stride, int64_t row_stride, int64_t d,
                     int64_t begin, int64_t end, float* out) {
  using A = Accumulate<T>;
  constexpr int64_t L = lanes<A>, kWide = 4 * L;
  const RowBuffer<A> buffer(d);
  A* const sums = buffer.data;
  for (int64_t n = begin; n < end; ++n, out += d) {
    const T* const row = k + n * row_stride;
    // The row after the next, and the pages of one farther on, whose addresses take as long to
    // find.
    const T* const soon = row + 2 * row_stride;
    __builtin_prefetch(soon + 2 * row_stride);
    __builtin_prefetch(soon + 2 * row_stride + (heads - 1) * head_stride);
    for (int64_t h = 0; h < heads; ++h)
      for (int64_t c = 0; c < d; c += 64 / static_cast<int64_t>(sizeof(T)))
        __builtin_prefetch(soon + h * head_stride + c);

    Vec<A> squares{};
    A square = 0;
    int64_t c = 0;
    for (; c + kWide <= d; c += kWide) {
      Vec<A> sum[4] = {};
      for (int64_t h = 0; h < heads; ++h)
#pragma GCC unroll 2
        for (int64_t v = 0; v < 4; v += 2) {
          Vec<A> first, second;
          load_two(row + h * head_stride + c + v * L, first, second);
          sum[v] += first;
          sum[v + 1] += second;
        }
#pragma GCC unroll 2
      for (int64_t v = 0; v < 4; v += 2) {
        put_in_order(row, sum[v], sum[v + 1]);
        squares += sum[v] * sum[v];
        squares += sum[v + 1] * sum[v + 1];
        store(sums + c + v * L, sum[v]);
        store(sums + c + (v + 1) * L, sum[v + 1]);
      }
    }
    for (; c < d; ++c) {
      A sum = 0;
      for (int64_t h = 0; h < heads; ++h) sum += to_acc(row[h * head_stride + c]);
      sums[c] = sum;
      square += sum * sum;
    }
    const A norm = __builtin_sqrt(sum_lanes<A>(squares) + square);
    const A least = A(1e-12) * heads;  // a mean of 1e-12
    const A inverse = A(1) / (norm > least || norm != norm ? norm : least);
    for (c = 0; c < d; ++c) out[c] = static_cast<float>(sums[c] * inverse);
  }
}

}  // namespace
}  // namespace FASTAST_ISA
}  // namespace fastast
