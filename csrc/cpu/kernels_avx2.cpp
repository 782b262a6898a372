// The kernels for AVX2. Library headers come before the pragma: what they define inline must stay
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
#pragma GCC target("avx2,fma,f16c")

#define FASTAST_ISA avx2
#define FASTAST_VECTOR_BYTES 32
#define FASTAST_TILE_ROWS 6
#define FASTAST_TABLE avx2_kernels
#define FASTAST_ATTENTION avx2_attention
#define FASTAST_ATTENTION_BACKWARD avx2_attention_backward
#define FASTAST_MATCH avx2_match
#define FASTAST_FBANK avx2_fbank
#include "table.h"

#pragma GCC pop_options
#endif
