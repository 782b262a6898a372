// What launches share.
#pragma once

#include <stdexcept>
#include <string>

#include "dtype.h"
#include "pack.h"

namespace fastast {

// f(T()) for the kernel type of a dtype.
template <class F>
void with_type(Dtype dtype, F f) {
  if (dtype == Dtype::kFloat) f(float());
  if (dtype == Dtype::kBFloat16) f(BFloat16());
  if (dtype == Dtype::kHalf) f(Half());
}

inline unsigned grid(int64_t blocks) {
  if (blocks > 0x7fffffff) throw std::runtime_error("too many rows for one launch");
  return static_cast<unsigned>(blocks);
}

inline void check_launch(const char* kernel) {
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess)
    throw std::runtime_error(std::string(kernel) + ": " + cudaGetErrorString(error));
}

}  // namespace fastast
