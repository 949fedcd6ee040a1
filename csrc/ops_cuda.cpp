// The torch-facing side of the CUDA kernels: allocation of results and workspaces, registration.
// The schemas are Python's (danet_kernels/backends/cuda.py), and so are the checks that users meet (_checks.py).
//
// Everything happens on the current stream, so memory may go back to torch as soon as the last kernel that needs it
// is launched.
#include <optional>
#include <tuple>

#include "cuda/plan.h"
#include "ops_channel.h"
#include "ops_cuda.h"

namespace danet {
namespace {

// The sum over splits of [splits, B, D, L] fp32, or [B, D, L] where there is but one, in dtype and layout of `model`.
Tensor finished(const Tensor& sums, const Tensor& model) {
  constexpr int64_t kSplits = 0;  // the dimension
  Tensor result = gradient_like(model);
  const bool single = sums.dim() == 3;
  torch::stable::copy_(result, single ? sums : torch::stable::sum(sums, Sizes(&kSplits, 1)));
  return result;
}

// Uninitialised sums for the gradient of `model` [B, D, L], query or key, where the other side has K positions.
std::tuple<Tensor, PositionSums> position_sums(const Tensor& model, int64_t K, const CudaCall& call) {
  const int64_t B = model.size(0), D = model.size(1), L = model.size(2);
  const int64_t splits = position_splits(B, L, K, D, dtype_of(model), call.multiprocessors);
  Tensor memory = splits == 1 ? floats(model, {B, D, L}) : floats(model, {splits, B, D, L});
  return {memory, {data(memory), splits}};
}

std::tuple<Tensor, Tensor, Tensor> position_attention_forward(
    const Tensor& query,                   // [B, D, M]
    const Tensor& key,                     // [B, D, N]
    const Tensor& value,                   // [B, C, N]
    const std::optional<Tensor> residual,  // [B, C, M]
    const std::optional<Tensor> gamma, double scale, bool needs_attn, bool tf32) {
  auto p = position_problem<PositionForward>(query, key, value, scale);
  const TensorDevice device(value);
  const bool channels_last = is_channels_last(value);
  const OperandLines q = operand(query, channels_last), k = operand(key, channels_last),
                     v = operand(value, channels_last);
  p.query = q.input, p.key = k.input, p.value = v.input;
  if (residual) {
    DANET_CHECK_SHAPE("residual", *residual, p.C, p.M);
    p.residual = elements(*residual);
  }
  Tensor out = empty_like_layout(value, p.C, p.M, value.scalar_type());
  Tensor attn = needs_attn ? empty_like_layout(value, p.C, p.M, ScalarType::Float) : none(value);
  Tensor lse = floats(value, {p.B, p.M});
  p.out = output(out);
  if (needs_attn) p.attn = output(attn);
  p.lse = lse.mutable_data_ptr();
  position_attention_forward_cuda(p, cuda_call(device, gamma, tf32));
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
    bool needs_gamma,
    const std::optional<Tensor> magnify,  // [1], of dS
    bool deterministic, bool tf32) {
  auto p = position_problem<PositionBackward>(query, key, value, scale);
  check_dout(dout, p.C, p.M, p.dtype);
  DANET_CHECK_SHAPE("attn", attn, p.C, p.M);
  const TensorDevice device(value);
  const CudaCall call = cuda_call(device, gamma, tf32);
  const bool channels_last = is_channels_last(value);
  const OperandLines g = operand(dout, channels_last), q = operand(query, channels_last),
                     k = operand(key, channels_last), v = operand(value, channels_last);
  const Tensor contiguous_lse = torch::stable::contiguous(lse);
  p.dout = g.input, p.query = q.input, p.key = k.input, p.value = v.input;
  p.attn = elements(attn);
  p.lse = contiguous_lse.const_data_ptr();
  Tensor dquery = none(value), dkey = none(value), dvalue = none(value), dgamma = none(value);

  // 1. delta_i = sum_c dout_ic attn_ic, and the gradient of gamma.
  Tensor delta = none(value);  // [B, M]
  if (needs_query || needs_key || needs_gamma) {
    delta = floats(value, {p.B, p.M});
    position_attention_delta_cuda(p, data(delta), call);
  }
  if (needs_gamma) dgamma = gamma_gradient(gamma.value(), delta);

  // 2. The gradient of value.
  if (needs_value) {
    dvalue = gradient_like(value);
    p.dvalue = output(dvalue);
    position_attention_dvalue_cuda(p, call);
  }

  // 3. Those of query and key: from one pass over the map where both are needed and their bits may vary, else one each.
  const float* const factor = magnify ? static_cast<const float*>(magnify->const_data_ptr()) : nullptr;
  if (needs_key) {
    const bool shared = needs_query && !deterministic;
    Tensor dquery_sums = shared ? torch::stable::new_zeros(query, {p.B, p.D, p.M}, ScalarType::Float) : none(value);
    auto [memory, sums] = position_sums(key, p.M, call);
    position_attention_dkey_cuda(p, data(delta), factor, sums, shared ? data(dquery_sums) : nullptr, call);
    dkey = finished(memory, key);
    if (shared) dquery = finished(dquery_sums, query);
  }
  if (needs_query && (deterministic || !needs_key)) {
    auto [memory, sums] = position_sums(query, p.N, call);
    position_attention_dquery_cuda(p, data(delta), factor, sums, call);
    dquery = finished(memory, query);
  }
  return {dquery, dkey, dvalue, dgamma};
}

std::tuple<Tensor, Tensor, Tensor> channel_attention_forward(const Tensor& x,  // [B, C, N]
                                                             const std::optional<Tensor> gamma, bool official,
                                                             bool residual, bool tf32) {
  return channel_forward(x, gamma, official, residual, tf32, channel_attention_forward_cuda, /*may_overlap=*/true);
}

std::tuple<Tensor, Tensor> channel_attention_backward(const Tensor& dout,  // [B, C, N]
                                                      const Tensor& x,     // [B, C, N]
                                                      const std::optional<Tensor> gamma, const Tensor&, const Tensor&,
                                                      bool official, bool residual, bool needs_x, bool needs_gamma,
                                                      bool tf32) {
  return channel_backward(dout, x, gamma, official, residual, needs_x, needs_gamma, tf32,
                          channel_attention_backward_cuda, /*may_overlap=*/true);
}

}  // namespace
}  // namespace danet

STABLE_TORCH_LIBRARY_IMPL(danet_kernels, DANET_DISPATCH_KEY, m) {
  m.impl("position_attention_forward_cuda", TORCH_BOX(&danet::position_attention_forward));
  m.impl("position_attention_backward_cuda", TORCH_BOX(&danet::position_attention_backward));
  m.impl("channel_attention_forward_cuda", TORCH_BOX(&danet::channel_attention_forward));
  m.impl("channel_attention_backward_cuda", TORCH_BOX(&danet::channel_attention_backward));
}
