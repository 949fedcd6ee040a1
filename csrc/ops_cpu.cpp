// The torch-facing side of the CPU kernels: canonical strides, allocation of results, registration. The schemas are Python's
// (danet_kernels/backends/native.py), and so are the checks that users meet (danet_kernels/_checks.py).
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

#include "checks.h"
#include "cpu/memory.h"
#include "launch.h"

namespace danet {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Dtype dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return Dtype::kFloat32;
    case ScalarType::Double: return Dtype::kFloat64;
    case ScalarType::BFloat16: return Dtype::kBFloat16;
    case ScalarType::Half: return Dtype::kFloat16;
    default: STD_TORCH_CHECK(false, "expected float32, float64, bfloat16 or float16, got another dtype");
  }
}

ScalarType accumulator_dtype(const Tensor& tensor) {
  return tensor.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// The stride of a dimension of size 1 is arbitrary: the value a contiguous tensor would have keeps BLAS content.
int64_t row_stride(const Tensor& t) { return t.size(1) == 1 ? t.size(2) * t.stride(2) : t.stride(1); }
int64_t column_stride(const Tensor& t) { return t.size(2) == 1 ? 1 : t.stride(2); }

// A tensor [B, rows, columns] whose matrices BLAS can read: contiguous along one dimension, not overlapping. Else a copy.
Tensor readable(const Tensor& t) {
  const bool rows_contiguous = column_stride(t) == 1 && (t.size(1) == 1 || t.stride(1) >= t.size(2));
  const bool columns_contiguous = t.size(1) > 1 && t.stride(1) == 1 && (t.size(2) == 1 || t.stride(2) >= t.size(1));
  return rows_contiguous || columns_contiguous ? t : torch::stable::contiguous(t);
}

Input input(const Tensor& t) { return {t.const_data_ptr(), t.stride(0), row_stride(t), column_stride(t)}; }
Output output(Tensor& t) { return {t.mutable_data_ptr(), t.stride(0), t.stride(1), t.stride(2)}; }

Tensor empty(torch::headeronly::IntHeaderOnlyArrayRef sizes, ScalarType dtype) {
  Tensor tensor = torch::stable::empty(sizes, dtype);
  if (poison_memory()) poison(tensor.mutable_data_ptr(), tensor.numel() * static_cast<int64_t>(tensor.element_size()));
  return tensor;
}

// An empty tensor stands for a result that is not needed.
Tensor none(ScalarType dtype) { return torch::stable::empty({0}, dtype); }

// Uninitialised [B, rows, columns]; channels_last iff `model` is. The fake kernels follow the same rule (_layout.py).
Tensor empty_like_layout(const Tensor& model, int64_t rows, int64_t columns, ScalarType dtype) {
  const bool channels_last = model.size(1) > 1 && model.size(2) > 1 && model.stride(1) == 1;
  if (!channels_last) return empty({model.size(0), rows, columns}, dtype);
  return torch::stable::transpose(empty({model.size(0), columns, rows}, dtype), 1, 2);
}

Tensor gradient_like(const Tensor& t) { return empty_like_layout(t, t.size(1), t.size(2), t.scalar_type()); }

double gamma_value(const std::optional<Tensor>& gamma) {
  if (!gamma) return 1.0;
  DANET_CHECK_EQUAL("elements of gamma", gamma->numel(), 1);
  const void* data = gamma->const_data_ptr();
  switch (gamma->scalar_type()) {
    case ScalarType::Float: return *static_cast<const float*>(data);
    case ScalarType::Double: return *static_cast<const double*>(data);
    case ScalarType::BFloat16: return static_cast<float>(*static_cast<const torch::headeronly::BFloat16*>(data));
    default: return static_cast<float>(*static_cast<const torch::headeronly::Half*>(data));
  }
}

// The gradient of gamma, in gamma's shape and dtype.
Tensor gamma_gradient(const Tensor& gamma, double dgamma) {
  Tensor wide = torch::stable::empty(gamma.sizes(), ScalarType::Double);
  *static_cast<double*>(wide.mutable_data_ptr()) = dgamma;
  return torch::stable::to(wide, gamma.scalar_type());
}

std::tuple<Tensor, Tensor, Tensor> position_attention_forward(
    const Tensor& query,                   // [B, D, M]
    const Tensor& key,                     // [B, D, N]
    const Tensor& value,                   // [B, C, N]
    const std::optional<Tensor> residual,  // [B, C, M]
    const std::optional<Tensor> gamma, double scale, bool needs_attn) {
  PositionForward p{};
  p.B = query.size(0), p.D = query.size(1), p.M = query.size(2), p.C = value.size(1), p.N = value.size(2);
  DANET_CHECK_SHAPE("key", key, p.D, p.N);
  p.dtype = dtype_of(value);
  p.scale = scale;
  p.gamma = gamma_value(gamma);
  const Tensor q = readable(query), k = readable(key), v = readable(value);
  p.query = input(q), p.key = input(k), p.value = input(v);
  if (residual) {
    DANET_CHECK_SHAPE("residual", *residual, p.C, p.M);
    p.residual = {residual->const_data_ptr(), residual->stride(0), residual->stride(1), residual->stride(2)};
  }
  const ScalarType wide = accumulator_dtype(value);
  Tensor out = empty_like_layout(value, p.C, p.M, value.scalar_type());
  Tensor attn = needs_attn ? empty_like_layout(value, p.C, p.M, wide) : none(wide);
  Tensor lse = empty({p.B, p.M}, wide);
  p.out = output(out);
  if (needs_attn) p.attn = output(attn);
  p.lse = lse.mutable_data_ptr();
  position_attention_forward_cpu(p);
  return {out, attn, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> position_attention_backward(
    const Tensor& dout,   // [B, C, M]
    const Tensor& query,  // [B, D, M]
    const Tensor& key,    // [B, D, N]
    const Tensor& value,  // [B, C, N]
    const Tensor& attn,   // [B, C, M]
    const Tensor& lse,    // [B, M]
    const std::optional<Tensor> gamma, double scale, bool needs_query, bool needs_key, bool needs_value, bool needs_gamma) {
  PositionBackward p{};
  p.B = query.size(0), p.D = query.size(1), p.M = query.size(2), p.C = value.size(1), p.N = value.size(2);
  DANET_CHECK_SHAPE("key", key, p.D, p.N);
  DANET_CHECK_SHAPE("dout", dout, p.C, p.M);
  DANET_CHECK_SHAPE("attn", attn, p.C, p.M);
  p.dtype = dtype_of(value);
  DANET_CHECK_EQUAL("dtype of dout", static_cast<int>(dtype_of(dout)), static_cast<int>(p.dtype));
  p.scale = scale;
  p.gamma = gamma_value(gamma);
  const Tensor g = readable(dout), q = readable(query), k = readable(key), v = readable(value), a = readable(attn);
  const Tensor contiguous_lse = torch::stable::contiguous(lse);
  p.dout = input(g), p.query = input(q), p.key = input(k), p.value = input(v), p.attn = input(a);
  p.lse = contiguous_lse.const_data_ptr();
  const ScalarType wide = accumulator_dtype(value);
  Tensor dquery = needs_query ? gradient_like(query) : none(wide);
  Tensor dkey = needs_key ? gradient_like(key) : none(wide);
  Tensor dvalue = needs_value ? gradient_like(value) : none(wide);
  if (needs_query) p.dquery = output(dquery);
  if (needs_key) p.dkey = output(dkey);
  if (needs_value) p.dvalue = output(dvalue);
  double dgamma = 0;
  if (needs_gamma) p.dgamma = &dgamma;
  position_attention_backward_cpu(p);
  return {dquery, dkey, dvalue, needs_gamma ? gamma_gradient(gamma.value(), dgamma) : none(wide)};
}

std::tuple<Tensor, Tensor, Tensor> channel_attention_forward(const Tensor& x,  // [B, C, N]
                                                             const std::optional<Tensor> gamma, bool official,
                                                             bool residual) {
  ChannelForward p{};
  p.B = x.size(0), p.C = x.size(1), p.N = x.size(2);
  p.dtype = dtype_of(x);
  p.sign = official ? -1.0 : 1.0;
  p.gamma = gamma_value(gamma);
  p.residual = residual;
  const Tensor readable_x = readable(x);
  p.x = input(readable_x);
  Tensor out = gradient_like(x);
  Tensor row_max = empty({p.B, p.C}, accumulator_dtype(x)), row_sum = empty({p.B, p.C}, accumulator_dtype(x));
  p.out = output(out);
  p.row_max = row_max.mutable_data_ptr();
  p.row_sum = row_sum.mutable_data_ptr();
  channel_attention_forward_cpu(p);
  return {out, row_max, row_sum};
}

std::tuple<Tensor, Tensor> channel_attention_backward(const Tensor& dout,     // [B, C, N]
                                                      const Tensor& x,        // [B, C, N]
                                                      const std::optional<Tensor> gamma,
                                                      const Tensor& row_max,  // [B, C]
                                                      const Tensor& row_sum,  // [B, C]
                                                      bool official, bool residual, bool needs_x, bool needs_gamma) {
  ChannelBackward p{};
  p.B = x.size(0), p.C = x.size(1), p.N = x.size(2);
  DANET_CHECK_SHAPE("dout", dout, p.C, p.N);
  p.dtype = dtype_of(x);
  DANET_CHECK_EQUAL("dtype of dout", static_cast<int>(dtype_of(dout)), static_cast<int>(p.dtype));
  p.sign = official ? -1.0 : 1.0;
  p.gamma = gamma_value(gamma);
  p.residual = residual;
  const Tensor readable_dout = readable(dout), readable_x = readable(x);
  const Tensor maxima = torch::stable::contiguous(row_max), sums = torch::stable::contiguous(row_sum);
  p.dout = input(readable_dout), p.x = input(readable_x);
  p.row_max = maxima.const_data_ptr();
  p.row_sum = sums.const_data_ptr();
  const ScalarType wide = accumulator_dtype(x);
  Tensor dx = needs_x ? gradient_like(x) : none(wide);
  if (needs_x) p.dx = output(dx);
  double dgamma = 0;
  if (needs_gamma) p.dgamma = &dgamma;
  channel_attention_backward_cpu(p);
  return {dx, needs_gamma ? gamma_gradient(gamma.value(), dgamma) : none(wide)};
}

}  // namespace
}  // namespace danet

STABLE_TORCH_LIBRARY_IMPL(danet_kernels, CPU, m) {
  m.impl("position_attention_forward_native", TORCH_BOX(&danet::position_attention_forward));
  m.impl("position_attention_backward_native", TORCH_BOX(&danet::position_attention_backward));
  m.impl("channel_attention_forward_native", TORCH_BOX(&danet::channel_attention_forward));
  m.impl("channel_attention_backward_native", TORCH_BOX(&danet::channel_attention_backward));
}
