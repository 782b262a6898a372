// Vectors of one instruction set, on the compiler's own vector types: +, -, *, comparisons and ?:
// work lane by lane, and a * b + c becomes a fused multiply-add where the processor has one.
//
// Included by kernels_<isa>.cpp only, after FASTAST_ISA (a namespace) and FASTAST_VECTOR_BYTES are
// defined. Everything here has internal linkage or lives in that namespace: an inline function of
// one instruction set must never be linked into another's code.
#include <cstring>

namespace fastast {
namespace FASTAST_ISA {
namespace {

template <class E, int bytes = FASTAST_VECTOR_BYTES>
struct VectorOf {
  typedef E type __attribute__((vector_size(bytes)));
};
template <class A>
using Vec = typename VectorOf<A>::type;

template <class A>
constexpr int64_t lanes = FASTAST_VECTOR_BYTES / sizeof(A);

#define FASTAST_INLINE inline __attribute__((always_inline))

template <class A>
FASTAST_INLINE Vec<A> splat(A value) {
  return value - Vec<A>{};
}

template <class A>
FASTAST_INLINE Vec<A> load_raw(const A* p) {
  Vec<A> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

template <class A>
FASTAST_INLINE void store_raw(A* p, Vec<A> v) {
  std::memcpy(p, &v, sizeof v);
}

// One scalar of storage to and from its accumulation type.

FASTAST_INLINE float to_acc(float v) { return v; }
FASTAST_INLINE double to_acc(double v) { return v; }
FASTAST_INLINE float to_acc(bf16 v) {
  const uint32_t bits = static_cast<uint32_t>(v.bits) << 16;
  float out;
  std::memcpy(&out, &bits, sizeof out);
  return out;
}
FASTAST_INLINE float to_acc(f16 v) {
  // Exponent and mantissa move up to fp32's places; a product with 2^112 mends the bias, which
  // also makes subnormals right. Infinities and NaNs get fp32's largest exponent back.
  const uint32_t sign = static_cast<uint32_t>(v.bits & 0x8000u) << 16;
  const uint32_t body = static_cast<uint32_t>(v.bits & 0x7fffu) << 13;
  float magnitude;
  std::memcpy(&magnitude, &body, sizeof magnitude);
  magnitude *= 0x1p112f;
  uint32_t bits;
  std::memcpy(&bits, &magnitude, sizeof bits);
  if ((v.bits & 0x7c00u) == 0x7c00u) bits |= 0x7f800000u;
  bits |= sign;
  float out;
  std::memcpy(&out, &bits, sizeof out);
  return out;
}

FASTAST_INLINE void from_acc(float v, float* p) { *p = v; }
FASTAST_INLINE void from_acc(double v, double* p) { *p = v; }
FASTAST_INLINE void from_acc(float v, bf16* p) {
  uint32_t bits;
  std::memcpy(&bits, &v, sizeof bits);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // to nearest even
  p->bits = v != v ? 0x7fc0u : static_cast<uint16_t>(rounded);
}
FASTAST_INLINE void from_acc(float v, f16* p) {
  uint32_t bits;
  std::memcpy(&bits, &v, sizeof bits);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) {
    p->bits = sign | 0x7e00u;
  } else if (bits >= 0x477ff000u) {  // 65520 and above round to infinity
    p->bits = sign | 0x7c00u;
  } else if (bits < 0x38800000u) {  // subnormal: adding 0.5 lets fp32 round at half's last place
    float magnitude;
    std::memcpy(&magnitude, &bits, sizeof magnitude);
    magnitude += 0.5f;
    uint32_t shifted;
    std::memcpy(&shifted, &magnitude, sizeof shifted);
    p->bits = sign | static_cast<uint16_t>(shifted - 0x3f000000u);
  } else {
    bits += 0xc8000fffu + ((bits >> 13) & 1u);  // rebias by -112, round to nearest even
    p->bits = sign | static_cast<uint16_t>(bits >> 13);
  }
}

// One vector of storage to and from accumulation.

FASTAST_INLINE Vec<float> load(const float* p) { return load_raw(p); }
FASTAST_INLINE Vec<double> load(const double* p) { return load_raw(p); }
FASTAST_INLINE void store(float* p, Vec<float> v) { store_raw(p, v); }
FASTAST_INLINE void store(double* p, Vec<double> v) { store_raw(p, v); }

using Words = VectorOf<uint32_t>::type;
using Halves = VectorOf<uint16_t, FASTAST_VECTOR_BYTES / 2>::type;

// Between lanes of 16 and 32 bits, and to 8, the high bits lost. GCC 12 takes its own
// __builtin_convertvector apart, in halves or in single lanes.
FASTAST_INLINE Words widen(Halves half) {
#if FASTAST_VECTOR_BYTES == 64
  return (Words)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)half);
#elif FASTAST_VECTOR_BYTES == 32
  return (Words)_mm256_cvtepu16_epi32((__m128i)half);
#else
  return __builtin_convertvector(half, Words);
#endif
}
FASTAST_INLINE Halves narrow(Words words) {  // of 16 bits each
#if FASTAST_VECTOR_BYTES == 64
  return (Halves)_mm512_maskz_cvtepi32_epi16(0xffff, (__m512i)words);
#elif FASTAST_VECTOR_BYTES == 32
  const __m256i pairs = _mm256_packus_epi32((__m256i)words, (__m256i)words);
  return (Halves)_mm256_castsi256_si128(_mm256_permute4x64_epi64(pairs, 0x08));
#else
  return __builtin_convertvector(words, Halves);
#endif
}
FASTAST_INLINE void store_bytes(int8_t* p, Vec<float> bits) {
#if FASTAST_VECTOR_BYTES == 64
  const __m128i bytes = _mm512_maskz_cvtepi32_epi8(0xffff, (__m512i)bits);
  std::memcpy(p, &bytes, sizeof bytes);
#elif FASTAST_VECTOR_BYTES == 32
  const __m256i low = _mm256_srai_epi32(_mm256_slli_epi32((__m256i)bits, 24), 24);
  const __m128i half =
      _mm_packs_epi32(_mm256_castsi256_si128(low), _mm256_extracti128_si256(low, 1));
  const __m128i bytes = _mm_packs_epi16(half, half);
  std::memcpy(p, &bytes, lanes<float>);
#else
  const Words words = (Words)bits;
  for (int64_t i = 0; i < lanes<float>; ++i) p[i] = static_cast<int8_t>(words[i]);
#endif
}
FASTAST_INLINE void store_bytes(int8_t* p, Vec<double> bits) {
  int64_t words[lanes<double>];
  std::memcpy(words, &bits, sizeof words);
  for (int64_t i = 0; i < lanes<double>; ++i) p[i] = static_cast<int8_t>(words[i]);
}

FASTAST_INLINE Vec<float> load(const bf16* p) {
  Halves half;
  std::memcpy(&half, p, sizeof half);
  return (Vec<float>)(widen(half) << 16);
}
// To nearest even in the upper half of each lane; the lower half is of no use.
FASTAST_INLINE Words rounded_to_bf16(Vec<float> v) {
  const Words bits = (Words)v;
  const Words rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  return v != v ? Words{} + 0x7fc00000u : rounded;
}
FASTAST_INLINE void store(bf16* p, Vec<float> v) {
  const Halves half = narrow(rounded_to_bf16(v) >> 16);
  std::memcpy(p, &half, sizeof half);
}

#if FASTAST_VECTOR_BYTES == 64
FASTAST_INLINE Vec<float> load(const f16* p) {
  __m256i half;
  std::memcpy(&half, p, sizeof half);
  return (Vec<float>)_mm512_maskz_cvtph_ps(0xffff, half);
}
FASTAST_INLINE void store(f16* p, Vec<float> v) {
  const __m256i half = _mm512_maskz_cvtps_ph(0xffff, (__m512)v, _MM_FROUND_TO_NEAREST_INT);
  std::memcpy(p, &half, sizeof half);
}
#elif FASTAST_VECTOR_BYTES == 32
FASTAST_INLINE Vec<float> load(const f16* p) {
  __m128i half;
  std::memcpy(&half, p, sizeof half);
  return (Vec<float>)_mm256_cvtph_ps(half);
}
FASTAST_INLINE void store(f16* p, Vec<float> v) {
  const __m128i half = _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
  std::memcpy(p, &half, sizeof half);
}
#else
FASTAST_INLINE Vec<float> load(const f16* p) {
  Vec<float> v;
  for (int64_t i = 0; i < lanes<float>; ++i) v[i] = to_acc(p[i]);
  return v;
}
FASTAST_INLINE void store(f16* p, Vec<float> v) {
  for (int64_t i = 0; i < lanes<float>; ++i) from_acc(v[i], p + i);
}
#endif

// Vectors beside each other.
template <class T>
FASTAST_INLINE void store(T* p, const Vec<Accumulate<T>> (&v)[1]) {
  store(p, v[0]);
}
template <class T>
FASTAST_INLINE void store(T* p, const Vec<Accumulate<T>> (&v)[2]) {
#if FASTAST_VECTOR_BYTES == 64
  if constexpr (std::is_same_v<T, bf16>) {
    typedef uint16_t Numbers __attribute__((vector_size(64)));
    const Numbers upper = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31,
                           33, 35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
    const __m512i both = _mm512_permutex2var_epi16((__m512i)rounded_to_bf16(v[0]), (__m512i)upper,
                                                   (__m512i)rounded_to_bf16(v[1]));
    std::memcpy(p, &both, sizeof both);
    return;
  }
#endif
  store(p, v[0]);
  store(p + lanes<Accumulate<T>>, v[1]);
}

// f(i, vector) over [0, d): whole vectors, then f(i, scalar) for the tail.
template <class A, class WholeF, class TailF>
FASTAST_INLINE void for_each_lane(int64_t d, WholeF whole, TailF tail) {
  int64_t i = 0;
  for (; i + lanes<A> <= d; i += lanes<A>) whole(i);
  for (; i < d; ++i) tail(i);
}

// The same, two vectors at a time and then one: f(i, Count<2>()), f(i, Count<1>()).
template <int n>
using Count = std::integral_constant<int, n>;
template <class A, class WholeF, class TailF>
FASTAST_INLINE void for_each_pair(int64_t d, WholeF whole, TailF tail) {
  int64_t i = 0;
  for (; i + 2 * lanes<A> <= d; i += 2 * lanes<A>) whole(i, Count<2>());
  if (i + lanes<A> <= d) {
    whole(i, Count<1>());
    i += lanes<A>;
  }
  for (; i < d; ++i) tail(i);
}

}  // namespace
}  // namespace FASTAST_ISA
}  // namespace fastast
