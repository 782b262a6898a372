// The kernel of match_cluster.h, for compute capability 9.0 and later: a cluster a sample.
#include "launch.h"
#include "match_cluster.h"

namespace fastast {
namespace {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900

__device__ __forceinline__ int block_of_cluster() {
  int rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// All threads of the cluster are here, and see what the others wrote.
__device__ __forceinline__ void cluster_sync() {
  asm volatile(
      "barrier.cluster.arrive.release.aligned;\n"
      "barrier.cluster.wait.acquire.aligned;" ::
          : "memory");
}

// The same place in the shared memory of another block.
__device__ __forceinline__ unsigned char* in_block(unsigned char* p, int block) {
  unsigned char* there;
  asm volatile("mapa.u64 %0, %1, %2;" : "=l"(there) : "l"(p), "r"(block));
  return there;
}

template <class T>
__device__ void match_sample(const ClusterMatch& p, unsigned char* memory) {
  const int block = block_of_cluster();
  const int64_t b = blockIdx.x / p.blocks;
  const ClusterShared s = layout(p, memory);
  const auto peer = [&](int of) { return layout(p, in_block(memory, of)); };
  MatchTeam team;
  cluster_load<T>(team, p, b, block, s);
  cluster_sync();
  cluster_match(team, p, block, s, peer);
  cluster_sync();
  cluster_rank(team, p, block, s, peer);
  cluster_sync();
  cluster_number(team, p, b, block, s, peer);
  cluster_sync();  // a block's memory is there until the others have read it
  cluster_sources(team, p, b, block, s);
}

#else

template <class T>
__device__ void match_sample(const ClusterMatch&, unsigned char*) {
  __trap();  // can_match_in_cluster() says no
}

#endif

template <class T>
__global__ void __launch_bounds__(kMatchThreads) match_cluster_kernel(const ClusterMatch p) {
  extern __shared__ __align__(16) unsigned char memory[];
  match_sample<T>(p, memory);
}

// Blocks of the cluster of a sample: one a tile, while the hardware can.
int blocks_of(const ClusterMatch& p) {
  constexpr int kMostBlocks = 16;
  const int64_t tiles = (p.n + 2 * kTileA - 1) / (2 * kTileA);
  return static_cast<int>(tiles < kMostBlocks ? tiles : kMostBlocks);
}

int64_t shared_bytes(const ClusterMatch& p) {
  const int64_t tiles = (p.n + 2 * kTileA - 1) / (2 * kTileA), blocks = blocks_of(p);
  return ClusterShared::bytes(p.c, (tiles + blocks - 1) / blocks, tiles);
}

}  // namespace

bool can_match_in_cluster(const ClusterMatch& p) {
  constexpr int kOfSums = kMatchWarps * sizeof(int32_t);  // what sum_before() keeps beside them
  int device = 0, major = 0, most = 0;
  // Architectures after 9.x run the PTX of 8.0, in which there are no clusters.
  return p.c % 8 == 0 && p.c <= 256 && cudaGetDevice(&device) == cudaSuccess &&
         cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
         cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) ==
             cudaSuccess &&
         major == 9 && shared_bytes(p) + kOfSums <= most;
}

void launch(ClusterMatch p, Dtype dtype, void* stream) {
  if (p.batch == 0) return;
  p.blocks = blocks_of(p);
  with_type(dtype, [&](auto type) {
    const auto kernel = match_cluster_kernel<decltype(type)>;
    const int bytes = static_cast<int>(shared_bytes(p));
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    cudaLaunchAttribute cluster;
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = static_cast<unsigned>(p.blocks);
    cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(grid(p.batch * p.blocks));
    config.blockDim = dim3(kMatchThreads);
    config.dynamicSmemBytes = bytes;
    config.stream = static_cast<cudaStream_t>(stream);
    config.attrs = &cluster;
    config.numAttrs = 1;
    cudaLaunchKernelEx(&config, kernel, p);
  });
  check_launch("bipartite_match");
}

}  // namespace fastast
