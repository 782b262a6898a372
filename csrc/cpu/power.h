// Polynomials, powers of two and logarithms in vectors. Included as vec.h is, after it.
#pragma once

#include <initializer_list>

namespace fastast {
namespace FASTAST_ISA {
namespace {

template <class A>
FASTAST_INLINE Vec<A> polynomial(Vec<A> f, std::initializer_list<A> coefficients) {
  Vec<A> p = {};
  for (const A c : coefficients) p = p * f + splat<A>(c);
  return p;
}

// The natural logarithm to a unit in the last place, of normal numbers above zero, infinity and
// NaN: x = 2^k (1 + f) with f in [sqrt(1/2) - 1, sqrt(2) - 1], and a polynomial fitted to log(1 +
// f).
FASTAST_INLINE Vec<float> natural_log(Vec<float> x) {
  constexpr int32_t kRootHalf = 0x3f3504f3;
  using Integers = VectorOf<int32_t>::type;
  const Integers bits = (Integers)x;
  const Integers k = (bits - kRootHalf) >> 23;
  const Vec<float> f = (Vec<float>)(bits - (k << 23)) - splat(1.0f);
  // k in the last bits of a float that has a unit there.
  const Vec<float> power = (Vec<float>)(k + 0x4b400000) - splat(0x1.8p23f);
  const Vec<float> square = f * f;
  const Vec<float> rest = polynomial(f, {-0.0763449731f, 0.127615823f, -0.131601846f, 0.142017575f,
                                         -0.166233571f, 0.200012269f, -0.25000821f, 0.333333317f});
  // log 2 in two parts, of which the first has few enough bits for a product without rounding.
  Vec<float> log = rest * (square * f) + power * splat(-2.12194440e-4f);
  log += f - splat(0.5f) * square;
  log += power * splat(0.693359375f);
  return x < splat(__builtin_inff()) ? log : x;
}

#if FASTAST_VECTOR_BYTES == 64
// 2^x to 3e-6, for weights that are rounded to bf16: a polynomial of what x has beyond an integer.
FASTAST_INLINE Vec<float> power_of_two(Vec<float> x) {
  const __m512 f =
      _mm512_maskz_reduce_ps(0xffff, (__m512)x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  const Vec<float> p =
      polynomial((Vec<float>)f, {0.013534168f, 0.05201146f, 0.24144275f, 0.69300383f, 1.0000026f});
  return (Vec<float>)_mm512_maskz_scalef_ps(0xffff, (__m512)p,
                                            (__m512)x);  // by the power that is no more than x
}
#endif

}  // namespace
}  // namespace FASTAST_ISA
}  // namespace fastast
