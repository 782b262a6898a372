// The match on vectors: see MatchKernel. Included by kernels_<isa>.cpp only.
//
// Scores are a product of A [na, c] with the packed tokens of B, kTileRows x kPanelCols at a time
// in registers; only the running maximum and its column leave them, never the scores. Bytes: the
// metric once (N c), B's panels (N/2 c, in L2) once per tile of A. Work: N^2 c / 2 FMA.
#include "arena.h"
#include "lanes.h"

namespace fastast {
namespace FASTAST_ISA {
namespace {

constexpr int64_t kTileRows = FASTAST_TILE_ROWS;
constexpr int64_t kTileVectors = 2;
template <class A>
constexpr int64_t kPanelCols = kTileVectors * lanes<A>;

// A packed sample.
template <class T>
struct MatchMemory {
  using A = Accumulate<T>;
  MatchMemory(int64_t n, int64_t c, unsigned char* memory)
      : pitch(up_to(c, lanes<A>)), padded(up_to(n, 2 * kPanelCols<A>) / 2) {
    Arena arena(memory);
    rows = arena.template take<A>(padded * pitch);
    panels = arena.template take<A>(padded * pitch);
    inverse = arena.template take<A>(padded);
    scale = arena.template take<A>(padded);
    offset = arena.template take<A>(padded);
    bytes = arena.used(memory);
  }

  int64_t pitch, padded, bytes;  // pitch: c, with zeros up to whole vectors
  A* rows;                       // A as [padded][pitch]
  A* panels;                     // B as [padded / kPanelCols][pitch][kPanelCols]
  A* inverse;                    // of A: 1 / |token|, 0 for a token shorter than 1e-12
  A* scale;                      // of B: likewise
  A* offset;                     // of B: 0, minus infinity where nobody may propose
};

// A vector from the beginning of a run of `left` values, zero beyond.
template <class T>
FASTAST_INLINE Vec<Accumulate<T>> load_part(const T* run, int64_t left) {
  using A = Accumulate<T>;
  if (left >= lanes<A>) return load(run);
  Vec<A> v = {};
  for (int64_t i = 0; i < left; ++i) v[i] = to_acc(run[i]);
  return v;
}

template <class T>
bool pack_tokens(const T* tokens, int64_t n, int64_t c, int64_t first_col, int64_t begin,
                 int64_t end, unsigned char* memory) {
  using A = Accumulate<T>;
  constexpr int64_t L = lanes<A>, cols = kPanelCols<A>;
  const MatchMemory<T> m(n, c, memory);
  bool finite = true;
  for (int64_t first = begin; first < up_to(end, 2 * cols); first += 2 * L)
    for (int64_t set = 0; set < 2; ++set) {
      const int64_t at = first / 2;  // the place of L tokens of A, or of B
      A* const rows = m.rows + at * m.pitch;
      A* const panel = m.panels + at / cols * cols * m.pitch + at % cols;
      Vec<A> squares[L] = {};
      for (int64_t k = 0; k < c; k += L) {
        Vec<A> v[L];
#pragma GCC unroll 16
        for (int64_t j = 0; j < L; ++j) {
          const int64_t token = first + 2 * j + set;
          v[j] = token < end ? load_part(tokens + (token - begin) * c + k, c - k) : Vec<A>{};
          squares[j] += v[j] * v[j];
        }
        if (set == 1) transpose(v, Lanes<L>());
#pragma GCC unroll 16
        for (int64_t j = 0; j < L; ++j)
          store_raw(set == 0 ? rows + j * m.pitch + k : panel + (k + j) * cols, v[j]);
      }
      for (int64_t j = 0; j < L; ++j) {
        const A norm = __builtin_sqrt(sum_lanes<A>(squares[j]));
        finite = finite && __builtin_isfinite(norm);
        (set == 0 ? m.inverse : m.scale)[at + j] = norm < A(1e-12) ? A(0) : A(1) / norm;
        m.offset[at + j] = at + j < first_col || at + j >= n / 2 ? -__builtin_inf() : 0;
      }
    }
  return finite;
}

// Integer lanes as wide as A's, so that a comparison of scores selects columns.
template <class A>
using Column = std::conditional_t<sizeof(A) == 4, int32_t, int64_t>;
template <class A>
using Index = Vec<Column<A>>;

template <class T>
void best_partner(int64_t n, int64_t c, const unsigned char* memory, int64_t begin, int64_t end,
                  Accumulate<T>* best, int32_t* partner) {
  using A = Accumulate<T>;
  constexpr int64_t cols = kPanelCols<A>;
  // The tile of A stays on the stack, its rows not a power of two apart; wider metrics go in
  // slices.
  constexpr int64_t max_c = 512, tile_pitch = max_c + lanes<A>;
  const MatchMemory<T> m(n, c, const_cast<unsigned char*>(memory));
  Index<A> lane;
  for (int64_t i = 0; i < lanes<A>; ++i) lane[i] = i;

  alignas(64) A tile[kTileRows * tile_pitch];
  for (int64_t row = begin; row < end; row += kTileRows) {
    const int64_t rows = end - row < kTileRows ? end - row : kTileRows;
    Vec<A> high[kTileRows];
    Index<A> where[kTileRows];
    for (int64_t i = 0; i < kTileRows; ++i) {
      high[i] = splat<A>(-__builtin_inf());
      where[i] = Index<A>{};
    }
    for (int64_t first = 0; first < n / 2; first += cols) {
      Vec<A> sum[kTileRows][kTileVectors];
#pragma GCC unroll 16
      for (int64_t i = 0; i < kTileRows; ++i)
#pragma GCC unroll 2
        for (int64_t v = 0; v < kTileVectors; ++v) sum[i][v] = Vec<A>{};

      for (int64_t slice = 0; slice < c; slice += max_c) {
        const int64_t width = c - slice < max_c ? c - slice : max_c;
        if (first == 0 || c > max_c) {  // copied once a tile where the metric fits
          // Rows beyond the last repeat it: their result is not read.
          for (int64_t i = 0; i < kTileRows; ++i)
            std::memcpy(tile + i * tile_pitch,
                        m.rows + (row + (i < rows ? i : rows - 1)) * m.pitch + slice,
                        sizeof(A) * width);
        }
        const A* b = m.panels + first * m.pitch + slice * cols;
        for (int64_t k = 0; k < width; ++k) {
          Vec<A> column[kTileVectors];
#pragma GCC unroll 2
          for (int64_t v = 0; v < kTileVectors; ++v) column[v] = load(b + k * cols + v * lanes<A>);
#pragma GCC unroll 16
          for (int64_t i = 0; i < kTileRows; ++i) {
            const Vec<A> a = splat<A>(tile[i * tile_pitch + k]);
#pragma GCC unroll 2
            for (int64_t v = 0; v < kTileVectors; ++v) sum[i][v] += a * column[v];
          }
        }
      }
#pragma GCC unroll 2
      for (int64_t v = 0; v < kTileVectors; ++v) {
        const Index<A> column = lane + Column<A>(first + v * lanes<A>);
        const Vec<A> scale = load(m.scale + first + v * lanes<A>);
        const Vec<A> offset = load(m.offset + first + v * lanes<A>);
#pragma GCC unroll 16
        for (int64_t i = 0; i < kTileRows; ++i) {
          const Vec<A> score = sum[i][v] * scale + offset;
          const Index<A> higher = score > high[i];
          high[i] = higher ? score : high[i];
          where[i] = higher ? column : where[i];
        }
      }
    }
    for (int64_t i = 0; i < rows; ++i) {
      const A score = most_lane<A>(high[i]);
      const Index<A> none = Index<A>{} + static_cast<Column<A>>(n);
      // The lowest column is the highest below zero.
      const Index<A> column = high[i] == splat<A>(score) ? where[i] : none;
      best[row + i] = score * m.inverse[row + i];
      partner[row + i] = static_cast<int32_t>(-most_lane<Column<A>>(-column));
    }
  }
}

template <class T>
int64_t match_memory(int64_t n, int64_t c) {
  return MatchMemory<T>(n, c, nullptr).bytes;
}

template <class T>
MatchKernel<T> match_kernel_of_rows() {
  return {2 * kPanelCols<Accumulate<T>>,
          kTileRows,
          1 << 21,
          match_memory<T>,
          pack_tokens<T>,
          best_partner<T>};
}

}  // namespace
}  // namespace FASTAST_ISA
}  // namespace fastast
