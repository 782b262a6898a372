// A warp, so that a kernel is written once and runs on the GPU and, lane after lane, on the CPU.
//
// A kernel's registers are the fields of a struct `Lane`. Code between two exchanges runs in each(),
// for every lane; what lanes exchange goes through sum() and ballot(), which every lane of a warp
// reaches. On the GPU a lane is a thread and each() costs nothing; on the CPU (tests/cuda_walk.cpp)
// it is a loop, and an exchange does what the hardware does, in its order.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define FASTAST_DEVICE __device__ __forceinline__
#else
#define FASTAST_DEVICE inline
#endif

namespace fastast {

constexpr int kWarp = 32;

#ifdef __CUDACC__

template <class Lane>
struct Warp {
  Lane own;

  template <class F>
  FASTAST_DEVICE void each(F f) {
    f(static_cast<int>(threadIdx.x % kWarp), own);
  }

  // The sum of a field over all lanes, the same bits in each.
  FASTAST_DEVICE float sum(float Lane::*field) {
    float value = own.*field;
#pragma unroll
    for (int step = kWarp / 2; step > 0; step /= 2)
      value += __shfl_xor_sync(0xffffffffu, value, step);
    return value;
  }

  // Which lanes have the given bit of a field set.
  FASTAST_DEVICE uint32_t ballot(uint32_t Lane::*field, int bit) {
    return __ballot_sync(0xffffffffu, own.*field >> bit & 1);
  }
};

FASTAST_DEVICE int lowest_bit(uint32_t mask) { return __ffs(static_cast<int>(mask)) - 1; }

#else

template <class Lane>
struct Warp {
  Lane lanes[kWarp];

  template <class F>
  void each(F f) {
    for (int i = 0; i < kWarp; ++i) f(i, lanes[i]);
  }

  float sum(float Lane::*field) {
    float value[kWarp], next[kWarp];
    for (int i = 0; i < kWarp; ++i) value[i] = lanes[i].*field;
    for (int step = kWarp / 2; step > 0; step /= 2) {
      for (int i = 0; i < kWarp; ++i) next[i] = value[i] + value[i ^ step];
      for (int i = 0; i < kWarp; ++i) value[i] = next[i];
    }
    return value[0];
  }

  uint32_t ballot(uint32_t Lane::*field, int bit) {
    uint32_t mask = 0;
    for (int i = 0; i < kWarp; ++i) mask |= (lanes[i].*field >> bit & 1) << i;
    return mask;
  }
};

FASTAST_DEVICE int lowest_bit(uint32_t mask) { return __builtin_ctz(mask); }

#endif

}  // namespace fastast
