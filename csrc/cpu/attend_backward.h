// What the kernels of attention's backward (attention_backward_rows.h) are given, and which one
// this processor runs.
#pragma once

#include <cstdint>
#include <type_traits>

#include "isa.h"
#include "types.h"

namespace fastast {

// The tokens of all samples' heads; strides in elements, the last dimension is dense.
template <class T>
struct Heads {
  T* data;
  int64_t sample, head, token;
  T* of(int64_t b, int64_t h) const { return data + b * sample + h * head; }
};

template <class T>
struct AttendBackward {
  using A = Accumulate<T>;
  Heads<const T> grad, q, k, v, out;
  const float* log_size;  // [batch, n] or null: 0
  const A* lse;           // [batch, heads, n_q]
  int64_t batch, heads, n_q, n, d;
  double scale;
  Heads<T> grad_q, grad_k, grad_v;
};

// Heads are numbered sample after sample; nothing is shared between them.
template <class T>
struct AttendBackwardKernel {
  int64_t (*memory)(const AttendBackward<T>& p);  // bytes that run() wants, of a line of 64 on
  void (*run)(const AttendBackward<T>& p, int64_t begin, int64_t end, unsigned char* memory);
};

template <class T>
AttendBackwardKernel<T> portable_attention_backward();
#ifdef FASTAST_X86_VARIANTS
template <class T>
AttendBackwardKernel<T> avx2_attention_backward();
template <class T>
AttendBackwardKernel<T> avx512_attention_backward();
#endif
#ifdef FASTAST_BF16_PRODUCTS
AttendBackwardKernel<bf16> avx512_bf16_attention_backward();
AttendBackwardKernel<bf16> amx_attention_backward();
#endif

template <class T>
AttendBackwardKernel<T> attention_backward_kernel() {
#ifdef FASTAST_BF16_PRODUCTS
  if constexpr (std::is_same_v<T, bf16>) {
    if (isa() == Isa::amx) return amx_attention_backward();
    if (isa() == Isa::avx512_bf16) return avx512_bf16_attention_backward();
  }
#endif
#ifdef FASTAST_X86_VARIANTS
  if (isa() >= Isa::avx512) return avx512_attention_backward<T>();
  if (isa() == Isa::avx2) return avx2_attention_backward<T>();
#endif
  return portable_attention_backward<T>();
}

}  // namespace fastast
