// The ops of merge.h and layer_norm.h on a CUDA device; the same contracts, but for fp64, which
// there is none of here. D is a multiple of 8 up to 4096. With the sources of the assignment
// (match.h) a merge does not look for the tokens of a row. Kernels: cuda/rows.h.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

namespace fastast {

using torch::stable::Tensor;

std::tuple<Tensor, Tensor> merge_cuda(const Tensor& x, const Tensor& assignment, int64_t n_out,
                                      const std::optional<Tensor>& size,
                                      const std::optional<Tensor>& sources);
Tensor merge_backward_cuda(const Tensor& grad, const Tensor& assignment,
                           const std::optional<Tensor>& size, const Tensor& size_out);
Tensor unmerge_cuda(const Tensor& x, const Tensor& assignment);
Tensor unmerge_backward_cuda(const Tensor& grad, const Tensor& assignment, int64_t n_out);

std::tuple<Tensor, Tensor, Tensor, Tensor> add_layer_norm_cuda(const Tensor& x,
                                                               const Tensor& residual,
                                                               const Tensor& weight,
                                                               const Tensor& bias, double eps);
std::tuple<Tensor, Tensor, Tensor> add_layer_norm_backward_cuda(
    const Tensor& grad_h, const Tensor& grad_y, const Tensor& h, const Tensor& weight,
    const Tensor& mean, const Tensor& rstd);
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> merge_add_layer_norm_cuda(
    const Tensor& x, const Tensor& residual, const Tensor& assignment, int64_t n_out,
    const std::optional<Tensor>& size, const Tensor& weight, const Tensor& bias, double eps,
    const std::optional<Tensor>& sources);
std::tuple<Tensor, Tensor, Tensor> merge_add_layer_norm_backward_cuda(
    const Tensor& grad_h, const Tensor& grad_y, const Tensor& h, const Tensor& weight,
    const Tensor& mean, const Tensor& rstd, const Tensor& assignment,
    const std::optional<Tensor>& size, const Tensor& size_out);

}  // namespace fastast
