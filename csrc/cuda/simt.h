// A team of warps, so that a kernel is written once and runs on the GPU and, lane after lane, on
// the CPU.
//
// A kernel's registers are the fields of a struct `Lane`. Code between two exchanges runs in
// each(), for every lane; what lanes exchange goes through sum(), sum_before(), move() and
// ballot(), which every lane of the team reaches. On the GPU a lane is a thread and each() costs
// nothing; on the CPU (tests/cuda_walk.cpp) it is a loop, and an exchange does what the hardware
// does, in its order. Lanes of one each() have no order, so the loop also runs from the last lane
// to the first.
//
// A team of one warp may share its block with others; a larger one is a block.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define FASTAST_DEVICE __device__ __forceinline__
#else
#define FASTAST_DEVICE inline
#include <stdexcept>
#endif

namespace fastast {

constexpr int kWarp = 32;

#ifdef __CUDACC__

template <class Lane, int kWarps>
struct Team {
  Lane own;

  template <class F>
  FASTAST_DEVICE void each(F f) {
    f(static_cast<int>(threadIdx.x % (kWarps * kWarp)), own);
  }

  // All lanes have done what is before; shared memory is as they left it.
  FASTAST_DEVICE void sync() {
    if constexpr (kWarps > 1)
      __syncthreads();
    else
      __syncwarp();
  }

  // The sum of a field over all lanes, the same bits in each.
  FASTAST_DEVICE float sum(float Lane::* field) {
    float value = own.*field;
#pragma unroll
    for (int step = kWarp / 2; step > 0; step /= 2)
      value += __shfl_xor_sync(0xffffffffu, value, step);
    if constexpr (kWarps > 1) {
      __shared__ float of_warp[kWarps];
      __syncthreads();  // of_warp may still be read from the sum before
      if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = value;
      __syncthreads();
      value = of_warp[0];
#pragma unroll
      for (int i = 1; i < kWarps; ++i) value += of_warp[i];
    }
    return value;
  }

  // to = the sum of the field `from` over the lanes before.
  FASTAST_DEVICE void sum_before(int32_t Lane::* from, int32_t Lane::* to) {
    const int lane = static_cast<int>(threadIdx.x % kWarp);
    int32_t value = own.*from;
#pragma unroll
    for (int step = 1; step < kWarp; step *= 2) {
      const int32_t moved = __shfl_up_sync(0xffffffffu, value, step);
      if (lane >= step) value += moved;
    }
    int32_t before = value - own.*from;
    if constexpr (kWarps > 1) {
      const int warp = static_cast<int>(threadIdx.x / kWarp);
      __shared__ int32_t of_warp[kWarps];
      __syncthreads();  // of_warp may still be read from the sum before
      if (lane == kWarp - 1) of_warp[warp] = value;
      __syncthreads();
#pragma unroll
      for (int i = 0; i < kWarps - 1; ++i) before += i < warp ? of_warp[i] : 0;
    }
    own.*to = before;
  }

  // to = the field `from` of lane source(i) of the same warp.
  template <class F>
  FASTAST_DEVICE void move(float Lane::* from, float Lane::* to, F source) {
    own.*to = __shfl_sync(0xffffffffu, own.*from, source(static_cast<int>(threadIdx.x % kWarp)));
  }

  // Which lanes of a warp have the given bit of a field set. All warps of the team have to agree.
  FASTAST_DEVICE uint32_t ballot(uint32_t Lane::* field, int bit) {
    return __ballot_sync(0xffffffffu, own.*field >> bit & 1);
  }
};

FASTAST_DEVICE int lowest_bit(uint32_t mask) { return __ffs(static_cast<int>(mask)) - 1; }

// ++*p by many lanes at once. What *p was would tell in which order they came: nobody is told.
FASTAST_DEVICE void increment(int32_t* p) { atomicAdd(p, 1); }

#else

inline bool lanes_backwards = false;

template <class Lane, int kWarps>
struct Team {
  Lane lanes[kWarps * kWarp];

  template <class F>
  void each(F f) {
    constexpr int kLanes = kWarps * kWarp;
    for (int k = 0; k < kLanes; ++k) {
      const int i = lanes_backwards ? kLanes - 1 - k : k;
      f(i, lanes[i]);
    }
  }

  void sync() {}

  float sum(float Lane::* field) {
    float total = 0;
    for (int warp = 0; warp < kWarps; ++warp) {
      float value[kWarp], next[kWarp];
      for (int i = 0; i < kWarp; ++i) value[i] = lanes[warp * kWarp + i].*field;
      for (int step = kWarp / 2; step > 0; step /= 2) {
        for (int i = 0; i < kWarp; ++i) next[i] = value[i] + value[i ^ step];
        for (int i = 0; i < kWarp; ++i) value[i] = next[i];
      }
      total = warp == 0 ? value[0] : total + value[0];
    }
    return total;
  }

  void sum_before(int32_t Lane::* from, int32_t Lane::* to) {
    int32_t before = 0;
    for (Lane& lane : lanes) {
      const int32_t value = lane.*from;
      lane.*to = before;
      before += value;
    }
  }

  template <class F>
  void move(float Lane::* from, float Lane::* to, F source) {
    for (int warp = 0; warp < kWarps; ++warp) {
      float value[kWarp];
      for (int i = 0; i < kWarp; ++i) value[i] = lanes[warp * kWarp + source(i) % kWarp].*from;
      for (int i = 0; i < kWarp; ++i) lanes[warp * kWarp + i].*to = value[i];
    }
  }

  uint32_t ballot(uint32_t Lane::* field, int bit) {
    uint32_t mask = 0;
    for (int warp = 0; warp < kWarps; ++warp) {
      uint32_t own = 0;
      for (int i = 0; i < kWarp; ++i) own |= (lanes[warp * kWarp + i].*field >> bit & 1) << i;
      if (warp > 0 && own != mask) throw std::logic_error("the warps of a team disagree");
      mask = own;
    }
    return mask;
  }
};

FASTAST_DEVICE int lowest_bit(uint32_t mask) { return __builtin_ctz(mask); }
FASTAST_DEVICE void increment(int32_t* p) { ++*p; }

#endif

}  // namespace fastast
