// Attention in bf16 for processors that multiply it: by dot products of pairs (AVX512-BF16) or of
// tiles (AMX). Library headers come before the pragma: what they define inline must stay code that
// every processor can run.
#include "attend.h"

#ifdef FASTAST_BF16_PRODUCTS
#include <immintrin.h>

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <type_traits>
#include <utility>

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,amx-tile,amx-bf16")

#define FASTAST_ISA avx512_bf16
#define FASTAST_VECTOR_BYTES 64
#define FASTAST_TILE_ROWS 14
#include "vec.h"

#include "attention_rows.h"
#include "bf16_engines.h"

namespace fastast {
namespace FASTAST_ISA {
namespace {

// S = Q K' of 16 queries and 32 keys in tiles 4 and 5, two tile products a step.
struct Scores {
  const bf16* query;     // [16, depth], rows kPitch apart
  const uint32_t* keys;  // [depth / 2, 32]
  int64_t k = 0;

  FASTAST_INLINE void step() {
    if (k == 0) {
      _tile_zero(4);
      _tile_zero(5);
    }
    const bf16* q = query + AttendHead<bf16, Tiles>::query_at(k);
    _tile_loadd(6, q, kPitch * 2);
    _tile_loadd(7, keys + k * 16, 32 * 4);
    _tile_dpbf16ps(4, 6, 7);
    _tile_loadd(7, keys + k * 16 + 16, 32 * 4);
    _tile_dpbf16ps(5, 6, 7);
    k += 32;
  }
  static FASTAST_INLINE void finish(float* out) {  // [16, 32]
    _tile_stored(4, out, 32 * 4);
    _tile_stored(5, out + 16, 32 * 4);
  }
};

// O += P V of a chunk, 32 columns of O at a time in tiles 0 to 3, four tile products a step.
struct Values {
  const bf16* weights;         // [32, keys], rows kPitch apart
  const uint32_t* values;      // [keys / 2, 32] of each 32 columns
  float* out;                  // [32, width]
  int64_t keys, width, panel;  // panel: from 32 columns of the values to the next
  bool add;
  int64_t column = 0, key = 0;

  FASTAST_INLINE void step() {
    float* c = out + column;
    if (key == 0 && add) {
      _tile_loadd(0, c, width * 4);
      _tile_loadd(1, c + 16, width * 4);
      _tile_loadd(2, c + 16 * width, width * 4);
      _tile_loadd(3, c + 16 * width + 16, width * 4);
    } else if (key == 0) {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
    }
    const uint32_t* v = values + column / 32 * panel + key / 2 * 32;
    _tile_loadd(6, v, 32 * 4);
    _tile_loadd(7, weights + key, kPitch * 2);
    _tile_dpbf16ps(0, 7, 6);
    _tile_loadd(7, weights + 16 * kPitch + key, kPitch * 2);
    _tile_dpbf16ps(2, 7, 6);
    _tile_loadd(6, v + 16, 32 * 4);
    _tile_dpbf16ps(3, 7, 6);
    _tile_loadd(7, weights + key, kPitch * 2);
    _tile_dpbf16ps(1, 7, 6);
    key += 32;
    if (key < keys) return;
    _tile_stored(0, c, width * 4);
    _tile_stored(1, c + 16, width * 4);
    _tile_stored(2, c + 16 * width, width * 4);
    _tile_stored(3, c + 16 * width + 16, width * 4);
    key = 0;
    column += 32;
  }
  bool done() const { return column == width; }
};

// The softmax keeps the vector units busy for about as long as the products do the tiles. They are
// interleaved, so that a processor that looks some hundred instructions ahead works on both: while
// 16 rows of scores are weighed, the scores that will take their place are computed, and a part of
// the values of the chunk before.
template <>
void AttendHead<bf16, Tiles>::attend(float* m, bool known) {
  constexpr int64_t kHalf = 16, kGroup = 8;
  std::memset(sums, 0, sizeof(float) * kRows * lanes<float>);
  const int64_t score_steps = depth / 32, value_steps = width / 32;
  for (int64_t half = 0; half < kRows; half += kHalf) {
    Scores first = {query + half * kPitch, keys};
    for (int64_t i = 0; i < score_steps; ++i) first.step();
    first.finish(scores + half * kWide);
  }
  if (!known) guess(m);
  Values before = {nullptr, nullptr, out, 0, 0, 0, false};
  for (int64_t j0 = 0; j0 < n; j0 += kChunk) {
    const int64_t end = j0 + kChunk < n ? j0 + kChunk : n;
    bf16* const chunk = weights + j0 / kChunk % 2 * kRows * kPitch;
    for (int64_t j = j0; j < end; j += kWide) {
      const bool more = j + kWide < n;
      for (int64_t row = 0; row < kRows; row += kHalf) {
        Scores next = {query + row * kPitch, keys + (j + kWide) * (depth / 2)};
        for (int64_t group = 0; group < 2; ++group) {
          for (int64_t i = group * score_steps / 2; more && i < (group + 1) * score_steps / 2; ++i)
            next.step();
          const int64_t quarter = row / kGroup + group;
          for (int64_t i = quarter * value_steps / 4; i < (quarter + 1) * value_steps / 4; ++i)
            if (!before.done()) before.step();
          const int64_t at = row + group * kGroup;
          weigh(scores, j, m, at, at + kGroup, chunk + j % kChunk);
        }
        if (more) next.finish(scores + row * kWide);
      }
    }
    while (!before.done()) before.step();
    before = {chunk, values + j0 / 2 * 32, out, end - j0, width, n / 2 * 32, j0 > 0};
  }
  while (!before.done()) before.step();
}

}  // namespace
}  // namespace FASTAST_ISA

AttendKernel<bf16> avx512_bf16_attention() {
  return avx512_bf16::attend_kernel<bf16, avx512_bf16::DotProducts>();
}
AttendKernel<bf16> amx_attention() {
  return avx512_bf16::attend_kernel<bf16, avx512_bf16::Tiles>();
}

}  // namespace fastast

#pragma GCC pop_options
#endif
