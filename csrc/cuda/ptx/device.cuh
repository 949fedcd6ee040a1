// What kernels take from CUDA besides matrix products: threads, shared memory, 16-bit types, a few functions of
// numbers. All inline PTX and all intrinsics live in csrc/cuda/ptx: tests/cuda_host/ptx has headers of the same names,
// with which the kernels compile as C++ and run on a CPU.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#define DANET_DEVICE __device__ __forceinline__
#define DANET_KERNEL(threads, blocks_per_multiprocessor) \
  __global__ __launch_bounds__(threads, blocks_per_multiprocessor) void

namespace danet {

using BFloat16 = __nv_bfloat16;
using Float16 = __half;

DANET_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }  // within the block
DANET_DEVICE int64_t block_index() { return blockIdx.x; }                  // all grids are one-dimensional

DANET_DEVICE void synchronize() { __syncthreads(); }

// The dynamic shared memory of the block, on a 128-byte boundary. There is no other shared memory.
DANET_DEVICE char* shared_memory() {
  extern __shared__ __align__(128) char memory[];
  return memory;
}

// The value of the lane whose number differs in the bits of `mask`. All lanes of the warp take part.
DANET_DEVICE float shuffle_xor(float value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }

// *address += value, in any order among threads and blocks.
DANET_DEVICE void atomic_add(float* address, float value) { atomicAdd(address, value); }

// 2^x: two units in the last place, 0 for -inf.
DANET_DEVICE float exp2_fast(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

DANET_DEVICE float infinity() { return __int_as_float(0x7f800000); }
DANET_DEVICE float not_a_number() { return __int_as_float(0x7fffffff); }

DANET_DEVICE float to_float(float x) { return x; }
DANET_DEVICE float to_float(double x) { return static_cast<float>(x); }
DANET_DEVICE float to_float(BFloat16 x) { return __bfloat162float(x); }
DANET_DEVICE float to_float(Float16 x) { return __half2float(x); }

// Rounded to nearest, ties to even.
template <class T>
DANET_DEVICE T from_float(float x);
template <>
DANET_DEVICE float from_float<float>(float x) { return x; }
template <>
DANET_DEVICE BFloat16 from_float<BFloat16>(float x) { return __float2bfloat16_rn(x); }
template <>
DANET_DEVICE Float16 from_float<Float16>(float x) { return __float2half_rn(x); }

// Two values rounded to a 16-bit type, the first in the low half.
template <class T>
DANET_DEVICE uint32_t pack(float low, float high);
template <>
DANET_DEVICE uint32_t pack<BFloat16>(float low, float high) {
  uint32_t result;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
  return result;
}
template <>
DANET_DEVICE uint32_t pack<Float16>(float low, float high) {
  uint32_t result;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
  return result;
}

}  // namespace danet
