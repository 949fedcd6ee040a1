// What the torch-facing files of the CUDA kernels share: operands in lines, workspaces, what a launch takes besides.
#pragma once

#include <optional>

#include "ops.h"
#include "torch_device.h"

namespace danet {
namespace {  // as Tensor is hidden

using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;

constexpr int64_t kAlignment = 16;  // bytes

struct OperandLines {
  Tensor memory;  // kept while kernels are launched that read it
  Input input;
};

// `t` [B, channels, positions] in lines along channels (channels_last) or positions, which begin on 16-byte boundaries:
// as it lies if it lies so, else as a copy. Kernels never read behind the end of a line, so what is there stays
// unwritten. Lines may overlap, if the kernel does not mind.
inline OperandLines operand(const Tensor& t, bool channels_last, bool may_overlap = true) {
  const int64_t line = channels_last ? 2 : 1, along = channels_last ? 1 : 2;
  const int64_t B = t.size(0), lines = t.size(line), length = t.size(along);
  const int64_t multiple = kAlignment / static_cast<int64_t>(t.element_size());
  const int64_t padded = ceil_div(length, multiple) * multiple;
  const auto input = [&](const Tensor& memory, int64_t batch_stride, int64_t line_stride) {
    return channels_last ? Input{memory.const_data_ptr(), batch_stride, 1, line_stride}
                         : Input{memory.const_data_ptr(), batch_stride, line_stride, 1};
  };
  // The stride of a dimension of size 1 is arbitrary: here it is that of a copy.
  const int64_t line_stride = lines == 1 ? padded : t.stride(line);
  const int64_t batch_stride = B == 1 ? lines * line_stride : t.stride(0);
  const bool dense = length == 1 || t.stride(along) == 1;
  const bool aligned_strides = line_stride % multiple == 0 && batch_stride % multiple == 0;
  const bool aligned_base = reinterpret_cast<uintptr_t>(t.const_data_ptr()) % kAlignment == 0;
  const bool apart = may_overlap || (line_stride >= length && batch_stride >= line_stride);
  if (dense && aligned_strides && aligned_base && apart) return {t, input(t, batch_stride, line_stride)};
  Tensor packed = empty(t, {B, lines, padded}, t.scalar_type());
  Tensor inside = torch::stable::narrow(packed, 2, 0, length);  // [B, lines, length]
  if (channels_last) inside = torch::stable::transpose(inside, 1, 2);
  torch::stable::copy_(inside, t);
  return {packed, input(packed, lines * padded, padded)};
}

inline Tensor floats(const Tensor& model, Sizes sizes) { return empty(model, sizes, ScalarType::Float); }
inline float* data(Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }

inline CudaCall cuda_call(const TensorDevice& device, const std::optional<Tensor>& gamma, bool tf32) {
  check_gamma(gamma);
  CudaCall call{};
  if (gamma) call.gamma = gamma->const_data_ptr(), call.gamma_dtype = dtype_of(*gamma);
  call.tf32 = tf32;
  call.multiprocessors = device.multiprocessors();
  call.stream = device.stream();
  return call;
}

}  // namespace
}  // namespace danet
