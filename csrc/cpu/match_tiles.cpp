// The match for AMX: scores of 32 tokens of B by 32 of A at a time, as products of tiles.
//
// A token is a sum of bf16 parts: one for bf16, two for fp16, three for fp32, each what the ones
// before leave, rounded. Products of parts are exact and sums fp32; left out are those beyond the
// last place of fp32, where the numbers of the two parts add up to more than 2. So one product of
// tiles for bf16, four for fp16 and six for fp32. Lengths come last, as one factor a token.
//
// Products come out of the tiles as [B, A]: lanes are tokens of A, whose running maximum and its
// column go down the rows in registers, while the products of the next block are under way. Bytes:
// the metric once (N c), B's parts (N c parts, in L2) once per 32 tokens of A.
#include "match_kernel.h"

#ifdef FASTAST_BF16_PRODUCTS
#include <immintrin.h>

#include <cmath>
#include <cstring>
#include <utility>

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,amx-tile,amx-bf16")

#define FASTAST_ISA amx
#define FASTAST_VECTOR_BYTES 64
#include "tiles.h"
#include "vec.h"

#include "arena.h"
#include "lanes.h"

namespace fastast {
namespace FASTAST_ISA {
namespace {

constexpr int64_t kBlock = 32;         // tokens of A in a strip, and of B in a block
constexpr int64_t kTile = 512;         // elements of a tile: 16 rows of 32
constexpr int64_t kStep = 2 * kBlock;  // tokens that make one strip and one block

template <class T>
constexpr int64_t kParts = 3;
template <>
constexpr int64_t kParts<f16> = 2;
template <>
constexpr int64_t kParts<bf16> = 1;

// Pairs of parts that are multiplied.
template <class T>
constexpr int64_t kPairs = kParts<T> == 1   ? 1
                           : kParts<T> == 2 ? 4
                                            : 6;

// A sample in memory. A strip or a block is [part][c / 32][half] tiles of 16 tokens: of B rows of
// 32 values, of A pairs of values as rows of 16 tokens.
template <class T>
struct Packed {
  Packed(int64_t n, int64_t c, unsigned char* memory)
      : steps((c + 31) / 32), blocks((n + kStep - 1) / kStep) {
    Arena arena(memory);
    a = arena.template take<bf16>(blocks * size());
    b = arena.template take<bf16>(blocks * size());
    scale_a = arena.template take<float>(blocks * kBlock);
    scale_b = arena.template take<float>(blocks * kBlock);
    offset_b = arena.template take<float>(blocks * kBlock);
    bytes = arena.used(memory);
  }
  int64_t size() const { return kParts<T> * steps * 2 * kTile; }  // of a strip or block
  int64_t at(int64_t part, int64_t step) const { return (part * steps + step) * 2 * kTile; }

  int64_t steps, blocks, bytes;
  bf16 *a, *b;
  float *scale_a, *scale_b;  // 1 / |token|, 0 for one shorter than 1e-12
  float* offset_b;           // 0, minus infinity where nobody may propose
};

// 32 values of a row as parts, of which `left` are there; returns the squares of them, in 16 sums.
FASTAST_INLINE Vec<float> split(const bf16* row, int64_t left, __m512i (&part)[1]) {
  const __mmask32 there = left >= 32 ? ~0u : (1u << left) - 1;
  part[0] = _mm512_maskz_loadu_epi16(there, row);
  const Vec<float> even = (Vec<float>)((Words)part[0] << 16);
  const Vec<float> odd = (Vec<float>)((Words)part[0] & 0xffff0000u);
  return even * even + odd * odd;
}
FASTAST_INLINE Vec<float> load_masked(const float* p, __mmask16 there) {
  return (Vec<float>)_mm512_maskz_loadu_ps(there, p);
}
FASTAST_INLINE Vec<float> load_masked(const f16* p, __mmask16 there) {
  return (Vec<float>)_mm512_maskz_cvtph_ps(there, _mm256_maskz_loadu_epi16(there, p));
}
template <class T, int parts>
FASTAST_INLINE Vec<float> split(const T* row, int64_t left, __m512i (&part)[parts]) {
  const __mmask32 there = left >= 32 ? ~0u : (1u << left) - 1;
  Vec<float> low = load_masked(row, static_cast<__mmask16>(there));
  Vec<float> high = load_masked(row + 16, static_cast<__mmask16>(there >> 16));
  const Vec<float> squares = low * low + high * high;
#pragma GCC unroll 3
  for (int i = 0; i < parts; ++i) {
    // To the nearest bf16; what is left is exact.
    const Vec<float> first = (Vec<float>)(((Words)low + 0x8000u) & 0xffff0000u);
    const Vec<float> second = (Vec<float>)(((Words)high + 0x8000u) & 0xffff0000u);
    part[i] = (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
    low -= first;
    high -= second;
  }
  return squares;
}

FASTAST_INLINE void transpose_tile(bf16* tile) {
  Words rows[16];
  std::memcpy(rows, tile, sizeof rows);
  transpose(rows, Lanes<16>());
  std::memcpy(tile, rows, sizeof rows);
}

// Packs 16 tokens, every other one of `count` from `tokens` on, into the tiles at `to`; their
// scales. False where one is not finite.
template <class T>
FASTAST_INLINE bool pack_half(const Packed<T>& p, const T* tokens, int64_t count, int64_t c,
                              bf16* to, float* scale) {
  alignas(64) float squares[16];
  for (int64_t i = 0; i < 16; ++i) {
    const bool there = 2 * i < count;
    Vec<float> sum = {};
    for (int64_t s = 0; s < p.steps; ++s) {
      __m512i part[kParts<T>] = {};
      if (there) sum += split(tokens + 2 * i * c + 32 * s, c - 32 * s, part);
#pragma GCC unroll 3
      for (int64_t k = 0; k < kParts<T>; ++k) _mm512_store_si512(to + p.at(k, s) + 32 * i, part[k]);
    }
    squares[i] = sum_lanes<float>(sum);
  }
  const __m512 norm = _mm512_maskz_sqrt_ps(0xffff, _mm512_load_ps(squares));
  const __mmask16 has_length = _mm512_cmp_ps_mask(norm, _mm512_set1_ps(1e-12f), _CMP_GE_OQ);
  _mm512_store_ps(scale, _mm512_maskz_div_ps(has_length, _mm512_set1_ps(1), norm));
  return _mm512_cmp_ps_mask(norm, _mm512_set1_ps(INFINITY), _CMP_LT_OQ) == 0xffff;
}

template <class T>
bool pack(const T* tokens, int64_t n, int64_t c, int64_t first_col, int64_t begin, int64_t end,
          unsigned char* memory) {
  const Packed<T> p(n, c, memory);
  bool finite = true;
  for (int64_t at = begin; at < up_to(end, kStep); at += 32) {
    const int64_t block = at / kStep, half = at / 32 % 2, i = at / 2;
    const T* const pair = tokens + (at - begin) * c;
    bf16* const a = p.a + block * p.size() + half * kTile;
    bf16* const b = p.b + block * p.size() + half * kTile;
    finite &= pack_half(p, pair, end - at, c, a, p.scale_a + i);
    finite &= pack_half(p, pair + c, end - at - 1, c, b, p.scale_b + i);
    for (int64_t k = 0; k < kParts<T> * p.steps; ++k) transpose_tile(a + k * 2 * kTile);
    for (int64_t j = i; j < i + 16; ++j)
      p.offset_b[j] = j < first_col || j >= n / 2 ? -INFINITY : 0.0f;
  }
  return finite;
}

// Adds the products of 32 values of a part of 32 tokens of B with one of 32 tokens of A.
FASTAST_INLINE void multiply(const bf16* a, const bf16* b) {
  _tile_loadd(4, a, 64);
  _tile_loadd(6, b, 64);
  _tile_dpbf16ps(0, 6, 4);
  _tile_loadd(5, a + kTile, 64);
  _tile_dpbf16ps(1, 6, 5);
  _tile_loadd(7, b + kTile, 64);
  _tile_dpbf16ps(2, 7, 4);
  _tile_dpbf16ps(3, 7, 5);
}

// The products of a strip and a block in tiles 0 to 3; meanwhile(share) does some of another work,
// to a share of it in sixteenths.
template <class T, class F>
FASTAST_INLINE void multiply(const Packed<T>& p, const bf16* strip, const bf16* block,
                             F meanwhile) {
  int64_t done = 0;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
#pragma GCC unroll 3
  for (int64_t i = kParts<T> - 1; i >= 0; --i)  // small products first
#pragma GCC unroll 3
    for (int64_t j = kParts<T> - 1; j >= 0; --j)
      for (int64_t s = 0; i + j <= 2 && s < p.steps; ++s) {
        multiply(strip + p.at(i, s), block + p.at(j, s));
        meanwhile(16 * ++done / (kPairs<T> * p.steps));
      }
}

// Stores them as [half of B][half of A][16 of B][16 of A].
FASTAST_INLINE void store_products(float* to) {
  _tile_stored(0, to, 64);
  _tile_stored(1, to + 256, 64);
  _tile_stored(2, to + 512, 64);
  _tile_stored(3, to + 768, 64);
}

// The highest score so far of each of 16 tokens of A, and the lowest column with it.
struct Best {
  __m512 high;
  __m512i where;

  FASTAST_INLINE Best() : high(_mm512_set1_ps(-INFINITY)), where(_mm512_setzero_si512()) {}
  FASTAST_INLINE void take(__m512 score, __m512i column) {  // columns ascend
    const __mmask16 higher = _mm512_cmp_ps_mask(score, high, _CMP_GT_OQ);
    high = _mm512_maskz_max_ps(0xffff, score, high);
    where = _mm512_mask_mov_epi32(where, higher, column);
  }
  FASTAST_INLINE void join(const Best& other) {
    const __mmask16 equal = _mm512_cmp_ps_mask(other.high, high, _CMP_EQ_OQ) &
                            _mm512_cmplt_epi32_mask(other.where, where);
    const __mmask16 better = equal | _mm512_cmp_ps_mask(other.high, high, _CMP_GT_OQ);
    high = _mm512_maskz_max_ps(0xffff, other.high, high);
    where = _mm512_mask_mov_epi32(where, better, other.where);
  }
};

template <class T>
void score(int64_t n, int64_t c, const unsigned char* memory, int64_t begin, int64_t end,
           float* best, int32_t* partner) {
  const Packed<T> p(n, c, const_cast<unsigned char*>(memory));
  alignas(64) float products[4 * 256];
  start_tiles();
  for (int64_t first = begin; first < end; first += kBlock) {
    const bf16* const strip = p.a + first / kBlock * p.size();
    Best found[2][2];  // of the halves of blocks apart: four chains of comparisons side by side
    multiply(p, strip, p.b, [](int64_t) {});
    store_products(products);
    for (int64_t column = 0; column < n / 2; column += kBlock) {
      int64_t row = 0;
      const auto take_rows = [&](int64_t to) {
        for (; row < to; ++row)
#pragma GCC unroll 2
          for (int64_t b = 0; b < 2; ++b) {
            const int64_t j = column + b * 16 + row;
            const __m512 scale = _mm512_set1_ps(p.scale_b[j]);
            const __m512 offset = _mm512_set1_ps(p.offset_b[j]);
            const __m512i index = _mm512_set1_epi32(static_cast<int>(j));
#pragma GCC unroll 2
            for (int64_t a = 0; a < 2; ++a) {
              const __m512 product = _mm512_load_ps(products + (b * 2 + a) * 256 + row * 16);
              found[b][a].take(_mm512_fmadd_ps(product, scale, offset), index);
            }
          }
      };
      const bool more = column + kBlock < n / 2;
      if (more) multiply(p, strip, p.b + (column / kBlock + 1) * p.size(), take_rows);
      take_rows(16);
      if (more) store_products(products);
    }
    for (int64_t a = 0; a < 2; ++a) {
      found[0][a].join(found[1][a]);
      const int64_t at = first + a * 16, left = end - at;
      const __mmask16 there = left >= 16 ? 0xffff : left > 0 ? (1u << left) - 1 : 0;
      const __m512 scale = _mm512_load_ps(p.scale_a + at);
      _mm512_mask_storeu_ps(best + at, there, _mm512_mul_ps(found[0][a].high, scale));
      _mm512_mask_storeu_epi32(partner + at, there, found[0][a].where);
    }
  }
  stop_tiles();
}

template <class T>
int64_t memory(int64_t n, int64_t c) {
  return Packed<T>(n, c, nullptr).bytes;
}

}  // namespace
}  // namespace FASTAST_ISA

template <class T>
MatchKernel<T> amx_match() {
  using namespace FASTAST_ISA;
  return {kStep, kBlock, (1 << 23) / kPairs<T>, memory<T>, pack<T>, score<T>};
}
template MatchKernel<float> amx_match<float>();
template MatchKernel<f16> amx_match<f16>();
template MatchKernel<bf16> amx_match<bf16>();

}  // namespace fastast

#pragma GCC pop_options
#endif
