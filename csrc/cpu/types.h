// Scalar types of the CPU kernels. No torch header here: kernels know raw pointers and sizes only.
#pragma once

#include <cstdint>

namespace fastast {

// Storage only; arithmetic is done in Accumulate<T>.
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

template <class T>
struct AccumulateOf {
  using type = float;
};
template <>
struct AccumulateOf<double> {
  using type = double;
};
template <class T>
using Accumulate = typename AccumulateOf<T>::type;

}  // namespace fastast
