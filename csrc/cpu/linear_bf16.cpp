// The kernel of linear.h for AMX: 32 x 32 outputs at a time in four tiles, each step two tiles of x
// and two of the weight for four products; then the bias.
//
// Four products take 64 cycles, the four tiles 23 each from the L2 cache at worst. The rest goes
// into the stores of sums: loads that follow wait for those whose addresses end alike, which all
// do. oneDNN does better where outputs are many; where inputs are, its blocks do not fit.
#include "linear_kernel.h"

#ifdef FASTAST_BF16_PRODUCTS
#include <immintrin.h>

#include <cstring>

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,amx-tile,amx-bf16")

#include "tiles.h"

namespace fastast {
namespace {

// Rows of 32 sums to outputs.
inline void finish(const Linear& p, const float* sums, int64_t row, int64_t rows, int64_t column) {
  const int64_t first = column * 32, left = p.out - first;
  const __m512 none = _mm512_setzero_ps();
  const __m512 low = p.bias ? _mm512_loadu_ps(p.bias + first) : none;
  const __m512 high = p.bias ? _mm512_loadu_ps(p.bias + first + 16) : none;
  const __mmask32 inside = left >= 32 ? ~0u : (1u << left) - 1;
  bf16* y = p.y + row * p.out + first;
  for (int64_t i = 0; i < rows; ++i, y += p.out) {
    const __m512 a = _mm512_add_ps(_mm512_load_ps(sums + i * 32), low);
    const __m512 b = _mm512_add_ps(_mm512_load_ps(sums + i * 32 + 16), high);
    _mm512_mask_storeu_epi16(y, inside, (__m512i)_mm512_cvtne2ps_pbh(b, a));
  }
}

}  // namespace

void linear_strip(const Linear& p, int64_t strip, int64_t begin, int64_t end, bf16* memory) {
  const int64_t row = strip * kLinearRows;
  const int64_t rows = p.rows - row < kLinearRows ? p.rows - row : kLinearRows;
  const bf16* x = p.x + row * p.in;
  if (rows < kLinearRows) {  // tiles are whole: what is beyond the last row must not be read
    std::memcpy(memory, x, rows * p.in * sizeof(bf16));
    std::memset(memory + rows * p.in, 0, (kLinearRows - rows) * p.in * sizeof(bf16));
    x = memory;
  }
  const int64_t pitch = p.in * static_cast<int64_t>(sizeof(bf16));
  alignas(64) float sums[kLinearRows * 32];
  for (int64_t column = begin; column < end; ++column) {
    const int32_t* w = p.weight + column * p.in / 32 * 512;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t k = 0; k < p.in; k += 32, w += 512) {
      _tile_loadd(4, x + k, pitch);
      _tile_loadd(6, w, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(7, w + 256, 64);
      _tile_dpbf16ps(1, 4, 7);
      _tile_loadd(5, x + 16 * p.in + k, pitch);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, sums, 128);
    _tile_stored(1, sums + 16, 128);
    _tile_stored(2, sums + 16 * 32, 128);
    _tile_stored(3, sums + 16 * 32 + 16, 128);
    finish(p, sums, row, rows, column);
  }
}

void linear_start() { start_tiles(); }
void linear_stop() { stop_tiles(); }

}  // namespace fastast

#pragma GCC pop_options
#endif
