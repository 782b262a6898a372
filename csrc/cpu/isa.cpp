#include "isa.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>

namespace fastast {

Isa supported_isa() {
#ifdef FASTAST_X86_VARIANTS
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512dq");
  return avx512 ? Isa::avx512 : avx2 ? Isa::avx2 : Isa::portable;
#else
  return Isa::portable;
#endif
}

Isa isa() {
  static const Isa chosen = [] {
    const char* wanted = std::getenv("FASTAST_CPU_ISA");
    for (Isa candidate : {Isa::portable, Isa::avx2, Isa::avx512})
      if (wanted != nullptr && std::strcmp(wanted, name(candidate)) == 0)
        return std::min(candidate, supported_isa());
    return supported_isa();
  }();
  return chosen;
}

const char* name(Isa isa) {
  switch (isa) {
    case Isa::avx512:
      return "avx512";
    case Isa::avx2:
      return "avx2";
    default:
      return "portable";
  }
}

}  // namespace fastast
