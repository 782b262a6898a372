// The dtypes that CUDA kernels are compiled for.
#pragma once

namespace fastast {

enum class Dtype { kFloat, kBFloat16, kHalf };

}  // namespace fastast
