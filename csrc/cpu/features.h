// What the CPU this process runs on can do. Kernels ask at run time: the build never assumes more than the baseline.
#pragma once

namespace danet {

// "x86_64", "aarch64", or "other".
const char* cpu_arch();

// Each is false on other architectures, and where the operating system does not save the registers.
bool cpu_has_avx2();         // AVX2 and FMA (x86-64-v3)
bool cpu_has_avx512();       // AVX-512 F, BW, DQ and VL
bool cpu_has_avx512_bf16();  // the above and AVX512-BF16 (vdpbf16ps)

}  // namespace danet
