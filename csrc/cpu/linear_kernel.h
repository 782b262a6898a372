// What the kernel of linear.h is given.
#pragma once

#include <cstdint>

#include "isa.h"
#include "types.h"

namespace fastast {

constexpr int64_t kLinearRows = 48;     // of x, a strip: three tiles
constexpr int64_t kLinearColumns = 32;  // of y, a panel: two tiles

struct Linear {
  const bf16* x;  // [rows, in], x_row elements apart
  int64_t x_row, rows, in;
  const int32_t* weight;  // [panels, in / 32, 2, 16, 16]
  int64_t panels;
  const float* bias;  // [32 panels] or null
  bool gelu;
  bf16* y;  // [rows, 32 panels], y_row elements apart
  int64_t y_row;

  int64_t strips() const { return (rows + kLinearRows - 1) / kLinearRows; }
  // Panels that go by a strip of x one after another: as many as the L2 cache keeps for the next
  // strip, or one if it keeps all of x. Blocks number through such groups of panels, in each
  // through the strips, in each through the panels.
  int64_t width() const {
    if (rows * in * 2 <= int64_t{512} << 10) return 1;
    const int64_t fit = (int64_t{900} << 10) / (in * kLinearColumns * 2);
    return fit < 1 ? 1 : fit;
  }
};

// Elements of `memory` of linear_blocks.
int64_t linear_memory(const Linear& p);
// Blocks [begin, end) of a strip by a panel. What one computes does not depend on who computes the
// others.
void linear_blocks(const Linear& p, int64_t begin, int64_t end, float* memory);

}  // namespace fastast
