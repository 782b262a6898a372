// What the match kernels of every instruction set are made of, and which one this processor runs.
#pragma once

#include <cstdint>
#include <type_traits>

#include "isa.h"
#include "types.h"

namespace fastast {

// One sample's matching: its tokens packed into `memory`, then strips of A, the even tokens,
// against all of B, the odd ones. What a call computes does not depend on who makes the others.
template <class T>
struct MatchKernel {
  using A = Accumulate<T>;
  int64_t step;   // tokens are packed in runs that begin at a multiple of this
  int64_t strip;  // tokens of A at a time
  int64_t grain;  // products of two values that are worth a thread

  // Bytes for n tokens of c values, of a line of 64 on.
  int64_t (*memory)(int64_t n, int64_t c);
  // Packs tokens [begin, end) of n, dense at `tokens` [end - begin, c]; nobody may propose to
  // columns below first_col. False where a value or a length is not finite.
  bool (*pack)(const T* tokens, int64_t n, int64_t c, int64_t first_col, int64_t begin, int64_t end,
               unsigned char* memory);
  // For tokens [begin, end) of A, begin a multiple of `strip`: the highest cosine and the lowest
  // column of B with it.
  void (*score)(int64_t n, int64_t c, const unsigned char* memory, int64_t begin, int64_t end,
                A* best, int32_t* partner);
};

template <class T>
MatchKernel<T> portable_match();
#ifdef FASTAST_X86_VARIANTS
template <class T>
MatchKernel<T> avx2_match();
template <class T>
MatchKernel<T> avx512_match();
#endif
#ifdef FASTAST_BF16_PRODUCTS
template <class T>
MatchKernel<T> amx_match();
#endif

template <class T>
MatchKernel<T> match_kernel() {
#ifdef FASTAST_BF16_PRODUCTS
  if constexpr (!std::is_same_v<T, double>)
    if (isa() == Isa::amx) return amx_match<T>();
#endif
#ifdef FASTAST_X86_VARIANTS
  if (isa() >= Isa::avx512) return avx512_match<T>();
  if (isa() == Isa::avx2) return avx2_match<T>();
#endif
  return portable_match<T>();
}

}  // namespace fastast
