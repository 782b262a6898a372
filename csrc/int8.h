// Rounding to int8 for a linear layer, symmetric with one scale.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <tuple>

namespace fastast {

// x, of any floating dtype, as int8 of the same shape: x 127 / peak to the nearest (ties to even),
// and peak = max |x|, fp32 of no dimensions. A peak of no number or no finite one says that the
// values mean nothing; one under 1e-30 makes them zero.
std::tuple<torch::stable::Tensor, torch::stable::Tensor> round_to_int8_cpu(
    const torch::stable::Tensor& x);

}  // namespace fastast
