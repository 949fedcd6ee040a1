// The torch-facing side of the CUDA kernels: allocation of results and workspaces, registration.
// The schemas are Python's (danet_kernels/backends/cuda.py), and so are the checks that users meet (_checks.py).
//
// Everything happens on the current stream, so memory may go back to torch as soon as the last kernel that needs it
// is launched.
#include <algorithm>
#include <optional>
#include <tuple>

#include "cuda/channel_plan.h"
#include "cuda/plan.h"
#include "ops_cuda.h"

namespace danet {
namespace {

// The sum of `delta`, in gamma's shape and dtype.
Tensor gamma_gradient(const Tensor& gamma, const Tensor& delta) {
  Tensor result = empty(gamma, gamma.sizes(), gamma.scalar_type());
  torch::stable::copy_(result, torch::stable::sum(delta));
  return result;
}

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

// `count` images of a batch, or rows of their statistics.
Tensor images(const Tensor& t, int64_t first, int64_t count) {
  Tensor whole = t;
  return torch::stable::narrow(whole, 0, first, count);
}

// The workspace for the images x [images, C, N].
struct ChannelMemory {
  ChannelWorkspace workspace{};
  Tensor partial, logits, dweights, dgram, magnify, row_max, row_sum;

  ChannelMemory(const Tensor& x, bool backward, bool needs_x, const CudaCall& call) {
    const int64_t B = x.size(0), C = x.size(1), row = channel_cuda_blocks(C) * kChannelTile;
    ChannelWorkspace& w = workspace;
    w.splits = channel_cuda_splits(B, C, x.size(2), backward, call.multiprocessors);
    partial = floats(x, {B, channel_cuda_tiles(C, backward), w.splits, kChannelTile, kChannelTile});
    logits = floats(x, {B, C, row});
    w.partial = data(partial), w.logits = data(logits);
    if (!backward) return;
    dweights = floats(x, {B, C, row}), row_max = floats(x, {B, C}), row_sum = floats(x, {B, C});
    w.dweights = data(dweights), w.row_max = data(row_max), w.row_sum = data(row_sum);
    if (!needs_x) return;
    dgram = empty(x, {B, C, row}, x.scalar_type());
    w.dgram = dgram.mutable_data_ptr();
    if (dtype_of(x) != Dtype::kFloat16) return;
    magnify = floats(x, {B, C});
    w.magnify = data(magnify);
  }
};

std::tuple<Tensor, Tensor, Tensor> channel_attention_forward(const Tensor& x,  // [B, C, N]
                                                             const std::optional<Tensor> gamma, bool official,
                                                             bool residual, bool tf32) {
  auto p = channel_problem<ChannelForward>(x, official, residual);
  const TensorDevice device(x);
  const CudaCall call = cuda_call(device, gamma, tf32);
  Tensor out = gradient_like(x);
  Tensor row_max = floats(x, {p.B, p.C}), row_sum = floats(x, {p.B, p.C});
  const int64_t B = p.B, at_once = channel_cuda_images_at_once(p.C, p.dtype, false);
  for (int64_t first = 0; first < B; first += at_once) {
    p.B = std::min(at_once, B - first);
    const Tensor some_x = images(x, first, p.B);
    Tensor some_out = images(out, first, p.B);
    const OperandLines lines = operand(some_x, is_channels_last(x));
    p.x = lines.input;
    p.out = output(some_out);
    p.row_max = data(row_max) + first * p.C;
    p.row_sum = data(row_sum) + first * p.C;
    const ChannelMemory memory(some_x, false, false, call);
    channel_attention_forward_cuda(p, memory.workspace, call);
  }
  return {out, row_max, row_sum};
}

// The statistics of the forward go unused: G has to be computed again, in sums that are shared out in another way, and
// to its other last bits belong other maxima and sums.
std::tuple<Tensor, Tensor> channel_attention_backward(const Tensor& dout,  // [B, C, N]
                                                      const Tensor& x,     // [B, C, N]
                                                      const std::optional<Tensor> gamma, const Tensor&, const Tensor&,
                                                      bool official, bool residual, bool needs_x, bool needs_gamma,
                                                      bool tf32) {
  auto p = channel_problem<ChannelBackward>(x, official, residual);
  check_dout(dout, p.C, p.N, p.dtype);
  const TensorDevice device(x);
  const CudaCall call = cuda_call(device, gamma, tf32);
  Tensor dx = needs_x ? gradient_like(x) : none(x);
  Tensor delta = floats(x, {p.B, p.C});
  const int64_t B = p.B, at_once = channel_cuda_images_at_once(p.C, p.dtype, true);
  for (int64_t first = 0; first < B; first += at_once) {
    p.B = std::min(at_once, B - first);
    const Tensor some_x = images(x, first, p.B);
    Tensor some_dx = needs_x ? images(dx, first, p.B) : dx;
    const OperandLines lines = operand(some_x, is_channels_last(x));
    const OperandLines dout_lines = operand(images(dout, first, p.B), is_channels_last(x));
    p.x = lines.input, p.dout = dout_lines.input;
    if (needs_x) p.dx = output(some_dx);
    ChannelMemory memory(some_x, true, needs_x, call);
    memory.workspace.delta = data(delta) + first * p.C;
    channel_attention_backward_cuda(p, memory.workspace, call);
  }
  return {dx, needs_gamma ? gamma_gradient(gamma.value(), delta) : none(x)};
}

}  // namespace
}  // namespace danet

STABLE_TORCH_LIBRARY_IMPL(danet_kernels, DANET_DISPATCH_KEY, m) {
  m.impl("position_attention_forward_cuda", TORCH_BOX(&danet::position_attention_forward));
  m.impl("position_attention_backward_cuda", TORCH_BOX(&danet::position_attention_backward));
  m.impl("channel_attention_forward_cuda", TORCH_BOX(&danet::channel_attention_forward));
  m.impl("channel_attention_backward_cuda", TORCH_BOX(&danet::channel_attention_backward));
}
