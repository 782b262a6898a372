// The engines (attention_engine.h) of processors that multiply bf16: dot products of pairs
// (AVX512-BF16) and products of tiles (AMX).
#pragma once

#include "attention_engine.h"
#include "tiles.h"

namespace fastast {
namespace FASTAST_ISA {
namespace {

struct InBf16 {
  using Element = bf16;
  using Pair = uint32_t;
  static constexpr int64_t kWide = 32, kFewWide = kWide, kPair = 2;
  static constexpr double kUnit = 1.4426950408889634;  // log2(e)

  static FASTAST_INLINE Vec<float> power(Vec<float> x) { return power_of_two(x); }

  static FASTAST_INLINE void put(bf16* p, Vec<float> low, Vec<float> high) {
    const __m512bh both = _mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
    std::memcpy(p, &both, sizeof both);
  }

  // Rows of weights, key j at weight_at(j).
  static FASTAST_INLINE void put_weights(bf16* p, Vec<float> low, Vec<float> high) {
    put(p, low, high);
  }
  static constexpr int64_t weight_at(int64_t j) { return j; }

  static FASTAST_INLINE void put_rows(uint32_t* to, const bf16* upper, const bf16* lower) {
    const __m512i a = _mm512_loadu_si512(upper), b = _mm512_loadu_si512(lower);
    const __m512i low = _mm512_unpacklo_epi16(a, b), high = _mm512_unpackhi_epi16(a, b);
    const __m512i first = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11);
    const __m512i second = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
    _mm512_storeu_si512(to, _mm512_permutex2var_epi64(low, first, high));
    _mm512_storeu_si512(to + 16, _mm512_permutex2var_epi64(low, second, high));
  }

  // Two rows of Elements, as put() left them, as Pairs of what lies below each other, lane i of
  // them in place place_of(i): what the instruction does to both is left as it is.
  static FASTAST_INLINE void put_pairs(uint32_t* to, const bf16* upper, const bf16* lower) {
    const __m512i a = _mm512_loadu_si512(upper), b = _mm512_loadu_si512(lower);
    _mm512_storeu_si512(to, _mm512_unpacklo_epi16(a, b));
    _mm512_storeu_si512(to + 16, _mm512_unpackhi_epi16(a, b));
  }
  static constexpr int64_t lane_at(int64_t place) {
    return place % 16 / 4 * 8 + place / 16 * 4 + place % 4;
  }
};

struct DotProducts : InBf16 {
  static constexpr int64_t kRows = FASTAST_TILE_ROWS, kFewRows = kRows, kStep = 2;

  template <int64_t a_pitch>
  static void multiply(const bf16* a, const uint32_t* b, int64_t pitch, int64_t depth, float* c,
                       int64_t c_pitch, bool add) {
    __m512 sum[kRows][2];
#pragma GCC unroll 16
    for (int64_t i = 0; i < kRows; ++i)
#pragma GCC unroll 2
      for (int64_t v = 0; v < 2; ++v)
        sum[i][v] = add ? _mm512_loadu_ps(c + i * c_pitch + v * 16) : _mm512_setzero_ps();
    for (int64_t k = 0; k < depth; k += 2, b += pitch) {
      const __m512bh first = (__m512bh)_mm512_loadu_si512(b);
      const __m512bh second = (__m512bh)_mm512_loadu_si512(b + 16);
#pragma GCC unroll 16
      for (int64_t i = 0; i < kRows; ++i) {
        int pair;
        std::memcpy(&pair, a + i * a_pitch + k, sizeof pair);
        const __m512bh value = (__m512bh)_mm512_set1_epi32(pair);
        sum[i][0] = _mm512_dpbf16_ps(sum[i][0], value, first);
        sum[i][1] = _mm512_dpbf16_ps(sum[i][1], value, second);
      }
    }
#pragma GCC unroll 16
    for (int64_t i = 0; i < kRows; ++i)
#pragma GCC unroll 2
      for (int64_t v = 0; v < 2; ++v) _mm512_storeu_ps(c + i * c_pitch + v * 16, sum[i][v]);
  }
  static void start() {}
  static void stop() {}
};

// Products of tiles: A is 16 rows of 32 values, B 16 pairs of rows of 16 columns, C 16 x 16.
struct Tiles : InBf16 {
  static constexpr int64_t kRows = 32, kFewRows = kRows, kStep = 32;

  template <int64_t a_pitch>
  static void multiply(const bf16* a, const uint32_t* b, int64_t pitch, int64_t depth, float* c,
                       int64_t c_pitch, bool add) {
    float* const c_low = c + 16 * c_pitch;
    if (add) {
      _tile_loadd(0, c, c_pitch * 4);
      _tile_loadd(1, c + 16, c_pitch * 4);
      _tile_loadd(2, c_low, c_pitch * 4);
      _tile_loadd(3, c_low + 16, c_pitch * 4);
    } else {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
    }
    for (int64_t k = 0; k < depth; k += 32, b += 16 * pitch) {
      _tile_loadd(4, a + k, a_pitch * 2);
      _tile_loadd(6, b, pitch * 4);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(7, b + 16, pitch * 4);
      _tile_dpbf16ps(1, 4, 7);
      _tile_loadd(5, a + 16 * a_pitch + k, a_pitch * 2);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, c, c_pitch * 4);
    _tile_stored(1, c + 16, c_pitch * 4);
    _tile_stored(2, c_low, c_pitch * 4);
    _tile_stored(3, c_low + 16, c_pitch * 4);
  }
  // Of 32 keys four of the first half and four of the second by turns, as packing instructions
  // leave them.
  static FASTAST_INLINE void put_weights(bf16* p, Vec<float> low, Vec<float> high) {
    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
    const __m512i turns = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
    _mm512_storeu_si512(p, _mm512_permutexvar_epi64(turns, both));
  }
  static constexpr int64_t weight_at(int64_t j) {
    const int64_t i = j % kWide;
    return j - i + i % 16 / 4 * 8 + i / 16 * 4 + i % 4;
  }

  static void start() { start_tiles(); }
  static void stop() { stop_tiles(); }
};

}  // namespace
}  // namespace FASTAST_ISA
}  // namespace fastast
