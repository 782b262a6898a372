// h = x + residual, optionally merged, and LayerNorm(h), in one pass over the tokens.
//
// Forward returns h [.., D], (the new size,) y = LayerNorm(h) and its mean and 1 / std (fp32, fp64
// for fp64). Statistics come from h before it is rounded to its dtype. Backward returns the
// gradient that x and residual share, and those of weight and bias (fp32, fp64 for fp64).
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

namespace fastast {

using torch::stable::Tensor;

// x, residual [.., D]. Reads 2 N D, writes 2 N D.
std::tuple<Tensor, Tensor, Tensor, Tensor> add_layer_norm_cpu(const Tensor& x,
                                                              const Tensor& residual,
                                                              const Tensor& weight,
                                                              const Tensor& bias, double eps);
// h and y alone, where no backward follows.
std::tuple<Tensor, Tensor> add_norm_cpu(const Tensor& x, const Tensor& residual,
                                        const Tensor& weight, const Tensor& bias, double eps);
// The same with the rows of y so many elements apart.
std::tuple<Tensor, Tensor> add_norm_spread_cpu(const Tensor& x, const Tensor& residual,
                                               const Tensor& weight, const Tensor& bias, double eps,
                                               int64_t y_row);
std::tuple<Tensor, Tensor, Tensor> add_layer_norm_backward_cpu(
    const Tensor& grad_h, const Tensor& grad_y, const Tensor& h, const Tensor& weight,
    const Tensor& mean, const Tensor& rstd);

// x, residual [B, N, D] -> h [B, n_out, D], size, log size, y, mean, rstd. Reads 2 N D, writes
// 2 n_out D. The sources are not used here, as in merge_cpu.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> merge_add_layer_norm_cpu(
    const Tensor& x, const Tensor& residual, const Tensor& assignment, int64_t n_out,
    const std::optional<Tensor>& size, const Tensor& weight, const Tensor& bias, double eps,
    const std::optional<Tensor>& sources);
// h, size, log size and y alone.
std::tuple<Tensor, Tensor, Tensor, Tensor> merge_add_norm_cpu(
    const Tensor& x, const Tensor& residual, const Tensor& assignment, int64_t n_out,
    const std::optional<Tensor>& size, const Tensor& weight, const Tensor& bias, double eps);
std::tuple<Tensor, Tensor, Tensor, Tensor> merge_add_norm_spread_cpu(
    const Tensor& x, const Tensor& residual, const Tensor& assignment, int64_t n_out,
    const std::optional<Tensor>& size, const Tensor& weight, const Tensor& bias, double eps,
    int64_t y_row);
std::tuple<Tensor, Tensor, Tensor> merge_add_layer_norm_backward_cpu(
    const Tensor& grad_h, const Tensor& grad_y, const Tensor& h, const Tensor& weight,
    const Tensor& mean, const Tensor& rstd, const Tensor& assignment,
    const std::optional<Tensor>& size, const Tensor& size_out);

}  // namespace fastast
