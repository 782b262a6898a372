// What the kernel of linear.h is given.
#pragma once

#include <cstdint>

#include "isa.h"
#include "types.h"

namespace fastast {

constexpr int64_t kLinearRows = 48;     // of x, a strip: three tiles
constexpr int64_t kLinearColumns = 32;  // of y, a panel: two tiles

// Of bf16 or of int8: a row of 64 bytes of a tile is 32 of the one or 64 of the other.
struct Linear {
  const unsigned char* x;  // [rows, steps, 64], rows x_row bytes apart
  int64_t x_row, rows, steps;
  const unsigned char* weight;  // [panels, steps, 2, 16, 64]
  int64_t panels;
  const float* bias;  // [32 panels] or null
  // What 1 stands for in a row of x and a column of the weight, of int8; null: they are bf16.
  const float *row_scale, *column_scale;
  bool gelu;
  bf16* y;  // [rows, 32 panels], y_row elements apart
  int64_t y_row;

  int64_t strips() const { return (rows + kLinearRows - 1) / kLinearRows; }
  // Groups of strips of x, as even as they can be, of which the L2 cache keeps one while all panels
  // go by, one after another. Blocks number through the groups, in each through the panels, in each
  // through its strips.
  int64_t groups() const {
    constexpr int64_t kFit = int64_t{1280} << 10;  // of 2 MB, which all processors with AMX have
    const int64_t strip = kLinearRows * steps * 64, fit = kFit < strip ? 1 : kFit / strip;
    return (strips() + fit - 1) / fit;
  }
  // Strips of a group.
  int64_t kept() const { return (strips() + groups() - 1) / groups(); }

  // Part i of n, of whole tiles of rows.
  Linear share(int64_t i, int64_t n) const {
    const int64_t tiles = (rows + 15) / 16;
    const int64_t first = tiles * i / n * 16, last = tiles * (i + 1) / n * 16;
    Linear part = *this;
    part.x += first * x_row;
    part.y += first * y_row;
    if (row_scale) part.row_scale += first;
    part.rows = (last < rows ? last : rows) - first;
    return part;
  }
};

// Bytes of `memory` of linear_blocks.
int64_t linear_memory(const Linear& p);
// Blocks [begin, end) of a strip by a panel. What one computes does not depend on who computes the
// others.
void linear_blocks(const Linear& p, int64_t begin, int64_t end, unsigned char* memory);

}  // namespace fastast
