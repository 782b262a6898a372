// Sixteen bytes of a row at a time, as fp32 values, from and to bf16, fp16 and fp32.
#pragma once

#include <cstring>

#include "simt.h"

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace fastast {

#ifdef __CUDACC__

using BFloat16 = __nv_bfloat16;
using Half = __half;

// torch's build flags switch the implicit conversions off.
FASTAST_DEVICE float to_float(float v) { return v; }
FASTAST_DEVICE float to_float(BFloat16 v) { return __bfloat162float(v); }
FASTAST_DEVICE float to_float(Half v) { return __half2float(v); }
FASTAST_DEVICE void from_float(float v, float* out) { *out = v; }
FASTAST_DEVICE void from_float(float v, BFloat16* out) { *out = __float2bfloat16_rn(v); }
FASTAST_DEVICE void from_float(float v, Half* out) { *out = __float2half_rn(v); }

#else

struct BFloat16 {
  uint16_t bits;
};
using Half = _Float16;

inline float to_float(float v) { return v; }
inline float to_float(Half v) { return static_cast<float>(v); }
inline float to_float(BFloat16 v) {
  const uint32_t bits = static_cast<uint32_t>(v.bits) << 16;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}
inline void from_float(float v, float* out) { *out = v; }
inline void from_float(float v, Half* out) { *out = static_cast<Half>(v); }
inline void from_float(float v, BFloat16* out) {  // to the nearest, ties to even
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  out->bits = v != v ? 0x7fff : static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

#endif

template <class T>
struct alignas(16) Pack {
  static constexpr int kSize = 16 / sizeof(T);
  T value[kSize];
};

// out[0, kSize) = p[0, kSize), where p is 16-byte aligned.
template <class T>
FASTAST_DEVICE void load_pack(const T* p, float* out) {
  const Pack<T> pack = *reinterpret_cast<const Pack<T>*>(p);
#pragma unroll
  for (int i = 0; i < Pack<T>::kSize; ++i) out[i] = to_float(pack.value[i]);
}

// n floats, a multiple of 4 and 16-byte aligned.
template <int n>
FASTAST_DEVICE void load_floats(const float* p, float (&out)[n]) {
#pragma unroll
  for (int i = 0; i < n; i += 4) load_pack(p + i, out + i);
}

template <class T>
FASTAST_DEVICE void store_pack(const float* in, T* p) {
  Pack<T> pack;
#pragma unroll
  for (int i = 0; i < Pack<T>::kSize; ++i) from_float(in[i], &pack.value[i]);
  *reinterpret_cast<Pack<T>*>(p) = pack;
}

}  // namespace fastast
