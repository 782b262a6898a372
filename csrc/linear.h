// Linear layers in bf16 and int8 on a CPU with AMX, with their GELU.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>

namespace fastast {

// y = x W' + bias, or GELU of that (the exact one). x [..., K], its rows any distance apart; K and
// N multiples of 32; the weight packed by fastast/linear.py as int32 [N / 32, K / 32, 2, 16, 16]:
// of 32 outputs and 32 inputs two tiles of 16 outputs, whose rows are pairs of inputs; bias fp32
// [N] or nothing. Result bf16 [..., N]. Sums are fp32, the rounding to bf16 is the only one.
//
// With `gelu`, rows of y are linear_row(N) apart: those of a hidden layer are read by the next.
torch::stable::Tensor linear_cpu(const torch::stable::Tensor& x,
                                 const torch::stable::Tensor& weight,
                                 const std::optional<torch::stable::Tensor>& bias, bool gelu);

// The same with int8 products. Each row of x, of any floating dtype, is rounded to 127 x / max|x|;
// a row that is not finite becomes NaN. K is a multiple of 64, the weight int8 in tiles as above
// but of 64 inputs, whose rows are four inputs of 16 outputs; scale fp32 [N], what 1 stands for in
// each output's weight. Sums are exact. Result bf16.
torch::stable::Tensor linear_int8_cpu(const torch::stable::Tensor& x,
                                      const torch::stable::Tensor& weight,
                                      const torch::stable::Tensor& scale,
                                      const std::optional<torch::stable::Tensor>& bias, bool gelu);

// How many elements apart rows of `width` elements are best read by these: where their bytes are a
// multiple of 512, the rows of a tile would want the same few sets of the cache.
inline int64_t linear_row(int64_t width, int64_t element_bytes = 2) {
  const bool shares = width * element_bytes % 512 == 0;
  return shares ? width + 64 / element_bytes : width;
}

}  // namespace fastast
