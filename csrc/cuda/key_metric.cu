// The kernel of key_metric.h: a warp a token, four tokens a block.
#include "key_metric.h"
#include "launch.h"

namespace fastast {
namespace {

constexpr int kTokens = 4;

template <class T>
__global__ void __launch_bounds__(kTokens* kWarp) key_metric_kernel(const KeyMetric p) {
  const int64_t token = static_cast<int64_t>(blockIdx.x) * kTokens + threadIdx.x / kWarp;
  Team<MetricLane, 1> team;
  if (token < p.batch * p.n) key_metric_token<T>(team, p, token);
}

}  // namespace

void launch(const KeyMetric& p, Dtype dtype, void* stream) {
  const int64_t tokens = p.batch * p.n;
  if (tokens == 0) return;
  with_type(dtype, [&](auto type) {
    key_metric_kernel<decltype(type)><<<grid((tokens + kTokens - 1) / kTokens), kTokens * kWarp, 0,
                                        static_cast<cudaStream_t>(stream)>>>(p);
  });
  check_launch("key_metric");
}

}  // namespace fastast
