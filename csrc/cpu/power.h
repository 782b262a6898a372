// Polynomials and powers of two in vectors. Included as vec.h is, after it.
#pragma once

#include <initializer_list>

namespace fastast {
namespace FASTAST_ISA {
namespace {

FASTAST_INLINE Vec<float> polynomial(Vec<float> f, std::initializer_list<float> coefficients) {
  Vec<float> p = {};
  for (const float c : coefficients) p = p * f + splat<float>(c);
  return p;
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
