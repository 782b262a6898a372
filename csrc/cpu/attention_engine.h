// What attention and its backward do arithmetic with: exponentials, sums of lanes, and an engine of
// matrix products. Included by users of vec.h, after it.
//
// An Engine has: Element (of a left operand) and Pair (what it multiplies kPair of at a time),
// kRows, kWide, kStep (the depth of a product is a multiple of it), and
//   power(x), kUnit                       exp(x / kUnit)
//   multiply<a_pitch>(a, b, pitch, depth, c, c_pitch, add)  C (+)= A B for A [kRows, depth] of rows
//                                         a_pitch apart, B [depth / kPair, kWide] and C
//                                         [kRows, kWide]
//   put(p, low, high)                     kWide values as Elements
//   put_rows(to, upper, lower)            kWide Pairs of what lies below each other in two rows of
//                                         Elements, where kPair is 2
//   put_weights(p, low, high)             the same of weights of kWide keys, key j at weight_at(j)
//   start(), stop()                       around all work of a thread.
#pragma once

#include <cmath>
#include <utility>

#include "lanes.h"
#include "power.h"

namespace fastast {
namespace FASTAST_ISA {
namespace {

#if FASTAST_VECTOR_BYTES < 64
// max(bound, x) and min(bound, x); NaN stays NaN.
FASTAST_INLINE Vec<float> no_less(Vec<float> bound, Vec<float> x) {
#if FASTAST_VECTOR_BYTES == 32
  return (Vec<float>)_mm256_max_ps((__m256)bound, (__m256)x);
#else
  return x < bound ? bound : x;
#endif
}
FASTAST_INLINE Vec<float> no_more(Vec<float> bound, Vec<float> x) {
#if FASTAST_VECTOR_BYTES == 32
  return (Vec<float>)_mm256_min_ps((__m256)bound, (__m256)x);
#else
  return x > bound ? bound : x;
#endif
}
#endif

// e^x to the accuracy of its type, by powers of two. 0 far below.
FASTAST_INLINE Vec<float> exponential(Vec<float> x) {
  const Vec<float> log2e = splat<float>(1.44269504f);
  const auto two_to_the = [](Vec<float> f) {  // from -1/2 to 1/2
    return polynomial(f, {0.00015345812f, 0.0013399931f, 0.0096184891f, 0.055503286f, 0.24022646f,
                          0.69314718f, 1.0f});
  };
#if FASTAST_VECTOR_BYTES == 64
  const __m512 n =
      _mm512_maskz_roundscale_ps(0xffff, (__m512)(x * log2e), _MM_FROUND_TO_NEAREST_INT);
  const Vec<float> f = x * log2e - (Vec<float>)n;
  const __mmask16 above = _mm512_cmp_ps_mask(n, _mm512_set1_ps(-1e4f), _CMP_NLT_US);
  return (Vec<float>)_mm512_maskz_scalef_ps(above, (__m512)two_to_the(f), n);
#else
  x = no_more(splat<float>(88.0f), no_less(splat<float>(-88.0f), x));
  const Vec<float> magic = splat<float>(0x1.8p23f + 127);
  // The nearest integer, and the bias of fp32's exponent, in the low bits.
  const Vec<float> shifted = x * log2e + magic;
  const Vec<float> f = x * log2e - (shifted - magic);
  return two_to_the(f) * (Vec<float>)((Words)shifted << 23);
#endif
}
FASTAST_INLINE Vec<double> exponential(Vec<double> x) {
  const Vec<double> least = splat(-709.2), most = splat(709.0);
  x = x < least ? least : x;
  x = x > most ? most : x;
  // As above, 0 from 2^-1023 on. log 2 in two parts: the products of the first are exact.
  const Vec<double> magic = splat(0x1.8p52 + 1023);
  const Vec<double> shifted = x * splat(1.4426950408889634) + magic;
  const Vec<double> n = shifted - magic;
  const Vec<double> f = x - n * splat(0x1.62e42feep-1) - n * splat(0x1.a39ef35793c76p-33);
  const Vec<double> p = polynomial(
      f, {1 / 6227020800.0, 1 / 479001600.0, 1 / 39916800.0, 1 / 3628800.0, 1 / 362880.0,
          1 / 40320.0, 1 / 5040.0, 1 / 720.0, 1 / 120.0, 1 / 24.0, 1 / 6.0, 1 / 2.0, 1.0, 1.0});
  return p * (Vec<double>)((VectorOf<uint64_t>::type)shifted << 52);
}

// A product of as many rows and columns as are left: at most kRows and kWide.
template <class Engine, int64_t a_pitch, class A>
FASTAST_INLINE void multiply_part(int64_t rows, int64_t wide, const typename Engine::Element* a,
                                  const typename Engine::Pair* b, int64_t pitch, int64_t depth,
                                  A* c, int64_t c_pitch, bool add) {
  constexpr int64_t kRows = Engine::kRows, kFewRows = Engine::kFewRows;
  constexpr int64_t kFewWide = Engine::kFewWide;
  if constexpr (kFewRows == kRows) {
    Engine::template multiply<a_pitch>(a, b, pitch, depth, c, c_pitch, add);
  } else if (rows > kFewRows && wide > kFewWide) {
    Engine::template multiply<a_pitch>(a, b, pitch, depth, c, c_pitch, add);
  } else if (rows > kFewRows) {
    Engine::template multiply<a_pitch, kRows, kFewWide>(a, b, pitch, depth, c, c_pitch, add);
  } else if (wide > kFewWide) {
    Engine::template multiply<a_pitch, kFewRows>(a, b, pitch, depth, c, c_pitch, add);
  } else {
    Engine::template multiply<a_pitch, kFewRows, kFewWide>(a, b, pitch, depth, c, c_pitch, add);
  }
}

// Products of single elements by multiply-adds: fp32 and fp64, and what is converted to them.
template <class A>
struct MultiplyAdd {
  using Element = A;
  using Pair = A;
  static constexpr int64_t kRows = FASTAST_TILE_ROWS, kWide = 2 * lanes<A>, kPair = 1, kStep = 1;
  static constexpr double kUnit = 1;
  static FASTAST_INLINE Vec<A> power(Vec<A> x) { return exponential(x); }

  // What a product may be left with: 64 is 4 kRows and kFewRows.
  static constexpr int64_t kFewRows = kRows > 8 ? 8 : 4, kFewWide = lanes<A>;

  template <int64_t a_pitch, int64_t rows = kRows, int64_t wide = kWide>
  static void multiply(const A* a, const A* b, int64_t pitch, int64_t depth, A* c, int64_t c_pitch,
                       bool add) {
    constexpr int64_t vectors = wide / lanes<A>;
    Vec<A> sum[rows][vectors];
#pragma GCC unroll 16
    for (int64_t i = 0; i < rows; ++i)
#pragma GCC unroll 2
      for (int64_t v = 0; v < vectors; ++v) sum[i][v] = Vec<A>{};
    for (int64_t k = 0; k < depth; ++k) {
      Vec<A> right[vectors];
#pragma GCC unroll 2
      for (int64_t v = 0; v < vectors; ++v) right[v] = load_raw(b + k * pitch + v * lanes<A>);
#pragma GCC unroll 16
      for (int64_t i = 0; i < rows; ++i) {
        const Vec<A> value = splat<A>(a[i * a_pitch + k]);
#pragma GCC unroll 2
        for (int64_t v = 0; v < vectors; ++v) sum[i][v] += value * right[v];
      }
    }
#pragma GCC unroll 16
    for (int64_t i = 0; i < rows; ++i)
#pragma GCC unroll 2
      for (int64_t v = 0; v < vectors; ++v) {
        // Added to C at last: shorter sums round less.
        A* to = c + i * c_pitch + v * lanes<A>;
        store_raw(to, add ? load_raw(to) + sum[i][v] : sum[i][v]);
      }
  }

  static FASTAST_INLINE void put(A* p, Vec<A> low, Vec<A> high) {
    store_raw(p, low);
    store_raw(p + lanes<A>, high);
  }
  static constexpr int64_t lane_at(int64_t place) { return place; }
  static FASTAST_INLINE void put_weights(A* p, Vec<A> low, Vec<A> high) { put(p, low, high); }
  static constexpr int64_t weight_at(int64_t j) { return j; }
  static void start() {}
  static void stop() {}
};

}  // namespace
}  // namespace FASTAST_ISA
}  // namespace fastast
