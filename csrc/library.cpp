// Which C++ function implements which op. The schemas are fastast_kernels/ops.py's, so that the
// package works without this library; loading it takes over the CPU.
#include <torch/csrc/stable/library.h>

#include "attention.h"
#include "block.h"
#include "fbank.h"
#include "int8.h"
#include "layer_norm.h"
#include "linear.h"
#include "match.h"
#include "merge.h"
#include "rows_cuda.h"

using namespace fastast;

STABLE_TORCH_LIBRARY_IMPL(fastast, CPU, m) {
  m.impl("attention", TORCH_BOX(&attention_cpu));
  m.impl("attend", TORCH_BOX(&attend_cpu));
  m.impl("attention_backward", TORCH_BOX(&attention_backward_cpu));
  m.impl("bipartite_match", TORCH_BOX(&bipartite_match_cpu));
  m.impl("bipartite_match_sources", TORCH_BOX(&bipartite_match_sources_cpu));
  m.impl("block", TORCH_BOX(&block_cpu));
  m.impl("fbank_frames", TORCH_BOX(&fbank_frames_cpu));
  m.impl("key_metric", TORCH_BOX(&key_metric_cpu));
  m.impl("linear", TORCH_BOX(&linear_cpu));
  m.impl("linear_int8", TORCH_BOX(&linear_int8_cpu));
  m.impl("round_to_int8", TORCH_BOX(&round_to_int8_cpu));
  m.impl("log_mel", TORCH_BOX(&log_mel_cpu));
  m.impl("match_keys", TORCH_BOX(&match_keys_cpu));
  m.impl("match_keys_sources", TORCH_BOX(&match_keys_sources_cpu));
  m.impl("merge", TORCH_BOX(&merge_cpu));
  m.impl("merge_backward", TORCH_BOX(&merge_backward_cpu));
  m.impl("unmerge", TORCH_BOX(&unmerge_cpu));
  m.impl("unmerge_backward", TORCH_BOX(&unmerge_backward_cpu));
  m.impl("add_layer_norm", TORCH_BOX(&add_layer_norm_cpu));
  m.impl("add_norm", TORCH_BOX(&add_norm_cpu));
  m.impl("add_layer_norm_backward", TORCH_BOX(&add_layer_norm_backward_cpu));
  m.impl("merge_add_layer_norm", TORCH_BOX(&merge_add_layer_norm_cpu));
  m.impl("merge_add_norm", TORCH_BOX(&merge_add_norm_cpu));
  m.impl("merge_add_layer_norm_backward", TORCH_BOX(&merge_add_layer_norm_backward_cpu));
}

#ifdef USE_CUDA
// What runs on a GPU is chosen in Python (fastast_kernels/cuda_ops.py) from these and Triton's.
STABLE_TORCH_LIBRARY(fastast_cuda, m) {
  m.def("key_metric(Tensor k) -> Tensor");
  m.def("match_keys(Tensor k, int r, bool class_token, bool distill_token) -> Tensor");
  m.def(
      "match_keys_sources(Tensor k, int r, bool class_token, bool distill_token)"
      " -> (Tensor, Tensor)");
  m.def("bipartite_match(Tensor metric, int r, bool class_token, bool distill_token) -> Tensor");
  m.def(
      "bipartite_match_sources(Tensor metric, int r, bool class_token, bool distill_token)"
      " -> (Tensor, Tensor)");
  m.def(
      "merge(Tensor x, Tensor assignment, int n_out, Tensor? size, Tensor? sources=None)"
      " -> (Tensor, Tensor)");
  m.def("merge_backward(Tensor grad, Tensor assignment, Tensor? size, Tensor size_out) -> Tensor");
  m.def("unmerge(Tensor x, Tensor assignment) -> Tensor");
  m.def("unmerge_backward(Tensor grad, Tensor assignment, int n_out) -> Tensor");
  m.def(
      "add_layer_norm(Tensor x, Tensor residual, Tensor weight, Tensor bias, float eps)"
      " -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "add_layer_norm_backward(Tensor grad_h, Tensor grad_y, Tensor h, Tensor weight, Tensor mean,"
      " Tensor rstd) -> (Tensor, Tensor, Tensor)");
  m.def(
      "merge_add_layer_norm(Tensor x, Tensor residual, Tensor assignment, int n_out, Tensor? size,"
      " Tensor weight, Tensor bias, float eps, Tensor? sources=None)"
      " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "merge_add_layer_norm_backward(Tensor grad_h, Tensor grad_y, Tensor h, Tensor weight,"
      " Tensor mean, Tensor rstd, Tensor assignment, Tensor? size, Tensor size_out)"
      " -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(fastast_cuda, CUDA, m) {
  m.impl("key_metric", TORCH_BOX(&key_metric_cuda));
  m.impl("match_keys", TORCH_BOX(&match_keys_cuda));
  m.impl("match_keys_sources", TORCH_BOX(&match_keys_sources_cuda));
  m.impl("bipartite_match", TORCH_BOX(&bipartite_match_cuda));
  m.impl("bipartite_match_sources", TORCH_BOX(&bipartite_match_sources_cuda));
  m.impl("merge", TORCH_BOX(&merge_cuda));
  m.impl("merge_backward", TORCH_BOX(&merge_backward_cuda));
  m.impl("unmerge", TORCH_BOX(&unmerge_cuda));
  m.impl("unmerge_backward", TORCH_BOX(&unmerge_backward_cuda));
  m.impl("add_layer_norm", TORCH_BOX(&add_layer_norm_cuda));
  m.impl("add_layer_norm_backward", TORCH_BOX(&add_layer_norm_backward_cuda));
  m.impl("merge_add_layer_norm", TORCH_BOX(&merge_add_layer_norm_cuda));
  m.impl("merge_add_layer_norm_backward", TORCH_BOX(&merge_add_layer_norm_backward_cuda));
}
#endif
