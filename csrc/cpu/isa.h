// Which instruction set the CPU kernels use: asked of the processor at run time, never of the
// machine that built them. FASTAST_CPU_ISA lowers the choice to one of the names below.
#pragma once

// GCC knows bf16 products and tiles since version 11.
#if defined(FASTAST_X86_VARIANTS) && defined(__GNUC__) && __GNUC__ >= 11
#define FASTAST_BF16_PRODUCTS
#endif

namespace fastast {

// Each has all before it. avx512_bf16 and amx differ from avx512 in the products of bf16 only.
enum class Isa { portable, avx2, avx512, avx512_bf16, amx };
constexpr const char* kIsaNames[] = {"portable", "avx2", "avx512", "avx512_bf16", "amx"};

Isa supported_isa();  // the best this processor has
Isa isa();            // the one in use
const char* name(Isa isa);

}  // namespace fastast
