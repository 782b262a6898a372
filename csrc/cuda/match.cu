// The kernel of match.h: a block takes 64 tokens of A, and the last one of a sample selects.
#include "launch.h"
#include "match.h"

namespace fastast {
namespace {

template <class T>
__global__ void __launch_bounds__(kMatchThreads) match_kernel(const Match p, int64_t tiles) {
  __shared__ MatchShared s;
  MatchTeam team;
  const int64_t b = blockIdx.x / tiles;
  match_tile<T>(team, p, b, blockIdx.x % tiles, s);
  __threadfence();  // what this block wrote is there before it counts as arrived
  __syncthreads();
  if (threadIdx.x == 0) s.last = atomicAdd(p.arrived + b, 1) == tiles - 1;
  __syncthreads();
  if (!s.last) return;
  __threadfence();
  select_rows(team, p, b, s);
}

}  // namespace

void launch(const Match& p, Dtype dtype, void* stream) {
  if (p.batch == 0) return;
  const int64_t tiles = ((p.n + 1) / 2 + kTileA - 1) / kTileA;
  with_type(dtype, [&](auto type) {
    match_kernel<decltype(type)>
        <<<grid(p.batch * tiles), kMatchThreads, 0, static_cast<cudaStream_t>(stream)>>>(p, tiles);
  });
  check_launch("bipartite_match");
}

}  // namespace fastast
