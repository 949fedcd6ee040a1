// Launchers of the Hopper kernels of channel attention. Compiled for 9.0a alone. What comes between the products are
// the kernels of every GPU (../channel_attention.cu).
#include <cstdint>

#include "launch.h"
#include <ptx/launch.cuh>  // not the one of csrc, if another comes first on the include path
#include <ptx/tensor_map.cuh>
#include "sm90/channel_attention_bwd.cuh"
#include "sm90/channel_attention_fwd.cuh"
#include "sm90/channel_attention_gram.cuh"

namespace danet {
namespace {

constexpr int kCluster = 1;    // blocks
constexpr int kLine = 64;      // elements of a line of a tile
constexpr int64_t kWide = 8;   // elements that the kernels store at once

// Tiles of an operand [B, C, N], in boxes of kLine elements and so many lines.
TensorMap tiles(const Input& input, int64_t B, int64_t C, int64_t N, int lines, Dtype dtype) {
  const bool channels_last = is_channels_last(input);
  return tensor_map(input.data,
                    {B, channels_last ? N : C, channels_last ? C : N, input.batch_stride,
                     channels_last ? input.column_stride : input.row_stride, lines, kLine},
                    dtype == Dtype::kBFloat16);
}

template <class T>
void gram(const Input& x, const Input& dout, int64_t B, int64_t C, int64_t N, Dtype dtype, const ChannelWorkspace& w,
          const CudaCall& call) {
  HopperGramParameters<T> parameters{};
  parameters.channels_last = is_channels_last(x);
  parameters.has_dout = dout.data != nullptr;
  const int lines = parameters.channels_last ? HopperGramTiles::kPositions : kChannelTile;
  parameters.x = tiles(x, B, C, N, lines, dtype);
  if (parameters.has_dout) parameters.dout = tiles(dout, B, C, N, lines, dtype);
  parameters.partial = w.partial;
  parameters.C = static_cast<int>(C), parameters.N = static_cast<int>(N);
  parameters.splits = static_cast<int>(w.splits);
  parameters.split_positions = static_cast<int>(channel_cuda_split_positions(N, w.splits));
  launch_clusters(channel_attention_hopper_gram_kernel<T>,
                  B * channel_cuda_tiles(C, parameters.has_dout) * w.splits, kCluster, HopperGramTiles::kThreads,
                  HopperGramSharedMemory::bytes(), parameters, call.stream);
}

// What forward and backward tell the last step. `formed`: the values of the weights that are made from logits.
template <class T, class Problem>
HopperApplyParameters<T> apply_parameters(const Problem& p, const Input& formed, const Output& out,
                                          const ChannelWorkspace& w, const CudaCall& call) {
  HopperApplyParameters<T> parameters{};
  parameters.channels_last = is_channels_last(p.x);
  const int lines = parameters.channels_last ? HopperApplyTiles::kPositions : HopperApplyTiles::kChannels;
  parameters.formed = tiles(formed, p.B, p.C, p.N, lines, p.dtype);
  parameters.residual = elements<T>(p.residual ? formed : Input{});
  parameters.out = elements<T>(out);
  parameters.logits = w.logits;
  parameters.gamma = {call.gamma, call.gamma_dtype};
  parameters.C = static_cast<int>(p.C), parameters.N = static_cast<int>(p.N);
  const int64_t line_stride = parameters.channels_last ? out.column_stride : out.row_stride;
  const int64_t along = parameters.channels_last ? out.row_stride : out.column_stride;
  const bool aligned = reinterpret_cast<uintptr_t>(out.data) % (kWide * sizeof(T)) == 0;
  parameters.wide = along == 1 && line_stride % kWide == 0 && out.batch_stride % kWide == 0 && aligned;
  return parameters;
}

template <class T>
void launch_apply(void (*kernel)(HopperApplyParameters<T>), const HopperApplyParameters<T>& parameters, int64_t B,
                  const CudaCall& call) {
  const int64_t blocks = channel_cuda_blocks(parameters.C) * ceil_div(parameters.N, HopperApplyTiles::kPositions) * B;
  launch_clusters(kernel, blocks, kCluster, HopperApplyTiles::kThreads, HopperApplySharedMemory::bytes(), parameters,
                  call.stream);
}

template <class T>
void forward(const ChannelForward& p, const ChannelWorkspace& w, const CudaCall& call) {
  gram<T>(p.x, {}, p.B, p.C, p.N, p.dtype, w, call);
  channel_attention_softmax_cuda(p, w, call);
  auto parameters = apply_parameters<T>(p, p.x, p.out, w, call);
  parameters.row_max = static_cast<const float*>(p.row_max);
  parameters.row_sum = static_cast<const float*>(p.row_sum);
  launch_apply<T>(channel_attention_hopper_forward_kernel<T>, parameters, p.B, call);
}

template <class T>
void backward(const ChannelBackward& p, const ChannelWorkspace& w, const CudaCall& call) {
  gram<T>(p.x, p.dout, p.B, p.C, p.N, p.dtype, w, call);
  channel_attention_softmax_cuda(p, w, call);
  if (p.dx.data == nullptr) return;
  channel_attention_dgram_cuda(p, w, call);
  auto parameters = apply_parameters<T>(p, p.dout, p.dx, w, call);
  const int lines = parameters.channels_last ? HopperApplyTiles::kPositions : HopperApplyTiles::kChannels;
  parameters.x = tiles(p.x, p.B, p.C, p.N, lines, p.dtype);
  const int64_t row_length = channel_cuda_blocks(p.C) * kChannelTile;
  parameters.dgram = tiles({w.dgram, p.C * row_length, row_length, 1}, p.B, p.C, p.C, kChannelTile, p.dtype);
  parameters.row_max = w.row_max, parameters.row_sum = w.row_sum;
  parameters.delta = w.delta, parameters.magnify = w.magnify;
  launch_apply<T>(channel_attention_hopper_backward_kernel<T>, parameters, p.B, call);
}

}  // namespace

void channel_attention_forward_hopper(const ChannelForward& p, const ChannelWorkspace& w, const CudaCall& call) {
  p.dtype == Dtype::kBFloat16 ? forward<BFloat16>(p, w, call) : forward<Float16>(p, w, call);
}

void channel_attention_backward_hopper(const ChannelBackward& p, const ChannelWorkspace& w, const CudaCall& call) {
  p.dtype == Dtype::kBFloat16 ? backward<BFloat16>(p, w, call) : backward<Float16>(p, w, call);
}

}  // namespace danet
