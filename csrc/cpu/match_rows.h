// Matching: see Kernels in kernels.h. Included by kernels_<isa>.cpp only.
//
// Scores are a product of A [na, c] with the packed unit tokens of B, tile_rows x panel_cols at a
// time in registers; only the running maximum and its column leave them, never the scores. Bytes:
// the metric once (N c), B's panels (N/2 c, in L2) once per tile of A. Work: N^2 c / 2 FMA.
namespace fastast {
namespace FASTAST_ISA {
namespace {

constexpr int64_t kTileRows = FASTAST_TILE_ROWS;
constexpr int64_t kTileVectors = 2;
template <class A>
constexpr int64_t kPanelCols = kTileVectors * lanes<A>;

template <class T>
bool inverse_norms(const T* metric, int64_t n, int64_t c, Accumulate<T>* inverse) {
  using A = Accumulate<T>;
  bool finite = true;
  for (int64_t i = 0; i < n; ++i) {
    const T* row = metric + i * c;
    Vec<A> squares{};
    A tail = 0;
    for_each_lane<A>(
        c,
        [&](int64_t k) {
          const Vec<A> v = load(row + k);
          squares += v * v;
        },
        [&](int64_t k) { tail += to_acc(row[k]) * to_acc(row[k]); });
    const A norm = __builtin_sqrt(reduce_add<A>(squares) + tail);
    finite = finite && __builtin_isfinite(norm);
    inverse[i] = norm < A(1e-12) ? A(0) : A(1) / norm;
  }
  return finite;
}

template <class T>
void pack_b(const T* metric, int64_t n, int64_t c, const Accumulate<T>* inverse, T* panels,
            Accumulate<T>* scales) {
  constexpr int64_t cols = kPanelCols<Accumulate<T>>;
  const int64_t nb = n / 2;
  for (int64_t first = 0; first < nb; first += cols, panels += c * cols, scales += cols) {
    for (int64_t j = 0; j < cols; ++j) {
      const bool there = first + j < nb;
      const int64_t token = 2 * (first + j) + 1;
      scales[j] = there ? inverse[token] : 0;
      for (int64_t k = 0; k < c; ++k) panels[k * cols + j] = there ? metric[token * c + k] : T{};
    }
  }
}

// Integer lanes as wide as A's, so that a comparison of scores selects columns.
template <class A>
using Column = std::conditional_t<sizeof(A) == 4, int32_t, int64_t>;
template <class A>
using Index = Vec<Column<A>>;

template <class T>
void best_partner(const T* metric, int64_t n, int64_t c, const Accumulate<T>* inverse,
                  const T* panels, const Accumulate<T>* scales, int64_t first_col, int64_t begin,
                  int64_t end, Accumulate<T>* best, int32_t* partner) {
  using A = Accumulate<T>;
  constexpr int64_t cols = kPanelCols<A>;
  constexpr int64_t max_c = 512;  // the tile of A stays on the stack; wider metrics go in slices
  const int64_t nb = n / 2;
  Index<A> lane;
  for (int64_t i = 0; i < lanes<A>; ++i) lane[i] = i;

  alignas(64) A tile[max_c * kTileRows];
  for (int64_t row = begin; row < end; row += kTileRows) {
    const int64_t rows = end - row < kTileRows ? end - row : kTileRows;
    Vec<A> high[kTileRows];
    Index<A> where[kTileRows];
    for (int64_t i = 0; i < kTileRows; ++i) {
      high[i] = splat<A>(-__builtin_inf());
      where[i] = Index<A>{};
    }
    const T* panel = panels;
    for (int64_t first = 0; first < nb; first += cols, panel += c * cols) {
      Vec<A> sum[kTileRows][kTileVectors];
#pragma GCC unroll 16
      for (int64_t i = 0; i < kTileRows; ++i)
#pragma GCC unroll 2
        for (int64_t v = 0; v < kTileVectors; ++v) sum[i][v] = Vec<A>{};

      for (int64_t slice = 0; slice < c; slice += max_c) {
        const int64_t width = c - slice < max_c ? c - slice : max_c;
        if (first == 0 || c > max_c) {  // packed once a tile where the metric fits
          for (int64_t i = 0; i < kTileRows; ++i) {
            // Rows beyond the last repeat it: their result is not read.
            const T* token = metric + 2 * (row + (i < rows ? i : rows - 1)) * c + slice;
            for (int64_t k = 0; k < width; ++k) tile[k * kTileRows + i] = to_acc(token[k]);
          }
        }
        const T* b = panel + slice * cols;
        for (int64_t k = 0; k < width; ++k) {
          Vec<A> column[kTileVectors];
#pragma GCC unroll 2
          for (int64_t v = 0; v < kTileVectors; ++v) column[v] = load(b + k * cols + v * lanes<A>);
#pragma GCC unroll 16
          for (int64_t i = 0; i < kTileRows; ++i) {
            const Vec<A> a = splat<A>(tile[k * kTileRows + i]);
#pragma GCC unroll 2
            for (int64_t v = 0; v < kTileVectors; ++v) sum[i][v] += a * column[v];
          }
        }
      }
#pragma GCC unroll 2
      for (int64_t v = 0; v < kTileVectors; ++v) {
        const Index<A> column = lane + Column<A>(first + v * lanes<A>);
        const Vec<A> scale = load(scales + first + v * lanes<A>);
        const Index<A> valid = (column >= Column<A>(first_col)) & (column < Column<A>(nb));
#pragma GCC unroll 16
        for (int64_t i = 0; i < kTileRows; ++i) {
          const Vec<A> score = sum[i][v] * scale;
          const Index<A> higher = (score > high[i]) & valid;
          high[i] = higher ? score : high[i];
          where[i] = higher ? column : where[i];
        }
      }
    }
    for (int64_t i = 0; i < rows; ++i) {
      A score = high[i][0];
      int64_t column = where[i][0];
      for (int64_t l = 1; l < lanes<A>; ++l) {
        const bool better = high[i][l] > score || (high[i][l] == score && where[i][l] < column);
        score = better ? high[i][l] : score;
        column = better ? where[i][l] : column;
      }
      best[row + i] = score * inverse[2 * (row + i)];
      partner[row + i] = static_cast<int32_t>(column);
    }
  }
}

}  // namespace
}  // namespace FASTAST_ISA
}  // namespace fastast
