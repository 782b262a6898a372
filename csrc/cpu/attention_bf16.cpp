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
#pragma GCC target( \
    "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512bf16,amx-tile,amx-bf16")

#define FASTAST_ISA avx512_bf16
#define FASTAST_VECTOR_BYTES 64
#define FASTAST_TILE_ROWS 14
#include "vec.h"

#include "attention_rows.h"
#include "bf16_engines.h"

namespace fastast {
namespace FASTAST_ISA {
namespace {

// What is not inlined keeps what it captures in memory, and there it waits for every store of a
// tile.
#define FASTAST_INLINE_LAMBDA __attribute__((always_inline))

// The tiles' numbers are part of their instructions.
template <int>
struct Tile;
#define FASTAST_TILE(i)                                                                         \
  template <>                                                                                   \
  struct Tile<i> {                                                                              \
    static FASTAST_INLINE void zero() { _tile_zero(i); }                                        \
    static FASTAST_INLINE void load(const float* p, int64_t b) { _tile_loadd(i, p, b); }        \
    static FASTAST_INLINE void store(float* p, int64_t bytes) { _tile_stored(i, p, bytes); }    \
    static constexpr bool kLast = i == 3;                                                       \
    /* Where it lies in a block of rows `pitch` apart. */                                       \
    static FASTAST_INLINE int64_t at(int64_t pitch) { return i / 2 * 16 * pitch + i % 2 * 16; } \
  }
FASTAST_TILE(0);
FASTAST_TILE(1);
FASTAST_TILE(2);
FASTAST_TILE(3);

// 32 x 32 sums in tiles 0 to 3: the upper and the lower half of A, in tiles 4 and 5, by the left
// and the right half of B, in 6 and 7. A store that waits for its sums holds up the products behind
// it, so a block's sums are stored between the first products of the next. B, which is read once,
// passes by the L1 cache (tileloaddt1): otherwise it would push out what stores go to.
class Sums {
 public:
  // C = start + A B, a row of A in pieces of kChunk. `between` is called after each product.
  template <class Start, class Between>
  FASTAST_INLINE void multiply(const bf16* a, const uint32_t* b, int64_t depth, float* c,
                               int64_t c_pitch, Start start, Between between) {
    for (int64_t k = 0; k < depth; k += 32, b += 16 * 32) {
      const bf16* upper = a + k / kChunk * 32 * kPitch + k % kChunk;
      const bf16* lower = upper + 16 * kPitch;
      if (k == 0) next<0>(start);
      _tile_loadd(4, upper, kPitch * 2);
      _tile_stream_loadd(6, b, 32 * 4);
      _tile_dpbf16ps(0, 4, 6);
      between();
      if (k == 0) next<1>(start);
      _tile_stream_loadd(7, b + 16, 32 * 4);
      _tile_dpbf16ps(1, 4, 7);
      between();
      if (k == 0) next<2>(start);
      _tile_loadd(5, lower, kPitch * 2);
      _tile_dpbf16ps(2, 5, 6);
      between();
      if (k == 0) next<3>(start);
      _tile_dpbf16ps(3, 5, 7);
      between();
    }
    c_ = c;
    pitch_ = c_pitch;
  }

  void flush() {
    const auto keep = [](auto) {};
    next<0>(keep);
    next<1>(keep);
    next<2>(keep);
    next<3>(keep);
    c_ = nullptr;
  }

 private:
  template <int i, class Start>
  FASTAST_INLINE void next(Start start) {
    if (c_) Tile<i>::store(c_ + Tile<i>::at(pitch_), pitch_ * 4);
    start(Tile<i>());
  }
  float* c_ = nullptr;  // where the sums in the tiles belong
  int64_t pitch_ = 0;
};

// The way of a block of queries past all keys, kBlocks times 32 of them at a time. Vector units
// have their work while tiles have theirs: rows of scores are weighed between products, those of a
// chunk between the products of its own further scores, of the values of the chunk before, and of
// the next chunk's scores.
struct Walk {
  static constexpr int64_t kBlocks = 2;
  const bf16* query;
  const uint32_t *keys, *values;
  bf16* weights;        // [2, 32, kPitch]
  float *scores, *out;  // [kBlocks, 32, 32], [32, width]
  int64_t n, depth, width;

  // Of scores that begin with `starts`, 32 for each block of keys, `step` apart. `guess()` is
  // called once the first block is there; `weigh(scores, j, i, to)`: of query i and 32 keys from j
  // on. The last sums stay in `sums`, and those that are in it go where they belong first. Where no
  // rows of scores are there to be weighed there are others to be done, 32 each, so many at a time:
  // `first(count)` once those sums are stored, `last(count)` once all is weighed.
  template <class Guess, class Weigh, class First, class Last>
  FASTAST_INLINE void run(Sums& sums, const float* starts, int64_t step, Guess guess, Weigh weigh,
                          First first, Last last) const {
    const int64_t blocks = n / 32;
    int64_t computed = 0, scored = 0;  // blocks; the last computed is in tiles
    bool stored = false;               // what was in tiles before
    // The rows that are weighed next, and what is left of their block.
    int64_t weighed = 0, row = 0;
    const float* from = scores;
    bf16* to = weights;
    const auto weigh_pair = [&]() FASTAST_INLINE_LAMBDA {
      if (weighed == scored) return;
      weigh(from, weighed * 32, row, to);
      weigh(from, weighed * 32, row + 1, to);
      row += 2;
      if (row < 32) return;
      row = 0;
      ++weighed;
      from = scores + weighed % kBlocks * 32 * 32;
      to = weights + weighed / kBlocks % 2 * 32 * kPitch + weighed % kBlocks * 32;
    };
    const auto weigh_until = [&](int64_t block) FASTAST_INLINE_LAMBDA {
      while (weighed < block) weigh_pair();
    };
    const auto flush = [&]() FASTAST_INLINE_LAMBDA {
      sums.flush();
      scored = computed;
    };
    const auto score = [&](int64_t block, auto between) FASTAST_INLINE_LAMBDA {
      const float* start = starts + block * step;
      const auto begin = [&](auto tile) FASTAST_INLINE_LAMBDA {
        tile.load(start + tile.at(0), 0);
        if (!tile.kLast) return;
        scored = computed;
        stored = true;
      };
      sums.multiply(query, keys + block * 32 * (depth / 2), depth,
                    scores + block % kBlocks * 32 * 32, 32, begin, between);
      computed = block + 1;
    };
    const auto add_values = [&](int64_t from, int64_t to, auto between) FASTAST_INLINE_LAMBDA {
      const bf16* const p = weights + from / kBlocks % 2 * 32 * kPitch;
      for (int64_t c = 0; c < width; c += 32) {
        const auto begin = [&](auto tile) FASTAST_INLINE_LAMBDA {
          if (from == 0)
            tile.zero();
          else
            tile.load(out + c + tile.at(width), width * 4);
          if (tile.kLast) scored = computed;
        };
        sums.multiply(p, values + (c * n + from * 32 * 32) / 2, (to - from) * 32, out + c, width,
                      begin, between);
      }
    };
    score(0, [&]() FASTAST_INLINE_LAMBDA {
      if (stored) first(8);
    });
    first(32);
    flush();
    guess();
    for (int64_t chunk = 0; chunk < blocks; chunk += kBlocks) {
      // Scores go where those of kBlocks before were, once their tiles make room for others.
      for (int64_t block = chunk; block < chunk + kBlocks && block < blocks; ++block) {
        if (block == 0) continue;
        weigh_until(block - kBlocks);
        score(block, weigh_pair);
      }
      weigh_until(chunk);
      if (chunk > 0) add_values(chunk - kBlocks, chunk, weigh_pair);
    }
    flush();
    weigh_until(blocks);
    add_values((blocks - 1) / kBlocks * kBlocks, blocks, [&]() FASTAST_INLINE_LAMBDA { last(4); });
    last(32);
  }
};

// What 2^f lacks to 1 + f, in units of 1/256, for f of four of the 256 steps of a unit.
struct Corrections {
  uint8_t of[64];
  constexpr Corrections() : of() {
    double power = 1.0013547198921082;  // 2^(1/512)
    // By 2^(4/256) from one to the next.
    for (int i = 0; i < 64; ++i, power *= 1.0108892860517005)
      of[i] = static_cast<uint8_t>(256 + 4 * i + 0.5 - 256 * power + 0.5);
  }
};
constexpr Corrections kCorrections;

// 2^x as bf16, 32 at a time, in integers: 256 (127 + x) halved has the exponent in its upper bits
// and, of 2^f for the fraction f of x, 1 + f below; a table has the rest. So x is rounded to 1/256,
// 2^x off by up to 0.4 % where rounding to bf16 alone makes 0.2. From 2^128 on it is infinite or no
// number; below 2^-127 it is 0.
class Powers {
 public:
  // What is added to 256 x as a float leaves its nearest integer in the lowest bits.
  static constexpr float kMagic = 0x1.8p23f;
  static constexpr int32_t kMagicBits = 0x4b400000, kOne = 127 * 256 + 1;  // 1: half of what is cut
  static constexpr float kSteps = 256;

  explicit Powers(float factor)
      : factor_(_mm512_set1_ps(factor * kSteps)),
        magic_(_mm512_set1_ps(kMagic)),
        corrections_(_mm512_loadu_si512(kCorrections.of)) {}

  // Of s factor - m; `base` is kMagicBits - kOne + 256 m.
  FASTAST_INLINE __m512i operator()(const float* s, int32_t base) const {
    const __m512i less = _mm512_set1_epi32(base);
    const __m512i low = (__m512i)_mm512_fmadd_ps(_mm512_load_ps(s), factor_, magic_);
    const __m512i high = (__m512i)_mm512_fmadd_ps(_mm512_load_ps(s + 16), factor_, magic_);
    // Saturated; in fours of each by turns, as Tiles::weight_at() says.
    const __m512i x =
        _mm512_packus_epi32(_mm512_sub_epi32(low, less), _mm512_sub_epi32(high, less));
    constexpr __mmask64 kLower = 0x5555555555555555;  // bytes
    const __m512i lacks =
        _mm512_maskz_permutexvar_epi8(kLower, _mm512_srli_epi16(x, 2), corrections_);
    return _mm512_srli_epi16(_mm512_sub_epi16(x, lacks), 1);
  }

 private:
  __m512 factor_, magic_;
  __m512i corrections_;
};

template <>
void AttendHead<bf16, Tiles>::attend(float* m, bool known) {
  alignas(64) static constexpr float kZeros[kWide] = {};
  const Walk walk = {query, keys, values, weights, scores, out, n, depth, width};
  std::memset(sums, 0, sizeof(float) * kRows * lanes<float>);
  Sums tiles;
  const auto nothing = [](int64_t) {};
  walk.run(
      tiles, kZeros, 0,
      [&] {
        if (!known) guess(m);
      },
      [&](const float* s, int64_t j, int64_t i, bf16* to)
          FASTAST_INLINE_LAMBDA { weigh(s, j, m, i, i + 1, to); },
      nothing, nothing);
  tiles.flush();
}

// Powers are for an output alone: the log-sum-exp is as exact as the sums of weights in fp32, and
// so are weights of rows with logits too far apart, or beyond what Powers take. The last rows of a
// block are written, and the queries of the next loaded, between products of the other.
template <>
void AttendHead<bf16, Tiles>::blocks(int64_t b, int64_t h, int64_t begin, int64_t end) {
  if (p.lse) {
    for (int64_t at = begin; at < end; ++at) block(b, h, at);
    return;
  }
  const Powers powers(factor);
  const __m512bh ones = (__m512bh)_mm512_set1_epi16(0x3f80);
  int32_t base[kRows];
  const auto guess_rows = [&] {
    constexpr float kMost = 8000;  // of 2^14 that kMagic has room for
    for (int64_t i = 0; i < kRows; ++i) {
      const Vec<float> low = load_raw(scores + i * kWide), high = load_raw(scores + i * kWide + 16);
      const float most = most_lane<float>(low > high ? low : high) * factor;
      const bool fits = std::fabs(most) < kMost;
      const int32_t step = fits ? static_cast<int32_t>(most * Powers::kSteps) : 0;
      base[i] = Powers::kMagicBits - Powers::kOne + step;
    }
  };
  const auto load = [&](int64_t block, int64_t i) FASTAST_INLINE_LAMBDA {
    load_query(b, h, block * kRows + i, query + i * kPitch);
  };
  const auto load_all = [&](int64_t block) {
    for (int64_t i = 0; i < rows_of(block); ++i) load(block, i);
  };
  float share[kRows];  // of the block whose O is in `out` or in tiles
  int64_t to_write = 0;
  const auto write_row = [&](int64_t block, int64_t i) FASTAST_INLINE_LAMBDA {
    write(b, h, block * kRows + i, out + i * width, share[i]);
  };

  const Walk walk = {query, keys, values, weights, scores, out, n, depth, width};
  Sums tiles;
  load_all(begin);
  for (int64_t at = begin; at < end; ++at) {
    const int64_t here = rows_of(at), next = at + 1 < end ? rows_of(at + 1) : 0;
    int64_t written = 0, added = 0;
    bool near = true;
    std::memset(sums, 0, sizeof(float) * kRows * lanes<float>);
    walk.run(
        tiles, start, kWide, guess_rows,
        [&](const float* s, int64_t, int64_t i, bf16* to) FASTAST_INLINE_LAMBDA {
          const __m512i p = powers(s + i * kWide, base[i]);
          _mm512_storeu_si512(to + i * kPitch, p);
          float* const sum = sums + i * lanes<float>;
          _mm512_store_ps(sum, _mm512_dpbf16_ps(_mm512_load_ps(sum), (__m512bh)p, ones));
        },
        [&](int64_t count) FASTAST_INLINE_LAMBDA {
          for (; count > 0 && written < to_write; --count) write_row(at - 1, written++);
        },
        [&](int64_t count) FASTAST_INLINE_LAMBDA {
          for (; count > 0 && added < here; --count, ++added) {
            float total;
            near &= add_up(added, total);
            share[added] = 1 / total;
            if (added < next) load(at + 1, added);
          }
        });
    to_write = here;
    if (near) continue;
    tiles.flush();
    block(b, h, at);
    to_write = 0;
    if (next > 0) load_all(at + 1);
  }
  tiles.flush();
  for (int64_t i = 0; i < to_write; ++i) write_row(end - 1, i);
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
