// Launcher of the Hopper kernel of position attention. Compiled for 9.0a alone.
#include <cstdint>

#include "launch.h"
#include <ptx/launch.cuh>  // not the one of csrc, if another comes first on the include path
#include <ptx/tensor_map.cuh>
#include "sm90/position_attention_fwd.cuh"

namespace danet {
namespace {

// Tiles of [tile_channels, tile_positions] of an operand [B, channels, positions].
TensorMap tiles(const Input& input, int64_t B, int64_t channels, int64_t positions, int tile_channels,
                int tile_positions, Dtype dtype) {
  const bool is_bf16 = dtype == Dtype::kBFloat16;
  if (is_channels_last(input)) {
    return tensor_map(input.data, {B, positions, channels, input.batch_stride, input.column_stride, tile_positions,
                                   tile_channels}, is_bf16);
  }
  return tensor_map(input.data, {B, channels, positions, input.batch_stride, input.row_stride, tile_channels,
                                 tile_positions}, is_bf16);
}

template <class T>
void forward(const PositionForward& p, const CudaCall& call) {
  using Tiles = HopperTiles;
  constexpr int kBlocks = PositionForwardSchedule::kClusterBlocks;
  HopperForwardParameters<T> parameters{};
  parameters.channels_last = is_channels_last(p.value);
  const int value_channels = parameters.channels_last ? Tiles::kLine : Tiles::kOwn / kBlocks;
  parameters.query = tiles(p.query, p.B, p.D, p.M, Tiles::kD, Tiles::kRows, p.dtype);
  parameters.key = tiles(p.key, p.B, p.D, p.N, Tiles::kD, Tiles::kHalf, p.dtype);
  parameters.value = tiles(p.value, p.B, p.C, p.N, value_channels, Tiles::kColumns, p.dtype);
  parameters.residual = elements<T>(p.residual);
  parameters.out = elements<T>(p.out);
  parameters.attn = elements<float>(p.attn);
  parameters.lse = static_cast<float*>(p.lse);
  parameters.gamma = {call.gamma, call.gamma_dtype};
  parameters.scale = static_cast<float>(p.scale);
  parameters.C = static_cast<int>(p.C), parameters.M = static_cast<int>(p.M), parameters.N = static_cast<int>(p.N);
  const int64_t query_blocks = ceil_div(p.M, kBlocks * Tiles::kRows) * kBlocks;
  launch_clusters(position_attention_hopper_forward_kernel<T>, query_blocks * ceil_div(p.C, Tiles::kChannels) * p.B,
                  kBlocks, Tiles::kThreads, HopperForwardSharedMemory::bytes(), parameters, call.stream);
}

}  // namespace

void position_attention_forward_hopper(const PositionForward& p, const CudaCall& call) {
  p.dtype == Dtype::kBFloat16 ? forward<BFloat16>(p, call) : forward<Float16>(p, call);
}

}  // namespace danet
