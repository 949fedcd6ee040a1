// Channel attention on CUDA devices, whichever kernels do it: allocation of results and workspaces, a batch in parts.
#pragma once

#include <algorithm>
#include <optional>
#include <tuple>

#include "cuda/channel_plan.h"
#include "ops_cuda.h"

namespace danet {
namespace {  // as Tensor is hidden

// The sum of `delta`, in gamma's shape and dtype.
inline Tensor gamma_gradient(const Tensor& gamma, const Tensor& delta) {
  Tensor result = empty(gamma, gamma.sizes(), gamma.scalar_type());
  torch::stable::copy_(result, torch::stable::sum(delta));
  return result;
}

// `count` images of a batch, or rows of their statistics.
inline Tensor images(const Tensor& t, int64_t first, int64_t count) {
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

using ChannelForwardLauncher = void (*)(const ChannelForward&, const ChannelWorkspace&, const CudaCall&);
using ChannelBackwardLauncher = void (*)(const ChannelBackward&, const ChannelWorkspace&, const CudaCall&);

// out [B, C, N], row_max and row_sum [B, C]. may_overlap: whether the kernels take operands whose lines overlap.
inline std::tuple<Tensor, Tensor, Tensor> channel_forward(const Tensor& x,  // [B, C, N]
                                                          const std::optional<Tensor>& gamma, bool official,
                                                          bool residual, bool tf32, ChannelForwardLauncher launch,
                                                          bool may_overlap) {
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
    const OperandLines lines = operand(some_x, is_channels_last(x), may_overlap);
    p.x = lines.input;
    p.out = output(some_out);
    p.row_max = data(row_max) + first * p.C;
    p.row_sum = data(row_sum) + first * p.C;
    const ChannelMemory memory(some_x, false, false, call);
    launch(p, memory.workspace, call);
  }
  return {out, row_max, row_sum};
}

// dx [B, C, N] and dgamma. The statistics of the forward go unused: G has to be computed again, in sums that are shared
// out in another way, and to its other last bits belong other maxima and sums.
inline std::tuple<Tensor, Tensor> channel_backward(const Tensor& dout,  // [B, C, N]
                                                   const Tensor& x,     // [B, C, N]
                                                   const std::optional<Tensor>& gamma, bool official, bool residual,
                                                   bool needs_x, bool needs_gamma, bool tf32,
                                                   ChannelBackwardLauncher launch, bool may_overlap) {
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
    const OperandLines lines = operand(some_x, is_channels_last(x), may_overlap);
    const OperandLines dout_lines = operand(images(dout, first, p.B), is_channels_last(x), may_overlap);
    p.x = lines.input, p.dout = dout_lines.input;
    if (needs_x) p.dx = output(some_dx);
    ChannelMemory memory(some_x, true, needs_x, call);
    memory.workspace.delta = data(delta) + first * p.C;
    launch(p, memory.workspace, call);
  }
  return {dx, needs_gamma ? gamma_gradient(gamma.value(), delta) : none(x)};
}

}  // namespace
}  // namespace danet
