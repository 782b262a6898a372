// What the kernel of linear.h is given.
#pragma once

#include <cstdint>

#include "isa.h"
#include "types.h"

namespace fastast {

constexpr int64_t kLinearRows = 32;  // of x that a product takes at a time

struct Linear {
  const bf16* x;  // [rows, in]
  int64_t rows, in, out;
  const int32_t* weight;  // [columns, in / 32, 2, 16, 16], columns of 32 outputs
  int64_t columns;
  const float* bias;  // [32 columns] or null
  bf16* y;            // [rows, out]
};

// The outputs of 32 rows (a strip) in columns [begin, end); `memory` is for 32 rows of x.
void linear_strip(const Linear& p, int64_t strip, int64_t begin, int64_t end, bf16* memory);
// Around all strips of a thread.
void linear_start();
void linear_stop();

}  // namespace fastast
