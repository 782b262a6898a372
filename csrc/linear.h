// Linear layers in bf16 on a CPU with AMX, where oneDNN's leave half of the chip idle, and their
// GELU.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>

namespace fastast {

// y = x W' + bias. x [..., K], K a multiple of 32; the weight packed by fastast/linear.py as int32
// [ceil(N / 32), K / 32, 2, 16, 16]: of 32 outputs and 32 inputs two tiles of 16 outputs, whose
// rows are pairs of inputs; bias fp32 [32 ceil(N / 32)] or nothing. Result bf16 [..., N]. Sums are
// fp32, the rounding to bf16 is the only one.
torch::stable::Tensor linear_cpu(const torch::stable::Tensor& x,
                                 const torch::stable::Tensor& weight,
                                 const std::optional<torch::stable::Tensor>& bias,
                                 int64_t out_features);

}  // namespace fastast
