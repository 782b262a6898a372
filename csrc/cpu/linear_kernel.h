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
  // Panels that go by a strip of x one after another: as many as the L2 cache keeps for the next
  // strip, or one if it keeps all of x. Blocks number through such groups of panels, in each
  // through the strips, in each through the panels.
  int64_t width() const {
    if (rows * steps * 64 <= int64_t{512} << 10) return 1;
    const int64_t fit = (int64_t{900} << 10) / (steps * kLinearColumns * 64);
    return fit < 1 ? 1 : fit;
  }
};

// Bytes of `memory` of linear_blocks.
int64_t linear_memory(const Linear& p);
// Blocks [begin, end) of a strip by a panel. What one computes does not depend on who computes the
// others.
void linear_blocks(const Linear& p, int64_t begin, int64_t end, unsigned char* memory);

}  // namespace fastast
