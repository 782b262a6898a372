// The CUDA kernels on the CPU: walks the grid and runs each team lane after lane.
// tests/test_cuda_walk.py compiles this with the C++ compiler alone and calls it with pointers.
#include <cstring>
#include <vector>

#include "../csrc/cuda/key_metric.h"
#include "../csrc/cuda/match.h"
#include "../csrc/cuda/match_cluster.h"
#include "../csrc/cuda/rows.h"
#include "../csrc/cuda/width.h"

using namespace fastast;

namespace {

// A team whose registers hold what registers hold before they are written: anything.
template <int kPerLane, int kWarps>
Team<RowLane<kPerLane>, kWarps> fresh() {
  Team<RowLane<kPerLane>, kWarps> team;
  std::memset(&team, 0xff, sizeof(team));  // NaN
  return team;
}

template <class F>
int with_type(int dtype, int64_t d, F f) {
  try {
    with_width(d, [&](auto values, auto warps) {
      if (dtype == 0) f(float(), values, warps);
      if (dtype == 1) f(BFloat16(), values, warps);
      if (dtype == 2) f(Half(), values, warps);
    });
  } catch (const std::runtime_error&) {
    return 1;
  }
  return 0;
}

template <class Params>
int walk_reduction(int dtype, const Params& p) {
  return with_type(dtype, p.d, [&](auto type, auto values, auto warps) {
    for (int64_t i = 0; i < p.batch * p.n_out; ++i) {
      auto team = fresh<values(), warps()>();
      reduce_row<decltype(type)>(team, p, i);
    }
  });
}

// The clusters of match_cluster.cu, a step of all blocks after the other.
template <class T>
void walk_clusters(const ClusterMatch& p) {
  const int tiles = tiles_of(p), own = (tiles + p.blocks - 1) / p.blocks;
  const int64_t bytes = ClusterShared::bytes(p.c, own, tiles);
  for (int64_t b = 0; b < p.batch; ++b) {
    std::vector<unsigned char> memory(p.blocks * bytes, 0xff);
    const auto peer = [&](int block) { return layout(p, memory.data() + block * bytes); };
    const auto each_block = [&](auto step) {
      for (int block = 0; block < p.blocks; ++block) {
        static MatchTeam team;
        std::memset(&team, 0xff, sizeof(team));
        step(team, block, peer(block));
      }
    };
    each_block([&](MatchTeam& team, int i, ClusterShared s) { cluster_load<T>(team, p, b, i, s); });
    each_block(
        [&](MatchTeam& team, int i, ClusterShared s) { cluster_match(team, p, i, s, peer); });
    each_block([&](MatchTeam& team, int i, ClusterShared s) { cluster_rank(team, p, i, s, peer); });
    each_block(
        [&](MatchTeam& team, int i, ClusterShared s) { cluster_number(team, p, b, i, s, peer); });
    each_block([&](MatchTeam& team, int i, ClusterShared s) { cluster_sources(team, p, b, i, s); });
  }
}

}  // namespace

extern "C" {

// Whether lanes take their turns from the last to the first.
void set_backwards(int backwards) { lanes_backwards = backwards != 0; }

int walk_reduce_rows(int dtype, const ReduceRows* p) { return walk_reduction(dtype, *p); }

int walk_reduce_listed_rows(int dtype, const ReduceListedRows* p) {
  return walk_reduction(dtype, *p);
}

int walk_key_metric(int dtype, const KeyMetric* p) {
  for (int64_t i = 0; i < p->batch * p->n; ++i) {
    Team<MetricLane, 1> team;
    std::memset(&team, 0xff, sizeof(team));
    if (dtype == 0) key_metric_token<float>(team, *p, i);
    if (dtype == 1) key_metric_token<BFloat16>(team, *p, i);
    if (dtype == 2) key_metric_token<Half>(team, *p, i);
  }
  return 0;
}

// Blocks of a sample arrive in order here, so that the last is the last tile's.
int walk_match(int dtype, const Match* p) {
  const int64_t tiles = ((p->n + 1) / 2 + kTileA - 1) / kTileA;
  for (int64_t block = 0; block < p->batch * tiles; ++block) {
    static MatchTeam team;
    static MatchShared shared;
    std::memset(&team, 0xff, sizeof(team));
    std::memset(&shared, 0xff, sizeof(shared));
    const int64_t b = block / tiles;
    if (dtype == 0) match_tile<float>(team, *p, b, block % tiles, shared);
    if (dtype == 1) match_tile<BFloat16>(team, *p, b, block % tiles, shared);
    if (dtype == 2) match_tile<Half>(team, *p, b, block % tiles, shared);
    if (p->arrived[b]++ == tiles - 1) select_rows(team, *p, b, shared);
  }
  return 0;
}

int walk_match_cluster(int dtype, const ClusterMatch* p) {
  if (dtype == 0) walk_clusters<float>(*p);
  if (dtype == 1) walk_clusters<BFloat16>(*p);
  if (dtype == 2) walk_clusters<Half>(*p);
  return 0;
}

int walk_gather_rows(int dtype, const GatherRows* p) {
  return with_type(dtype, p->d, [&](auto type, auto values, auto warps) {
    for (int64_t i = 0; i < p->batch * p->n; ++i) {
      auto team = fresh<values(), warps()>();
      gather_row<decltype(type)>(team, *p, i);
    }
  });
}

int walk_add_norm_rows(int dtype, const AddNormRows* p) {
  return with_type(dtype, p->d, [&](auto type, auto values, auto warps) {
    for (int64_t i = 0; i < p->batch * p->n; ++i) {
      auto team = fresh<values(), warps()>();
      add_norm_row<decltype(type)>(team, *p, i);
    }
  });
}

int walk_norm_grad_runs(int dtype, const NormGradRuns* p) {
  return with_type(dtype, p->d, [&](auto type, auto values, auto warps) {
    const int64_t tokens = p->batch * p->n;
    for (int64_t i = 0; i < (tokens + p->run - 1) / p->run; ++i) {
      auto team = fresh<values(), warps()>();
      float sums[2 * kMaxWidth];
      std::memset(sums, 0xff, sizeof(sums));
      norm_grad_run<decltype(type)>(team, *p, i, sums);
    }
  });
}
}
