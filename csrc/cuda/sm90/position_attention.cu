// Launchers of the Hopper kernels of position attention. Compiled for 9.0a alone.
#include <cstdint>

#include "launch.h"
#include <ptx/launch.cuh>  // not the one of csrc, if another comes first on the include path
#include <ptx/tensor_map.cuh>
#include "sm90/position_attention_merge.cuh"

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

// Of a block that owns positions of `own` [B, D, L] and runs over those of `other` [B, D, K] and `values` [B, C, K].
HopperOperands operands(const Input& own, const Input& other, const Input& values, int64_t B, int64_t C, int64_t D,
                        int64_t L, int64_t K, Dtype dtype, const HopperRounds& rounds, float* parts) {
  using Tiles = HopperTiles;
  const bool channels_last = is_channels_last(values);
  const int value_channels = channels_last ? Tiles::kLine : Tiles::kOwn / PositionForwardSchedule::kClusterBlocks;
  return {tiles(own, B, D, L, Tiles::kD, Tiles::kRows, dtype),
          tiles(other, B, D, K, Tiles::kD, Tiles::kHalf, dtype),
          tiles(values, B, C, K, value_channels, Tiles::kColumns, dtype),
          static_cast<int>(C),
          static_cast<int>(L),
          static_cast<int>(K),
          channels_last,
          static_cast<int>(rounds.whole),
          static_cast<int>(rounds.splits),
          static_cast<int>(rounds.steps),
          parts};
}

// The kernel, and where tiles are shared the one that merges their parts.
template <class Parameters>
void launch_hopper(void (*kernel)(Parameters), void (*merge)(Parameters), const Parameters& parameters,
                   const HopperRounds& rounds, const CudaCall& call) {
  launch_clusters(kernel, kHopperBlocks * rounds.clusters(), kHopperBlocks, HopperTiles::kThreads,
                  HopperSharedMemory::bytes(), parameters, call.stream);
  if (rounds.splits == 1) return;
  launch(merge, rounds.shared * kHopperBlocks * (kHopperSums / kMergeElements), kMergeThreads, 0, parameters,
         call.stream);
}

template <class T>
void forward(const PositionForward& p, float* parts, const CudaCall& call) {
  const HopperRounds rounds = hopper_rounds(p.B, p.C, p.M, p.N, call.multiprocessors);
  HopperForwardParameters<T> parameters{};
  parameters.operands = operands(p.query, p.key, p.value, p.B, p.C, p.D, p.M, p.N, p.dtype, rounds, parts);
  parameters.residual = elements<T>(p.residual);
  parameters.out = elements<T>(p.out);
  parameters.attn = elements<float>(p.attn);
  parameters.lse = static_cast<float*>(p.lse);
  parameters.gamma = {call.gamma, call.gamma_dtype};
  parameters.scale = static_cast<float>(p.scale);
  launch_hopper(position_attention_hopper_forward_kernel<T>, position_attention_hopper_merge_kernel<T>, parameters,
                rounds, call);
}

template <class T>
void dvalue(const PositionBackward& p, float* parts, const CudaCall& call) {
  const HopperRounds rounds = hopper_rounds(p.B, p.C, p.N, p.M, call.multiprocessors);
  HopperDvalueParameters<T> parameters{};
  parameters.operands = operands(p.key, p.query, p.dout, p.B, p.C, p.D, p.N, p.M, p.dtype, rounds, parts);
  parameters.lse = static_cast<const float*>(p.lse);
  parameters.dvalue = elements<T>(p.dvalue);
  parameters.gamma = {call.gamma, call.gamma_dtype};
  parameters.scale = static_cast<float>(p.scale);
  launch_hopper(position_attention_hopper_dvalue_kernel<T>, position_attention_hopper_dvalue_merge_kernel<T>,
                parameters, rounds, call);
}

}  // namespace

void position_attention_forward_hopper(const PositionForward& p, float* parts, const CudaCall& call) {
  p.dtype == Dtype::kBFloat16 ? forward<BFloat16>(p, parts, call) : forward<Float16>(p, parts, call);
}

void position_attention_dvalue_hopper(const PositionBackward& p, float* parts, const CudaCall& call) {
  p.dtype == Dtype::kBFloat16 ? dvalue<BFloat16>(p, parts, call) : dvalue<Float16>(p, parts, call);
}

}  // namespace danet
