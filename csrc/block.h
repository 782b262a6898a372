// A whole transformer block without gradients, for models whose linear layers are in tiles
// (linear.h): what fastast.model.Block does in seven calls. With few tokens those take longer to
// make than their work does.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>
#include <vector>

namespace fastast {

// x, pending [B, N, D]: the tokens are their sum. `norms`: weight and bias of the LayerNorm before
// attention, and of the one before the MLP; eps likewise. Weights, biases and, if they are int8,
// scales of the linear layers qkv, proj, fc1 (with its GELU) and fc2. Merges r tokens, of which the
// caller has seen to it that there are as many. Returns x and pending [B, N - r, D], the new size
// and its logarithm, which are empty for r = 0.
std::tuple<torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor,
           torch::stable::Tensor>
block_cpu(const torch::stable::Tensor& x, const torch::stable::Tensor& pending,
          const std::optional<torch::stable::Tensor>& size,
          const std::optional<torch::stable::Tensor>& log_size,
          std::vector<torch::stable::Tensor> norms, std::vector<torch::stable::Tensor> weights,
          std::vector<torch::stable::Tensor> biases, std::vector<torch::stable::Tensor> scales,
          int64_t heads, double eps1, double eps2, int64_t r, bool class_token, bool distill_token);

}  // namespace fastast
