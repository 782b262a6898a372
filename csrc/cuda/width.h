// From the width of a row to the number of its values that a lane of a warp holds.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

namespace fastast {

constexpr int64_t kMaxWidth = 4096;

// Calls f(std::integral_constant<int, n>) for the smallest n that there is a kernel for.
template <class F>
void with_values_per_lane(int64_t d, F f) {
  if (d < 8 || d > kMaxWidth || d % 8 != 0)
    throw std::runtime_error("rows must have a multiple of 8 values up to 4096, got " +
                             std::to_string(d));
  const int64_t values = (d + 255) / 256 * 8;
  if (values <= 8) return f(std::integral_constant<int, 8>());
  if (values <= 16) return f(std::integral_constant<int, 16>());
  if (values <= 24) return f(std::integral_constant<int, 24>());
  if (values <= 32) return f(std::integral_constant<int, 32>());
  if (values <= 64) return f(std::integral_constant<int, 64>());
  return f(std::integral_constant<int, 128>());
}

}  // namespace fastast
