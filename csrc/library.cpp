// Which C++ function implements which op. The schemas are fastast_kernels/ops.py's, so that the
// package works without this library; loading it takes over the CPU.
#include <torch/csrc/stable/library.h>

#include "layer_norm.h"
#include "match.h"
#include "merge.h"

using namespace fastast;

STABLE_TORCH_LIBRARY_IMPL(fastast, CPU, m) {
  m.impl("bipartite_match", TORCH_BOX(&bipartite_match_cpu));
  m.impl("key_metric", TORCH_BOX(&key_metric_cpu));
  m.impl("merge", TORCH_BOX(&merge_cpu));
  m.impl("merge_backward", TORCH_BOX(&merge_backward_cpu));
  m.impl("unmerge", TORCH_BOX(&unmerge_cpu));
  m.impl("unmerge_backward", TORCH_BOX(&unmerge_backward_cpu));
  m.impl("add_layer_norm", TORCH_BOX(&add_layer_norm_cpu));
  m.impl("add_layer_norm_backward", TORCH_BOX(&add_layer_norm_backward_cpu));
  m.impl("merge_add_layer_norm", TORCH_BOX(&merge_add_layer_norm_cpu));
  m.impl("merge_add_layer_norm_backward", TORCH_BOX(&merge_add_layer_norm_backward_cpu));
}

#ifdef USE_CUDA
// What runs on a GPU is chosen in Python (fastast_kernels/cuda_ops.py) from these and Triton's.
STABLE_TORCH_LIBRARY(fastast_cuda, m) { m.def("key_metric(Tensor k) -> Tensor"); }

STABLE_TORCH_LIBRARY_IMPL(fastast_cuda, CUDA, m) {
  m.impl("key_metric", TORCH_BOX(&key_metric_cuda));
}
#endif
