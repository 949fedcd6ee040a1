// What the CPU this process runs on can do. Kernels ask at run time: the build never assumes more than the baseline.
#pragma once

namespace danet {

// "x86_64", "aarch64", or "other".
const char* cpu_arch();

// Each is false on other architectures, and where the operating system does not save the registers.
bool cpu_has_avx2();         // AVX2 and FMA (x86-64-v3)
bool cpu_has_avx512();       // AVX-512 F, BW, DQ and VL
bool cpu_has_avx512_bf16();  // the above and AVX512-BF16 (vdpbf16ps)

// Whether bf16 position attention without a backward goes to the vdpbf16ps kernel (cpu/position_attention_bf16.cpp) rather than through fp32: the
// build and the CPU have it, and there it does more work per cycle than two fp32 FMAs: on AMD since Zen 4 twice as much, on
// Intel half as much (Emerald Rapids, 2026-11: 86 against 175 GFLOP/s per core), where bf16 is for AMX. The environment
// variable DANET_KERNELS_BF16_KERNEL (0 or 1) overrides that last judgement.
bool cpu_runs_bf16_kernel();

#if defined(__x86_64__) && ((defined(__clang__) && __clang_major__ >= 9) || (!defined(__clang__) && __GNUC__ >= 10))
#define DANET_HAS_BF16_KERNEL 1
#else
#define DANET_HAS_BF16_KERNEL 0
#endif

}  // namespace danet
