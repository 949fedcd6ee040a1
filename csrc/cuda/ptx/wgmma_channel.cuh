// The products of warpgroups that channel attention has beside those of wgmma.cuh, where accumulators and matrices in
// shared memory are described.
#pragma once

#include <type_traits>

#include "ptx/wgmma.cuh"

namespace danet {

#define DANET_SUMS_8(x, i)                                                                                     \
  "+f"(x[i]), "+f"(x[i + 1]), "+f"(x[i + 2]), "+f"(x[i + 3]), "+f"(x[i + 4]), "+f"(x[i + 5]), "+f"(x[i + 6]),  \
      "+f"(x[i + 7])
#define DANET_SUMS_32(x, i) DANET_SUMS_8(x, i), DANET_SUMS_8(x, i + 8), DANET_SUMS_8(x, i + 16), DANET_SUMS_8(x, i + 24)
#define DANET_PLACES_64                                                  \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "          \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define DANET_PLACES_128                                                                               \
  DANET_PLACES_64 ", "                                                                                 \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "                   \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "                   \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "       \
  "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"

// Begin acc [64, 128] += A [64, 16] B [16, 128], both in shared memory.
// kARowLines: whether the lines of A run along its rows, not along the depth; kBRowLines: those of B along its columns.
template <class T, bool kARowLines, bool kBRowLines>
DANET_DEVICE void multiply_64x128x16(float (&acc)[64], uint64_t a, uint64_t b) {
#define DANET_WGMMA(type)                                                                              \
  asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type " {" DANET_PLACES_64 "}, " \
               "%64, %65, 1, 1, 1, %66, %67;"                                                          \
               : DANET_SUMS_32(acc, 0), DANET_SUMS_32(acc, 32)                                         \
               : "l"(a), "l"(b), "n"(kARowLines ? 1 : 0), "n"(kBRowLines ? 1 : 0))
  if constexpr (std::is_same_v<T, BFloat16>) {
    DANET_WGMMA("bf16");
  } else {
    DANET_WGMMA("f16");
  }
#undef DANET_WGMMA
}

// Begin acc [64, 256] += A [64, 16] B [16, 256], A in registers, B in shared memory.
template <class T, bool kBRowLines>
DANET_DEVICE void multiply_registers_64x256x16(float (&acc)[128], const uint32_t (&a)[4], uint64_t b) {
#define DANET_WGMMA(type)                                                                                         \
  asm volatile("wgmma.mma_async.sync.aligned.m64n256k16.f32." type "." type " {" DANET_PLACES_128 "}, "           \
               "{%128, %129, %130, %131}, %132, 1, 1, 1, %133;"                                                   \
               : DANET_SUMS_32(acc, 0), DANET_SUMS_32(acc, 32), DANET_SUMS_32(acc, 64), DANET_SUMS_32(acc, 96)    \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(kBRowLines ? 1 : 0))
  if constexpr (std::is_same_v<T, BFloat16>) {
    DANET_WGMMA("bf16");
  } else {
    DANET_WGMMA("f16");
  }
#undef DANET_WGMMA
}

#undef DANET_PLACES_128
#undef DANET_PLACES_64
#undef DANET_SUMS_32
#undef DANET_SUMS_8

}  // namespace danet
