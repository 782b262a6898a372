// The kernels for AVX512. Library headers come before the pragma: what they define inline must stay
// code that every processor can run.
#include "attend.h"
#include "attend_backward.h"
#include "fbank_kernel.h"
#include "kernels.h"
#include "match_kernel.h"

#ifdef FASTAST_X86_VARIANTS
#include <immintrin.h>

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <type_traits>
#include <utility>

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq")

#define FASTAST_ISA avx512
#define FASTAST_VECTOR_BYTES 64
#define FASTAST_TILE_ROWS 14
#define FASTAST_TABLE avx512_kernels
#define FASTAST_ATTENTION avx512_attention
#define FASTAST_ATTENTION_BACKWARD avx512_attention_backward
#define FASTAST_MATCH avx512_match
#define FASTAST_FBANK avx512_fbank
#include "table.h"

#pragma GCC pop_options
#endif
