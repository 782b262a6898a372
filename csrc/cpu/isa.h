// Which instruction set the CPU kernels use: asked of the processor at run time, never of the
// machine that built them. FASTAST_CPU_ISA=avx512|avx2|portable lowers the choice.
#pragma once

namespace fastast {

enum class Isa { portable, avx2, avx512 };

Isa supported_isa();  // the best this processor has
Isa isa();            // the one in use
const char* name(Isa isa);

}  // namespace fastast
