// How the host describes a tensor to the TMA unit.
#pragma once

#include <cuda_runtime.h>

#include <string>

#include "ptx/launch.cuh"
#include "ptx/tma.cuh"

namespace danet {

// A tensor [batches, lines, length] of 16-bit elements, strides in elements, and its tiles [box_lines, box_length]. A
// line of a tile has 64 or 128 bytes, which is also the span of its swizzle.
struct TensorMapSizes {
  int64_t batches, lines, length;
  int64_t batch_stride, line_stride;
  int box_lines, box_length;
};

// Looked up at run time: the library is to load where there is no driver.
inline void* tensor_map_encoder() {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult status;
#if CUDART_VERSION >= 12050
  constexpr int kVersion = 12000;  // of CUDA, the first to have it
  check_cuda(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, kVersion, cudaEnableDefault, &status),
             "cuTensorMapEncodeTiled");
#else
  check_cuda(cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &status),
             "cuTensorMapEncodeTiled");
#endif
  if (found == nullptr) throw std::runtime_error("the driver has no cuTensorMapEncodeTiled: it is older than CUDA 12");
  return found;
}

inline TensorMap tensor_map(const void* data, const TensorMapSizes& sizes, bool is_bf16) {
  constexpr cuuint64_t kBytes = 2;
  const auto encode = reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(tensor_map_encoder());

  const cuuint64_t dimensions[] = {static_cast<cuuint64_t>(sizes.length), static_cast<cuuint64_t>(sizes.lines),
                                   static_cast<cuuint64_t>(sizes.batches)};
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(sizes.line_stride) * kBytes,
                                static_cast<cuuint64_t>(sizes.batch_stride) * kBytes};
  const cuuint32_t box[] = {static_cast<cuuint32_t>(sizes.box_length), static_cast<cuuint32_t>(sizes.box_lines), 1};
  const cuuint32_t every[] = {1, 1, 1};
  TensorMap result;
  const CUresult error =
      encode(&result.map, is_bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 3,
             const_cast<void*>(data), dimensions, strides, box, every, CU_TENSOR_MAP_INTERLEAVE_NONE,
             sizes.box_length == 64 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (error != CUDA_SUCCESS) {
    throw std::runtime_error("cuTensorMapEncodeTiled: error " + std::to_string(static_cast<int>(error)));
  }
  return result;
}

}  // namespace danet
