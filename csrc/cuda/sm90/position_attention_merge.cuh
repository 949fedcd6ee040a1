// Adds the parts of tiles that clusters have shared, in order.
#pragma once

#include <cmath>

#include "sm90/position_attention_dvalue.cuh"
#include "sm90/position_attention_fwd.cuh"

namespace danet {

constexpr int kMergeThreads = 256;
constexpr int kMergeElements = 4096;  // of a block
static_assert(kHopperSums % kMergeElements == 0 && kMergeElements % kMergeThreads == 0, "blocks have the same work");

// Calls add(sums, rank, row, channel, position, tile) for every element of [64, 512] that this block has of a tile that
// is shared, and that is inside of the tensor; `sums` points to it in the first part.
template <class Add>
DANET_DEVICE void for_shared_elements(const HopperOperands& p, const Add& add) {
  constexpr int kBlocks = static_cast<int>(kHopperSums) / kMergeElements;  // for a block of a tile
  const int64_t tile_number = block_index() / kBlocks / kHopperBlocks;
  const int rank = static_cast<int>(block_index() / kBlocks % kHopperBlocks);
  const HopperTile tile = hopper_tile(p, p.whole + tile_number, rank);
  float* const sums = p.parts + tile_number * p.splits * kHopperPart + rank * kHopperSums;
  const int first = static_cast<int>(block_index() % kBlocks) * kMergeElements;
  for (int i = first + thread_index(); i < first + kMergeElements; i += kMergeThreads) {
    const int row = p.channels_last ? i / kHopperChannels : i % kHopperRows;
    const int channel = tile.first_channel + (p.channels_last ? i % kHopperChannels : i / kHopperRows);
    const int position = tile.first_position + row;
    if (channel >= p.C || position >= p.L) continue;
    add(sums + i, hopper_statistics(sums, rank) + 2 * row, channel, position, tile);
  }
}

// Grid: 8 blocks for each block of a tile that is shared. Each adds 4096 of its sums: the maximum of a row is the
// largest of all parts, and what belongs to another one is shrunk.
template <class T>
DANET_KERNEL(kMergeThreads, 2) position_attention_hopper_merge_kernel(HopperForwardParameters<T> p) {
  const float gamma = p.gamma.load();
  const auto add = [&](const float* sums, const float* statistics, int channel, int position, const HopperTile& tile) {
    float m = -infinity();
    for (int part = 0; part < p.operands.splits; ++part) m = fmaxf(m, statistics[part * kHopperPart]);
    const float safe_m = m == -infinity() ? 0.0f : m;
    float l = 0.0f, attn = 0.0f;
    for (int part = 0; part < p.operands.splits; ++part) {
      const float shrink = exp2_fast((statistics[part * kHopperPart] - safe_m) * kLog2e);
      l += statistics[part * kHopperPart + 1] * shrink;
      attn += sums[part * kHopperPart] * shrink;
    }
    if (channel == 0) p.lse[static_cast<int64_t>(tile.batch) * p.operands.L + position] = m + logf(l);
    attn *= 1.0f / l;
    if (p.attn.data != nullptr) *p.attn.at(tile.batch, channel, position) = attn;
    float result = attn * gamma;
    if (p.residual.data != nullptr) result += to_float(*p.residual.at(tile.batch, channel, position));
    *p.out.at(tile.batch, channel, position) = from_float<T>(result);
  };
  for_shared_elements(p.operands, add);
}

// Grid: as above.
template <class T>
DANET_KERNEL(kMergeThreads, 2) position_attention_hopper_dvalue_merge_kernel(HopperDvalueParameters<T> p) {
  const float gamma = p.gamma.load();
  const auto add = [&](const float* sums, const float*, int channel, int position, const HopperTile& tile) {
    float sum = 0.0f;
    for (int part = 0; part < p.operands.splits; ++part) sum += sums[part * kHopperPart];
    *p.dvalue.at(tile.batch, channel, position) = from_float<T>(sum * gamma);
  };
  for_shared_elements(p.operands, add);
}

}  // namespace danet
