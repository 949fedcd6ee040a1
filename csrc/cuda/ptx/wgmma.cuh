// Products of a warpgroup, four warps, on the tensor cores of Hopper (sm_90a, PTX wgmma), and what their operands need.
//
// Accumulators [64, 8 n]: thread t of the warpgroup holds, with w = t / 32, g = t % 32 / 4 and q = t % 4, for each tile
// of 8 columns c:
//   4c: (16w + g, 8c + 2q)  4c + 1: the next column  4c + 2, 4c + 3: eight rows below
// A in registers [64, 16] lies as that of mma_16x8x16 (mma.cuh), warp w with rows 16w to 16w + 15.
#pragma once

#include "ptx/cluster.cuh"

namespace danet {

// A matrix in shared memory, in lines of 64 or 128 bytes whose 16-byte pieces are swizzled as TMA does it. It begins on
// a boundary of 8 lines, or along the depth some pieces later. Lines run
// - along the depth: rows follow each other, 8 of them in `group_bytes`;
// - along the rows: depths follow each other, 8 of them in `group_bytes`, and behind the rows of one line the next ones
//   are `block_bytes` further on.
template <int kLineBytes>
DANET_DEVICE uint64_t shared_matrix(const void* shared, int group_bytes, int block_bytes) {
  static_assert(kLineBytes == 128 || kLineBytes == 64, "the swizzles in use");
  constexpr uint64_t kSwizzle = kLineBytes == 128 ? 1 : 2;
  return static_cast<uint64_t>((shared_address(shared) & 0x3ffff) >> 4) |
         static_cast<uint64_t>(block_bytes >> 4) << 16 | static_cast<uint64_t>(group_bytes >> 4) << 32 |
         kSwizzle << 62;
}

// The same matrix, `bytes` later.
DANET_DEVICE uint64_t shared_matrix_after(uint64_t matrix, int bytes) {
  return matrix + static_cast<uint64_t>(bytes >> 4);
}

// Registers that a product reads or adds to may have been written before; the warpgroup comes here together.
DANET_DEVICE void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

// Close a group of products: all that the warpgroup has begun since the last one.
DANET_DEVICE void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Wait until at most kPending groups are under way. Until then nobody may touch their accumulators.
template <int kPending>
DANET_DEVICE void wait_for_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Four 8 x 8 matrices of 16-bit elements to shared memory. Lane l gives the address of row l % 8 of matrix l / 8, a
// multiple of 16; register i has elements (l / 4, 2 (l % 4)) and the next of matrix i.
DANET_DEVICE void stmatrix_x4(void* row, const uint32_t (&registers)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(row)),
               "r"(registers[0]), "r"(registers[1]), "r"(registers[2]), "r"(registers[3])
               : "memory");
}

// Begin acc [64, 32] = A [64, 16] B [16, 32], plus acc if `add`; A in registers, B in shared memory.
// kRowLines: whether the lines of B run along its columns, not along the depth.
template <class T, bool kRowLines>
DANET_DEVICE void multiply_64x32x16(float (&acc)[16], const uint32_t (&a)[4], uint64_t b, bool add);

// Begin acc [64, 256] += A [64, 16] B [16, 256], both in shared memory, A in lines along the depth.
template <class T, bool kRowLines>
DANET_DEVICE void multiply_64x256x16(float (&acc)[128], uint64_t a, uint64_t b);

#define DANET_SUMS_8(x, i)                                                                                            \
  "+f"(x[i]), "+f"(x[i + 1]), "+f"(x[i + 2]), "+f"(x[i + 3]), "+f"(x[i + 4]), "+f"(x[i + 5]), "+f"(x[i + 6]),         \
      "+f"(x[i + 7])
#define DANET_SUMS_32(x, i) DANET_SUMS_8(x, i), DANET_SUMS_8(x, i + 8), DANET_SUMS_8(x, i + 16), DANET_SUMS_8(x, i + 24)

#define DANET_WGMMA(T, kRowLines, type)                                                                               \
  template <>                                                                                                         \
  DANET_DEVICE void multiply_64x32x16<T, kRowLines>(float (&acc)[16], const uint32_t (&a)[4], uint64_t b, bool add) { \
    asm volatile(                                                                                                     \
        "{\n"                                                                                                         \
        ".reg .pred add;\n"                                                                                           \
        "setp.ne.b32 add, %21, 0;\n"                                                                                  \
        "wgmma.mma_async.sync.aligned.m64n32k16.f32." type "." type " "                                               \
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, "                                    \
        "{%16, %17, %18, %19}, %20, add, 1, 1, %22;\n"                                                                \
        "}"                                                                                                           \
        : DANET_SUMS_8(acc, 0), DANET_SUMS_8(acc, 8)                                                                  \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(add)), "n"(kRowLines ? 1 : 0));    \
  }                                                                                                                   \
  template <>                                                                                                         \
  DANET_DEVICE void multiply_64x256x16<T, kRowLines>(float (&acc)[128], uint64_t a, uint64_t b) {                     \
    asm volatile(                                                                                                     \
        "wgmma.mma_async.sync.aligned.m64n256k16.f32." type "." type " {"                                             \
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                                      \
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "                            \
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "                            \
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "                            \
        "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "                            \
        "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "                            \
        "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "                \
        "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127}, "           \
        "%128, %129, 1, 1, 1, 0, %130;"                                                                               \
        : DANET_SUMS_32(acc, 0), DANET_SUMS_32(acc, 32), DANET_SUMS_32(acc, 64), DANET_SUMS_32(acc, 96)               \
        : "l"(a), "l"(b), "n"(kRowLines ? 1 : 0));                                                                    \
  }

DANET_WGMMA(BFloat16, false, "bf16")
DANET_WGMMA(BFloat16, true, "bf16")
DANET_WGMMA(Float16, false, "f16")
DANET_WGMMA(Float16, true, "f16")

#undef DANET_WGMMA
#undef DANET_SUMS_32
#undef DANET_SUMS_8

}  // namespace danet
