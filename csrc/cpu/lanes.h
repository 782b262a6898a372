// Exchanges between the lanes of vec.h's vectors: sums, maxima, transposition. Included after it,
// by code of one instruction set.
#pragma once

#include <utility>

namespace fastast {
namespace FASTAST_ISA {
namespace {

template <int64_t n>
using Lanes = std::make_integer_sequence<int64_t, n>;

// Lanes of a and b by number, those of b after those of a.
template <class V, int64_t... from>
FASTAST_INLINE V chosen(V a, V b, std::integer_sequence<int64_t, from...>) {
#ifdef __clang__
  return __builtin_shufflevector(a, b, from...);
#else
  using Lane = std::conditional_t<sizeof(a[0]) == 8, int64_t, int32_t>;
  typedef Lane Mask __attribute__((vector_size(sizeof(V))));
  return __builtin_shuffle(a, b, Mask{static_cast<Lane>(from)...});
#endif
}

// The sum of all lanes, by halves.
template <class A, int64_t step = lanes<A> / 2, int64_t... i>
FASTAST_INLINE A sum_lanes(Vec<A> v, std::integer_sequence<int64_t, i...> all) {
  v += chosen(v, v, std::integer_sequence<int64_t, (i ^ step)...>());
  if constexpr (step > 1)
    return sum_lanes<A, step / 2>(v, all);
  else
    return v[0];
}
template <class A>
FASTAST_INLINE A sum_lanes(Vec<A> v) {
  return sum_lanes<A>(v, Lanes<lanes<A>>());
}

// The largest of all lanes, which means nothing where one is NaN.
template <class A, int64_t step = lanes<A> / 2, int64_t... i>
FASTAST_INLINE A most_lane(Vec<A> v, std::integer_sequence<int64_t, i...> all) {
  const Vec<A> other = chosen(v, v, std::integer_sequence<int64_t, (i ^ step)...>());
  v = v > other ? v : other;
  if constexpr (step > 1)
    return most_lane<A, step / 2>(v, all);
  else
    return v[0];
}
template <class A>
FASTAST_INLINE A most_lane(Vec<A> v) {
  return most_lane<A>(v, Lanes<lanes<A>>());
}

// L vectors of L lanes, transposed: blocks of `step` lanes off the diagonal change places.
template <int64_t step = 1, class V, int64_t L, int64_t... i>
FASTAST_INLINE void transpose(V (&v)[L], std::integer_sequence<int64_t, i...> all) {
#pragma GCC unroll 16
  for (int64_t row = 0; row < L; ++row) {
    if ((row & step) != 0) continue;
    const V a = v[row], b = v[row + step];
    v[row] =
        chosen(a, b, std::integer_sequence<int64_t, ((i & step) == 0 ? i : L + i - step)...>());
    v[row + step] =
        chosen(a, b, std::integer_sequence<int64_t, ((i & step) == 0 ? i + step : L + i)...>());
  }
  if constexpr (2 * step < L) transpose<2 * step>(v, all);
}

}  // namespace
}  // namespace FASTAST_ISA
}  // namespace fastast
