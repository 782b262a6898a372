// Merging by assignment: int32 [B, N], the output row of every token in [0, n_out), or -1 to drop
// it.
//
// Layout: every tensor is made dense row-major. Sums are fp32 (fp64 for fp64) in ascending token
// order, with no atomics: the same bits run after run. size is fp32 always.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

namespace fastast {

using torch::stable::Tensor;

// x [B, N, D], size [B, N] or none -> sum_j size_j x_j / sum_j size_j [B, n_out, D], sum_j size_j.
// Reads N D, writes n_out D. The sources of the assignment (match.h) are not used here: finding
// them takes N steps.
std::tuple<Tensor, Tensor> merge_cpu(const Tensor& x, const Tensor& assignment, int64_t n_out,
                                     const std::optional<Tensor>& size,
                                     const std::optional<Tensor>& sources);
// grad [B, n_out, D] -> grad of x [B, N, D]: a gather, scaled by size_j / size_out[row].
Tensor merge_backward_cpu(const Tensor& grad, const Tensor& assignment,
                          const std::optional<Tensor>& size, const Tensor& size_out);

// x [B, n_out, D] -> [B, N, D], zero where the assignment is -1.
Tensor unmerge_cpu(const Tensor& x, const Tensor& assignment);
// grad [B, N, D] -> sum over the tokens of each row [B, n_out, D].
Tensor unmerge_backward_cpu(const Tensor& grad, const Tensor& assignment, int64_t n_out);

}  // namespace fastast
