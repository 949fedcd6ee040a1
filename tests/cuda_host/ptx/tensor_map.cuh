// csrc/cuda/ptx/tensor_map.cuh for a CPU: what cuTensorMapEncodeTiled refuses is refused.
#pragma once

#include <stdexcept>

#include "ptx/launch.cuh"
#include "ptx/tma.cuh"

namespace danet {

struct TensorMapSizes {
  int64_t batches, lines, length;
  int64_t batch_stride, line_stride;
  int box_lines, box_length;
};

inline TensorMap tensor_map(const void* data, const TensorMapSizes& sizes, bool /*is_bf16*/) {
  constexpr int64_t kMostBytes = int64_t{1} << 40, kMostElements = int64_t{1} << 32;
  const auto is_size = [](int64_t size) { return size > 0 && size <= kMostElements; };
  const auto is_stride = [](int64_t stride) { return stride > 0 && stride % 8 == 0 && 2 * stride < kMostBytes; };
  const bool box = sizes.box_lines > 0 && sizes.box_lines <= 256 && (sizes.box_length == 64 || sizes.box_length == 32);
  if (reinterpret_cast<uintptr_t>(data) % 16 != 0 || !is_size(sizes.batches) || !is_size(sizes.lines) ||
      !is_size(sizes.length) || !is_stride(sizes.line_stride) || !is_stride(sizes.batch_stride) || !box) {
    throw std::runtime_error("cuTensorMapEncodeTiled: error 1");
  }
  return {{static_cast<const uint16_t*>(data), sizes.batches, sizes.lines, sizes.length, sizes.batch_stride,
           sizes.line_stride, sizes.box_lines, sizes.box_length}};
}

}  // namespace danet
