// What the attention kernels of every instruction set (attention_rows.h) are given, and which one
// this processor runs.
#pragma once

#include <cstdint>
#include <type_traits>

#include "isa.h"
#include "types.h"

namespace fastast {

template <class T>
struct Attend {
  using A = Accumulate<T>;
  const T *q, *k, *v;
  // Strides in elements; the last dimension is dense.
  int64_t q_sample, q_head, q_token, k_sample, k_head, k_token, v_sample, v_head, v_token;
  const float* log_size;  // [batch, n] or null: 0
  int64_t batch, heads, n_q, n, d;
  double scale;
  T* out;  // [batch, n_q, heads, d]
  A* lse;  // [batch, heads, n_q], or null: nobody asks for it
};

// Blocks of `rows` queries are numbered head after head of sample after sample; what one computes
// does not depend on who computes the others.
template <class T>
struct AttendKernel {
  int64_t rows;
  int64_t (*memory)(const Attend<T>& p);  // bytes that run() wants, of a line of 64 on
  void (*run)(const Attend<T>& p, int64_t begin, int64_t end, unsigned char* memory);
};

template <class T>
AttendKernel<T> portable_attention();
#ifdef FASTAST_X86_VARIANTS
template <class T>
AttendKernel<T> avx2_attention();
template <class T>
AttendKernel<T> avx512_attention();
#endif
#ifdef FASTAST_BF16_PRODUCTS
AttendKernel<bf16> avx512_bf16_attention();
AttendKernel<bf16> amx_attention();
#endif

template <class T>
AttendKernel<T> attention_kernel() {
#ifdef FASTAST_BF16_PRODUCTS
  if constexpr (std::is_same_v<T, bf16>) {
    if (isa() == Isa::amx) return amx_attention();
    if (isa() == Isa::avx512_bf16) return avx512_bf16_attention();
  }
#endif
#ifdef FASTAST_X86_VARIANTS
  if (isa() >= Isa::avx512) return avx512_attention<T>();
  if (isa() == Isa::avx2) return avx2_attention<T>();
#endif
  return portable_attention<T>();
}

}  // namespace fastast
