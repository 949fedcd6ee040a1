// The torch-facing side of the CPU kernels: canonical strides, allocation of results, registration. The schemas are
// Python's (danet_kernels/backends/native.py), and so are the checks that users meet (danet_kernels/_checks.py).
#include <optional>
#include <tuple>

#include "ops.h"

namespace danet {
namespace {

// The stride of a dimension of size 1 is arbitrary: the value a contiguous tensor would have keeps BLAS content.
int64_t row_stride(const Tensor& t) { return t.size(1) == 1 ? t.size(2) * t.stride(2) : t.stride(1); }
int64_t column_stride(const Tensor& t) { return t.size(2) == 1 ? 1 : t.stride(2); }

// A tensor [B, rows, columns] whose matrices BLAS can read: contiguous along one dimension, not overlapping. Else a
// copy.
Tensor readable(const Tensor& t) {
  const bool rows_contiguous = column_stride(t) == 1 && (t.size(1) == 1 || t.stride(1) >= t.size(2));
  const bool columns_contiguous = t.size(1) > 1 && t.stride(1) == 1 && (t.size(2) == 1 || t.stride(2) >= t.size(1));
  return rows_contiguous || columns_contiguous ? t : torch::stable::contiguous(t);
}

Input input(const Tensor& t) { return {t.const_data_ptr(), t.stride(0), row_stride(t), column_stride(t)}; }

double gamma_value(const std::optional<Tensor>& gamma) {
  if (!gamma) return 1.0;
  check_gamma(gamma);
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
  auto p = position_problem<PositionForward>(query, key, value, scale);
  p.gamma = gamma_value(gamma);
  const Tensor q = readable(query), k = readable(key), v = readable(value);
  p.query = input(q), p.key = input(k), p.value = input(v);
  if (residual) {
    DANET_CHECK_SHAPE("residual", *residual, p.C, p.M);
    p.residual = elements(*residual);
  }
  const ScalarType wide = accumulator_dtype(value);
  Tensor out = empty_like_layout(value, p.C, p.M, value.scalar_type());
  Tensor attn = needs_attn ? empty_like_layout(value, p.C, p.M, wide) : none(value);
  Tensor lse = empty(value, {p.B, p.M}, wide);
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
    const std::optional<Tensor> gamma, double scale, bool needs_query, bool needs_key, bool needs_value,
    bool needs_gamma) {
  auto p = position_problem<PositionBackward>(query, key, value, scale);
  check_dout(dout, p.C, p.M, p.dtype);
  DANET_CHECK_SHAPE("attn", attn, p.C, p.M);
  p.gamma = gamma_value(gamma);
  const Tensor g = readable(dout), q = readable(query), k = readable(key), v = readable(value), a = readable(attn);
  const Tensor contiguous_lse = torch::stable::contiguous(lse);
  p.dout = input(g), p.query = input(q), p.key = input(k), p.value = input(v), p.attn = input(a);
  p.lse = contiguous_lse.const_data_ptr();
  Tensor dquery = needs_query ? gradient_like(query) : none(value);
  Tensor dkey = needs_key ? gradient_like(key) : none(value);
  Tensor dvalue = needs_value ? gradient_like(value) : none(value);
  if (needs_query) p.dquery = output(dquery);
  if (needs_key) p.dkey = output(dkey);
  if (needs_value) p.dvalue = output(dvalue);
  double dgamma = 0;
  if (needs_gamma) p.dgamma = &dgamma;
  position_attention_backward_cpu(p);
  return {dquery, dkey, dvalue, needs_gamma ? gamma_gradient(gamma.value(), dgamma) : none(value)};
}

std::tuple<Tensor, Tensor, Tensor> channel_attention_forward(const Tensor& x,  // [B, C, N]
                                                             const std::optional<Tensor> gamma, bool official,
                                                             bool residual) {
  auto p = channel_problem<ChannelForward>(x, official, residual);
  p.gamma = gamma_value(gamma);
  const Tensor readable_x = readable(x);
  p.x = input(readable_x);
  Tensor out = gradient_like(x);
  Tensor row_max = empty(x, {p.B, p.C}, accumulator_dtype(x)), row_sum = empty(x, {p.B, p.C}, accumulator_dtype(x));
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
  auto p = channel_problem<ChannelBackward>(x, official, residual);
  check_dout(dout, p.C, p.N, p.dtype);
  p.gamma = gamma_value(gamma);
  const Tensor readable_dout = readable(dout), readable_x = readable(x);
  const Tensor maxima = torch::stable::contiguous(row_max), sums = torch::stable::contiguous(row_sum);
  p.dout = input(readable_dout), p.x = input(readable_x);
  p.row_max = maxima.const_data_ptr();
  p.row_sum = sums.const_data_ptr();
  Tensor dx = needs_x ? gradient_like(x) : none(x);
  if (needs_x) p.dx = output(dx);
  double dgamma = 0;
  if (needs_gamma) p.dgamma = &dgamma;
  channel_attention_backward_cpu(p);
  return {dx, needs_gamma ? gamma_gradient(gamma.value(), dgamma) : none(x)};
}

}  // namespace
}  // namespace danet

STABLE_TORCH_LIBRARY_IMPL(danet_kernels, CPU, m) {
  m.impl("position_attention_forward_native", TORCH_BOX(&danet::position_attention_forward));
  m.impl("position_attention_backward_native", TORCH_BOX(&danet::position_attention_backward));
  m.impl("channel_attention_forward_native", TORCH_BOX(&danet::channel_attention_forward));
  m.impl("channel_attention_backward_native", TORCH_BOX(&danet::channel_attention_backward));
}
