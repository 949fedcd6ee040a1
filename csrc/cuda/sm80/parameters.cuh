// Parts of the parameters of kernels: tensors whose elements are read one by one, gamma, and how operands come from
// launch.h.
#pragma once

#include "launch.h"
#include "sm80/products.cuh"

namespace danet {

constexpr float kLog2e = 1.44269504088896340736f;

// [B, channels, positions] for single elements; data == nullptr: there is none.
template <class T>
struct Elements {
  T* data;
  int64_t batch_stride, channel_stride, position_stride;

  DANET_DEVICE T* at(int64_t batch, int64_t channel, int64_t position) const {
    return data + batch * batch_stride + channel * channel_stride + position * position_stride;
  }
};

// gamma in device memory; data == nullptr stands for 1.
struct Gamma {
  const void* data;
  Dtype dtype;

  DANET_DEVICE float load() const {
    if (data == nullptr) return 1.0f;
    switch (dtype) {
      case Dtype::kFloat64: return to_float(*static_cast<const double*>(data));
      case Dtype::kBFloat16: return to_float(*static_cast<const BFloat16*>(data));
      case Dtype::kFloat16: return to_float(*static_cast<const Float16*>(data));
      default: return *static_cast<const float*>(data);
    }
  }
};

inline bool is_channels_last(const Input& input) { return input.column_stride != 1; }

template <class T>
Operand<T> operand(const Input& input, int64_t channels, int64_t positions) {
  return {static_cast<const T*>(input.data),
          input.batch_stride,
          is_channels_last(input) ? input.column_stride : input.row_stride,
          static_cast<int>(channels),
          static_cast<int>(positions)};
}

template <class T>
Elements<const T> elements(const Input& input) {
  return {static_cast<const T*>(input.data), input.batch_stride, input.row_stride, input.column_stride};
}

template <class T>
Elements<T> elements(const Output& output) {
  return {static_cast<T*>(output.data), output.batch_stride, output.row_stride, output.column_stride};
}

}  // namespace danet
