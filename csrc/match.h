// Bipartite soft matching (ToMe, arXiv 2210.09461): metric [B, N, C] -> assignment int32 [B, N].
//
// A is the even tokens, B the odd ones. Every token of A proposes to the token of B with the
// highest cosine (lowest index among equals); the r best proposals (lowest index among equals) are
// merged. Rows of the output: CLS, DIST, the unmerged of A (ascending with a class token, else by
// falling score), then B. Scores are fp32 (fp64 for fp64), a token shorter than 1e-12 scores 0, and
// a value that is not finite is an error. The score matrix is never written.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <tuple>

namespace fastast {

torch::stable::Tensor bipartite_match_cpu(const torch::stable::Tensor& metric, int64_t r,
                                          bool class_token, bool distill_token);
// The same on a CUDA device, without fp64; a value that is not finite is not looked for there.
torch::stable::Tensor bipartite_match_cuda(const torch::stable::Tensor& metric, int64_t r,
                                           bool class_token, bool distill_token);

// The mean of k [B, H, N, D] over heads at unit length, fp32 [B, N, D]. k may be strided (a slice
// of the packed qkv buffer); its last dimension must be dense.
torch::stable::Tensor key_metric_cpu(const torch::stable::Tensor& k);
torch::stable::Tensor key_metric_cuda(const torch::stable::Tensor& k);

// Both in one: the match of the keys' metric, which is not written where a kernel can do without.
torch::stable::Tensor match_keys_cpu(const torch::stable::Tensor& k, int64_t r, bool class_token,
                                     bool distill_token);
torch::stable::Tensor match_keys_cuda(const torch::stable::Tensor& k, int64_t r, bool class_token,
                                      bool distill_token);

// The same assignments, each with its sources, the inverse: int32 [B, N' + 1 + N] for N' = N - r
// rows. Where each row begins among the tokens, and the last ends, then the tokens row by row,
// ascending in each.
std::tuple<torch::stable::Tensor, torch::stable::Tensor> bipartite_match_sources_cpu(
    const torch::stable::Tensor& metric, int64_t r, bool class_token, bool distill_token);
std::tuple<torch::stable::Tensor, torch::stable::Tensor> bipartite_match_sources_cuda(
    const torch::stable::Tensor& metric, int64_t r, bool class_token, bool distill_token);
std::tuple<torch::stable::Tensor, torch::stable::Tensor> match_keys_sources_cpu(
    const torch::stable::Tensor& k, int64_t r, bool class_token, bool distill_token);
std::tuple<torch::stable::Tensor, torch::stable::Tensor> match_keys_sources_cuda(
    const torch::stable::Tensor& k, int64_t r, bool class_token, bool distill_token);

}  // namespace fastast
