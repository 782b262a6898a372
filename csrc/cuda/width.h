// From the width of a row to how it is cut: values a lane holds, warps a row.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

namespace fastast {

constexpr int64_t kMaxWidth = 4096;

template <int n>
using Int = std::integral_constant<int, n>;

// Calls f(Int<values a lane>, Int<warps a row>) for the narrowest kernel that there is.
template <class F>
void with_width(int64_t d, F f) {
  if (d < 8 || d > kMaxWidth || d % 8 != 0)
    throw std::runtime_error("rows must have a multiple of 8 values up to 4096, got " +
                             std::to_string(d));
  if (d <= 256) return f(Int<8>(), Int<1>());
  if (d <= 512) return f(Int<16>(), Int<1>());
  if (d <= 768) return f(Int<24>(), Int<1>());
  if (d <= 1024) return f(Int<32>(), Int<1>());
  if (d <= 2048) return f(Int<16>(), Int<4>());
  return f(Int<32>(), Int<4>());
}

}  // namespace fastast
