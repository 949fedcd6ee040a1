#include "features.h"

#include <cstdlib>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace danet {

#if defined(__x86_64__)

const char* cpu_arch() { return "x86_64"; }

// __builtin_cpu_supports looks at CPUID and at XCR0, the register states that the operating system saves.
bool cpu_has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

bool cpu_has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

bool cpu_has_avx512_bf16() {
  // CPUID is read here because gcc 9 does not know the name; the register states are those of AVX-512.
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (!cpu_has_avx512() || !__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return false;
  const unsigned last_subleaf = eax;
  if (last_subleaf < 1 || !__get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx)) return false;
  return (eax >> 5) & 1;
}

bool cpu_runs_bf16_kernel() {
  static const bool available = DANET_HAS_BF16_KERNEL && cpu_has_avx512_bf16(), fast = __builtin_cpu_is("amd");
  const char* forced = std::getenv("DANET_KERNELS_BF16_KERNEL");
  return available && (forced == nullptr ? fast : forced[0] == '1');
}

#else

#if defined(__aarch64__)
const char* cpu_arch() { return "aarch64"; }
#else
const char* cpu_arch() { return "other"; }
#endif

bool cpu_has_avx2() { return false; }
bool cpu_has_avx512() { return false; }
bool cpu_has_avx512_bf16() { return false; }
bool cpu_runs_bf16_kernel() { return false; }

#endif

}  // namespace danet
