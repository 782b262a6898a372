#include "isa.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>

#if defined(FASTAST_X86_VARIANTS) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace fastast {
namespace {

// Linux gives a process AMX's registers when it asks for them.
bool may_use_tiles() {
#if defined(FASTAST_X86_VARIANTS) && defined(__linux__)
  constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
#else
  return false;
#endif
}

bool is_intel() {
#ifdef FASTAST_X86_VARIANTS
  __builtin_cpu_init();
  return __builtin_cpu_is("intel");
#else
  return false;
#endif
}

}  // namespace

Isa supported_isa() {
#ifdef FASTAST_X86_VARIANTS
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512dq");
#ifdef FASTAST_BF16_PRODUCTS
  const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
  const bool amx = bf16 && __builtin_cpu_supports("avx512vbmi") &&
                   __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") &&
                   __builtin_cpu_supports("amx-int8") && may_use_tiles();
#else
  const bool bf16 = false, amx = false;
#endif
  return amx      ? Isa::amx
         : bf16   ? Isa::avx512_bf16
         : avx512 ? Isa::avx512
         : avx2   ? Isa::avx2
                  : Isa::portable;
#else
  return Isa::portable;
#endif
}

Isa isa() {
  static const Isa chosen = [] {
    const char* wanted = std::getenv("FASTAST_CPU_ISA");
    for (Isa candidate : {Isa::portable, Isa::avx2, Isa::avx512, Isa::avx512_bf16, Isa::amx})
      if (wanted != nullptr && std::strcmp(wanted, name(candidate)) == 0)
        return std::min(candidate, supported_isa());
    // Intel's dot products of bf16 run at half the rate of its fp32 multiply-adds.
    const Isa best = supported_isa();
    return best == Isa::avx512_bf16 && is_intel() ? Isa::avx512 : best;
  }();
  return chosen;
}

const char* name(Isa isa) { return kIsaNames[static_cast<int>(isa)]; }

}  // namespace fastast
