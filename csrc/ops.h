// What the torch-facing files for the CPU and for CUDA share: dtypes, layout and allocation of results, sizes.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <optional>
#include <tuple>

#include "checks.h"
#include "cpu/memory.h"
#include "launch.h"

namespace danet {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Dtype dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return Dtype::kFloat32;
    case ScalarType::Double: return Dtype::kFloat64;
    case ScalarType::BFloat16: return Dtype::kBFloat16;
    case ScalarType::Half: return Dtype::kFloat16;
    default: STD_TORCH_CHECK(false, "expected float32, float64, bfloat16 or float16, got another dtype");
  }
}

inline ScalarType accumulator_dtype(const Tensor& tensor) {
  return tensor.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Uninitialised, on the device of `model`.
inline Tensor empty(const Tensor& model, torch::headeronly::IntHeaderOnlyArrayRef sizes, ScalarType dtype) {
  Tensor tensor = torch::stable::new_empty(model, sizes, dtype);
  if (poison_memory()) torch::stable::fill_(tensor, NAN);
  return tensor;
}

// An empty tensor stands for a result that is not needed.
inline Tensor none(const Tensor& model) { return empty(model, {0}, accumulator_dtype(model)); }

// Whether the lines of a tensor [B, channels, positions] run along channels. The fake kernels follow the same rule
// (_layout.py).
inline bool is_channels_last(const Tensor& t) { return t.size(1) > 1 && t.size(2) > 1 && t.stride(1) == 1; }

// Uninitialised [B, rows, columns]; channels_last iff `model` is.
inline Tensor empty_like_layout(const Tensor& model, int64_t rows, int64_t columns, ScalarType dtype) {
  if (!is_channels_last(model)) return empty(model, {model.size(0), rows, columns}, dtype);
  return torch::stable::transpose(empty(model, {model.size(0), columns, rows}, dtype), 1, 2);
}

inline Tensor gradient_like(const Tensor& t) { return empty_like_layout(t, t.size(1), t.size(2), t.scalar_type()); }

inline Output output(Tensor& t) { return {t.mutable_data_ptr(), t.stride(0), t.stride(1), t.stride(2)}; }

// For kernels that read elements one by one, whatever the strides.
inline Input elements(const Tensor& t) { return {t.const_data_ptr(), t.stride(0), t.stride(1), t.stride(2)}; }

// The head of PositionForward or PositionBackward.
template <class Problem>
Problem position_problem(const Tensor& query, const Tensor& key, const Tensor& value, double scale) {
  Problem p{};
  p.B = query.size(0), p.D = query.size(1), p.M = query.size(2), p.C = value.size(1), p.N = value.size(2);
  DANET_CHECK_SHAPE("key", key, p.D, p.N);
  p.dtype = dtype_of(value);
  p.scale = scale;
  return p;
}

// The head of ChannelForward or ChannelBackward.
template <class Problem>
Problem channel_problem(const Tensor& x, bool official, bool residual) {
  Problem p{};
  p.B = x.size(0), p.C = x.size(1), p.N = x.size(2);
  p.dtype = dtype_of(x);
  p.sign = official ? -1.0 : 1.0;
  p.residual = residual;
  return p;
}

inline void check_gamma(const std::optional<Tensor>& gamma) {
  if (gamma) DANET_CHECK_EQUAL("elements of gamma", gamma->numel(), 1);
}

inline void check_dout(const Tensor& dout, int64_t rows, int64_t columns, Dtype dtype) {
  DANET_CHECK_SHAPE("dout", dout, rows, columns);
  DANET_CHECK_EQUAL("dtype of dout", static_cast<int>(dtype_of(dout)), static_cast<int>(dtype));
}

}  // namespace danet
