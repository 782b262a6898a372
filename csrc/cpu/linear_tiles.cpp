// The kernel of linear.h for AMX: 48 x 32 outputs at a time in six tiles, each step three tiles of
// x and two of the weight for six products.
//
// The L2 cache gives 50 bytes a cycle and a tile product takes 16 cycles, so what counts is bytes
// a product: 5 KB for six of them (3 + 2 tiles; those of x are loaded twice, from L1 the second
// time), where 2 x 2 tiles need 4 KB for four. The weight passes by L1 (tileloaddt1), which is x's.
// The store of a tile holds up the products behind it until its sums are there: so a block's sums
// are stored between the first products of the next, and finished (bias, GELU, rounding) row by row
// between its further ones, where vector instructions fill what tiles leave. As many strips of x as
// the L2 cache keeps stay there while all panels go by, the next one coming while this one is used.
//
// Memory: x is read once, y written once, the weight read once a group of strips (Linear::kept);
// from L2, 5 KB a step of 49,152 multiply-adds in bf16 and twice that in int8.
#include "linear_kernel.h"

#ifdef FASTAST_BF16_PRODUCTS
#include <immintrin.h>

#include <algorithm>
#include <cstring>
#include <initializer_list>

#pragma GCC push_options
#pragma GCC target( \
    "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,amx-tile,amx-bf16,amx-int8")

#define FASTAST_ISA avx512_bf16
#define FASTAST_VECTOR_BYTES 64
#include "tiles.h"
#include "vec.h"

#include "power.h"

namespace fastast {
namespace FASTAST_ISA {
namespace {

constexpr int64_t kTile = 16, kLine = 64, kTileBytes = kTile * kLine;
constexpr int64_t kSums = kLinearRows * kLinearColumns;
constexpr int64_t kPanelQuarter = 2 * kTile / 4;  // lines of a panel in a quarter of a step

// x Phi(x) = max(x, 0) - |x| Q(|x|), Q(a) = exp(-a^2 / 2) g(1 / (1 + 0.38 a)) with g fitted to a
// relative error of 4e-5: a hundredth of what bf16 rounds. From 12.5 on Q stays what it is there,
// 4e-36: subnormal numbers would take a hundred times as long.
FASTAST_INLINE Vec<float> gelu(Vec<float> x) {
  const Vec<float> size = (Vec<float>)((Words)x & 0x7fffffffu), none = {};
  const Vec<float> a = size > 12.5f ? none + 12.5f : size;  // before subnormals; NaN stays NaN
  const Vec<float> t = (Vec<float>)_mm512_maskz_rcp14_ps(0xffff, (__m512)(a * 0.38f + 1.f));
  const Vec<float> g =
      t * polynomial(t, {-0.08992558f, 0.18886993f, 0.09198539f, 0.15782735f, 0.15122543f});
  const Vec<float> q = g * power_of_two(a * a * -0.72134752f);  // log2(e) / 2
  return (x < none ? none : x) - a * q;
}

// The way of a block's sums to y, a row at a time.
template <bool int8>
class Finish {
 public:
  Finish() = default;
  Finish(const Linear& p, const float* sums, int64_t row, int64_t panel)
      : sums_(sums),
        y_(p.y + row * p.y_row + panel * kLinearColumns),
        y_row_(p.y_row),
        left_(std::min(kLinearRows, p.rows - row)),
        gelu_(p.gelu) {
    if constexpr (int8) {
      row_scale_ = p.row_scale + row;
      low_scale_ = _mm512_loadu_ps(p.column_scale + panel * kLinearColumns);
      high_scale_ = _mm512_loadu_ps(p.column_scale + panel * kLinearColumns + 16);
    }
    if (!p.bias) return;
    low_ = _mm512_loadu_ps(p.bias + panel * kLinearColumns);
    high_ = _mm512_loadu_ps(p.bias + panel * kLinearColumns + 16);
  }

  FASTAST_INLINE void row() {
    if (left_ == 0) return;
    __m512 low = _mm512_load_ps(sums_), high = _mm512_load_ps(sums_ + 16);
    if constexpr (int8) {
      const __m512 scale = _mm512_set1_ps(*row_scale_++);
      low = _mm512_mul_ps(_mm512_maskz_cvtepi32_ps(0xffff, (__m512i)low),
                          _mm512_mul_ps(scale, low_scale_));
      high = _mm512_mul_ps(_mm512_maskz_cvtepi32_ps(0xffff, (__m512i)high),
                           _mm512_mul_ps(scale, high_scale_));
    }
    low = _mm512_add_ps(low, low_);
    high = _mm512_add_ps(high, high_);
    if (gelu_) {
      low = (__m512)gelu((Vec<float>)low);
      high = (__m512)gelu((Vec<float>)high);
    }
    _mm512_storeu_si512(y_, (__m512i)_mm512_cvtne2ps_pbh(high, low));
    sums_ += kLinearColumns;
    y_ += y_row_;
    --left_;
  }
  void rest() {
    while (left_ > 0) row();
  }

 private:
  const float* sums_ = nullptr;  // [left, 32], of int8 int32
  const float* row_scale_ = nullptr;
  bf16* y_ = nullptr;
  int64_t y_row_ = 0, left_ = 0;
  bool gelu_ = false;
  __m512 low_ = _mm512_setzero_ps(), high_ = _mm512_setzero_ps();
  __m512 low_scale_ = low_, high_scale_ = low_;
};

// Memory that comes to the L2 cache in equal parts, one a quarter of a step: more at once would
// hold up the loads of tiles.
struct Ahead {
  const unsigned char* next;
  int64_t lines;  // a part

  FASTAST_INLINE void step() {
    for (int64_t i = 0; i < lines; ++i, next += 64)
      _mm_prefetch(reinterpret_cast<const char*>(next), _MM_HINT_T1);
  }
};

struct Rows {  // tiles of x in a strip, [16, steps, 64] each
  const unsigned char* tile[3];
  int64_t pitch;
};

#define FASTAST_PRODUCT(sum, a, b) \
  if constexpr (int8)              \
    _tile_dpbssd(sum, a, b);       \
  else                             \
    _tile_dpbf16ps(sum, a, b)

// Of the block before, whose sums are still in tile i, to row 16 of_rows, half of_columns.
#define FASTAST_NEXT(i, of_rows, of_columns)                                                       \
  if constexpr (first) {                                                                           \
    if (before) _tile_stored(i, before + of_rows * kTile * kLinearColumns + of_columns * 16, 128); \
    _tile_zero(i);                                                                                 \
  }

// A step of the sums [16 tiles, 32] in tiles 0 to 5: i in the panel's left half, 5 - i in its
// right. In the first the sums of the block before, which go to `before`, make room for them.
template <int tiles, bool int8, bool first, class Between>
FASTAST_INLINE void step(const Rows& x, const unsigned char* w, int64_t k, float* before,
                         Ahead& ahead, Between between) {
  _tile_stream_loadd(6, w, 64);
  _tile_loadd(7, x.tile[0] + k, x.pitch);
  FASTAST_NEXT(0, 0, 0);
  FASTAST_PRODUCT(0, 7, 6);
  ahead.step();
  if constexpr (tiles > 1) {
    _tile_loadd(7, x.tile[1] + k, x.pitch);
    FASTAST_NEXT(1, 1, 0);
    FASTAST_PRODUCT(1, 7, 6);
  }
  between();
  ahead.step();
  if constexpr (tiles > 2) {
    _tile_loadd(7, x.tile[2] + k, x.pitch);
    FASTAST_NEXT(2, 2, 0);
    FASTAST_PRODUCT(2, 7, 6);
  }
  _tile_stream_loadd(6, w + kTileBytes, 64);
  if constexpr (tiles > 2) {
    FASTAST_NEXT(3, 2, 1);
    FASTAST_PRODUCT(3, 7, 6);
  }
  ahead.step();
  between();
  if constexpr (tiles > 1) {
    if constexpr (tiles > 2) _tile_loadd(7, x.tile[1] + k, x.pitch);
    FASTAST_NEXT(4, 1, 1);
    FASTAST_PRODUCT(4, 7, 6);
    _tile_loadd(7, x.tile[0] + k, x.pitch);
  }
  FASTAST_NEXT(5, 0, 1);
  FASTAST_PRODUCT(5, 7, 6);
  ahead.step();
}

// x w' in the tiles, and the block before's way to y, from `sums`: null if they are there already.
// All by value and not inlined: what has a register for itself need not wait for stores of tiles.
template <int tiles, bool int8>
[[gnu::noinline]] void multiply(Rows x, const unsigned char* w, int64_t steps, float* sums,
                                Finish<int8> finish, Ahead ahead) {
  step<tiles, int8, true>(x, w, 0, sums, ahead, [] {});
  for (int64_t k = kLine; k < steps * kLine; k += kLine) {
    w += 2 * kTileBytes;
    step<tiles, int8, false>(x, w, k, nullptr, ahead, [&] { finish.row(); });
  }
  finish.rest();
}

// The sums in tiles to memory.
void flush(int tiles, float* sums) {
  constexpr int64_t pitch = kLinearColumns * 4, rows = kTile * kLinearColumns;
  _tile_stored(0, sums, pitch);
  _tile_stored(5, sums + 16, pitch);
  if (tiles > 1) {
    _tile_stored(1, sums + rows, pitch);
    _tile_stored(4, sums + rows + 16, pitch);
  }
  if (tiles > 2) {
    _tile_stored(2, sums + 2 * rows, pitch);
    _tile_stored(3, sums + 2 * rows + 16, pitch);
  }
}

// The tiles of x, strip by strip. Tiles are whole and what is beyond the last row must not be read:
// the last tile, if it has some of that, is a copy in `memory`, made when it is first asked for.
class Strips {
 public:
  Strips(const Linear& p, unsigned char* memory) : p_(p), memory_(memory) {}

  Rows at(int64_t row) {
    Rows x = {{}, p_.x_row};
    for (int64_t i = 0; i < 3 && row < p_.rows; ++i, row += kTile) {
      const int64_t left = p_.rows - row;
      if (left < kTile && !copied_) copy(p_.x + row * p_.x_row, left);
      x.tile[i] = left < kTile ? memory_ : p_.x + row * p_.x_row;
    }
    return x;
  }

 private:
  void copy(const unsigned char* from, int64_t rows) {
    const int64_t bytes = p_.steps * kLine;
    for (int64_t j = 0; j < kTile; ++j) {
      if (j < rows)
        std::memcpy(memory_ + j * p_.x_row, from + j * p_.x_row, bytes);
      else
        std::memset(memory_ + j * p_.x_row, 0, bytes);
    }
    copied_ = true;
  }

  const Linear& p_;
  unsigned char* memory_;
  bool copied_ = false;
};

template <bool int8>
void run(const Linear& p, int64_t begin, int64_t end, unsigned char* memory) {
  float* const sums = reinterpret_cast<float*>(memory);
  Strips tiles_of_x(p, memory + kSums * sizeof(float));
  const int64_t strips = p.strips(), kept = p.kept(), panel_bytes = p.steps * 2 * kTileBytes;
  Finish<int8> before;
  int tiles_before = 0;  // that have its sums
  Rows x = {};
  int64_t last = -1;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t first = i / (kept * p.panels) * kept;  // strip of its group
    const int64_t group = std::min(kept, strips - first), inside = i - first * p.panels;
    const int64_t panel = inside / group, strip = inside % group;
    const int64_t row = (first + strip) * kLinearRows;
    if (row != last) x = tiles_of_x.at(row);
    last = row;
    const unsigned char* w = p.weight + panel * panel_bytes;
    // The next panel comes meanwhile, a part with each strip.
    const int64_t next = panel + 1 < p.panels ? panel + 1 : 0;
    const int64_t share = (kPanelQuarter + group - 1) / group;
    const int64_t asked = std::min(strip * share, kPanelQuarter);
    const int64_t lines = i + group < end ? std::min(share, kPanelQuarter - asked) : 0;
    const Ahead ahead = {p.weight + next * panel_bytes + asked * 4 * p.steps * kLine, lines};
    const int tiles = static_cast<int>(std::min<int64_t>(3, (p.rows - row + kTile - 1) / kTile));
    if (tiles != tiles_before && tiles_before > 0) flush(tiles_before, sums);
    float* const still = tiles == tiles_before ? sums : nullptr;
    if (tiles == 3)
      multiply<3>(x, w, p.steps, still, before, ahead);
    else if (tiles == 2)
      multiply<2>(x, w, p.steps, still, before, ahead);
    else
      multiply<1>(x, w, p.steps, still, before, ahead);
    before = Finish<int8>(p, sums, row, panel);
    tiles_before = tiles;
  }
  if (tiles_before > 0) flush(tiles_before, sums);
  before.rest();
}

}  // namespace
}  // namespace FASTAST_ISA

int64_t linear_memory(const Linear& p) {
  using namespace FASTAST_ISA;
  return kSums * static_cast<int64_t>(sizeof(float)) + kTile * p.x_row;
}

void linear_blocks(const Linear& p, int64_t begin, int64_t end, unsigned char* memory) {
  using namespace FASTAST_ISA;
  start_tiles();
  if (p.row_scale)
    run<true>(p, begin, end, memory);
  else
    run<false>(p, begin, end, memory);
  stop_tiles();
}

}  // namespace fastast

#pragma GCC pop_options
#endif
