// Matrix products of one warp on tensor cores, and the loads that fill their operands (PTX ISA, "Matrix multiply-
// accumulate operation using mma instruction" and "ldmatrix"). Lane l holds, with g = l / 4 and q = l % 4:
//   accumulators [16, 8]:  0: (g, 2q)  1: (g, 2q + 1)  2: (g + 8, 2q)  3: (g + 8, 2q + 1)
//   16-bit A [16, 16]:     0: (g, 2q), (g, 2q + 1)  1: rows + 8  2: columns + 8  3: both + 8
//   16-bit B [16, 8]:      0: (2q, g), (2q + 1, g)  1: rows + 8
//   tf32 A [16, 8]:        0: (g, q)  1: (g + 8, q)  2: (g, q + 4)  3: (g + 8, q + 4)
//   tf32 B [8, 8]:         0: (q, g)  1: (q + 4, g)
#pragma once

#include "ptx/device.cuh"

namespace danet {

// Four 8 x 8 matrices of 16-bit elements. Lane l gives the address of row l % 8 of matrix l / 8, a multiple of 16;
// register i becomes elements (l / 4, 2 (l % 4)) and the next of matrix i, or if `transposed` of its transpose.
DANET_DEVICE void ldmatrix_x4(uint32_t (&registers)[4], const void* row, bool transposed) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  if (transposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
                 : "r"(address)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
                 : "r"(address)
                 : "memory");
  }
}

// acc [16, 8] += A [16, 16] B [16, 8].
template <class T>
DANET_DEVICE void mma_16x8x16(float (&acc)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

template <>
DANET_DEVICE void mma_16x8x16<BFloat16>(float (&acc)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

template <>
DANET_DEVICE void mma_16x8x16<Float16>(float (&acc)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// The bits of x rounded to the 10 bits of mantissa that tensor cores read of an fp32 operand.
DANET_DEVICE uint32_t round_to_tf32(float x) {
  uint32_t result;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(result) : "f"(x));
  return result;
}

DANET_DEVICE float tf32_value(uint32_t bits) { return __uint_as_float(bits); }
DANET_DEVICE uint32_t float_bits(float x) { return __float_as_uint(x); }

// acc [16, 8] += A [16, 8] B [8, 8].
DANET_DEVICE void mma_16x8x8(float (&acc)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

}  // namespace danet
