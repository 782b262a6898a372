// The backward of attention in bf16 for processors that multiply it: by dot products of pairs
// (AVX512-BF16) or of tiles (AMX). Library headers come before the pragma, as in
// attention_bf16.cpp.
#include "attend_backward.h"

#ifdef FASTAST_BF16_PRODUCTS
#include <immintrin.h>

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <type_traits>
#include <utility>

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,amx-tile,amx-bf16")

#define FASTAST_ISA avx512_bf16
#define FASTAST_VECTOR_BYTES 64
#define FASTAST_TILE_ROWS 14
#include "vec.h"

#include "attention_backward_rows.h"
#include "bf16_engines.h"

namespace fastast {

AttendBackwardKernel<bf16> avx512_bf16_attention_backward() {
  return avx512_bf16::attend_backward_kernel<bf16, avx512_bf16::DotProducts>();
}
AttendBackwardKernel<bf16> amx_attention_backward() {
  return avx512_bf16::attend_backward_kernel<bf16, avx512_bf16::Tiles>();
}

}  // namespace fastast

#pragma GCC pop_options
#endif
