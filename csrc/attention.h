// Attention with a size a key: softmax(q k' scale + log_size) v and its log-sum-exp.
//
// q [B, H, Nq, D], k and v [B, H, N, D], of one dtype, may be strided (slices of the packed qkv
// buffer) but for the last dimension; log_size fp32 [B, N] or nothing. Results: the output as a
// [B, H, Nq, D] view of memory laid out [B, Nq, H, D], and the log-sum-exp [B, H, Nq] in fp32
// (fp64 for fp64). The N x N logits are never written.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

namespace fastast {

std::tuple<torch::stable::Tensor, torch::stable::Tensor> attention_cpu(
    const torch::stable::Tensor& q, const torch::stable::Tensor& k, const torch::stable::Tensor& v,
    const std::optional<torch::stable::Tensor>& log_size, double scale);

// The output alone. In bf16 on AMX its weights are powers in integers, off by up to 0.4 % where
// their rounding alone is off by 0.2.
torch::stable::Tensor attend_cpu(const torch::stable::Tensor& q, const torch::stable::Tensor& k,
                                 const torch::stable::Tensor& v,
                                 const std::optional<torch::stable::Tensor>& log_size,
                                 double scale);

// Its backward: the gradients of q, k and v, each [B, H, N, D] as a view of [B, N, H, D], from that
// of the output and from both results. All but lse may be strided as q may.
std::tuple<torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor>
attention_backward_cpu(const torch::stable::Tensor& grad, const torch::stable::Tensor& q,
                       const torch::stable::Tensor& k, const torch::stable::Tensor& v,
                       const std::optional<torch::stable::Tensor>& log_size,
                       const torch::stable::Tensor& out, const torch::stable::Tensor& lse,
                       double scale);

}  // namespace fastast
