// Arguments of the match's kernel (match.h here says what it computes), and its launch.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace fastast {

struct Match {
  const void* metric;  // [B, N, C]
  int64_t batch, n, c, r;
  int64_t sample, token;  // strides in elements
  bool class_token, distill_token;
  float* best;                        // [B, ceil(N / 2)], scratch
  int32_t *partner, *rank, *arrived;  // likewise; arrived [B], zero
  int32_t* rows;                      // [B, N]
  int32_t* sources;                   // [B, N' + 1 + N] of N' = N - r rows; null: not wanted
};

// Arguments of match_cluster.h's kernel: a metric is one head.
struct ClusterMatch {
  const void* tokens;  // [B, H, N, C], rows of C at multiples of 16 bytes
  int64_t batch, n, c, heads, r;
  int64_t sample, token, head;  // strides in elements
  bool class_token, distill_token;
  int blocks;        // of a cluster, set by launch
  int32_t* rows;     // [B, N]
  int32_t* sources;  // as above
};

// Whether the current device and this many tokens are for match_cluster.h.
bool can_match_in_cluster(const ClusterMatch& p);

// On a stream (cudaStream_t) of the current device. Throws std::runtime_error if the launch fails.
void launch(const Match& p, Dtype dtype, void* stream);
void launch(ClusterMatch p, Dtype dtype, void* stream);

}  // namespace fastast
