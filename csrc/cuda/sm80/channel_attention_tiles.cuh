// What the kernels of channel attention have in common. In its products a block owns kChannelTile rows of sums, each of
// its warps 64 x 64 of them.
#pragma once

#include <cmath>

#include "cuda/channel_plan.h"
#include "cuda/plan.h"
#include "sm80/parameters.cuh"

namespace danet {

constexpr int kChannelRowTiles = 4;     // of 16 rows, of a warp
constexpr int kChannelColumnTiles = 8;  // of 8 columns, of a warp
constexpr int kChannelWarpRows = 16 * kChannelRowTiles;
constexpr int kChannelWarpColumns = 8 * kChannelColumnTiles;

// Sums of a warp, spread over its lanes as ptx/mma.cuh says.
using ChannelSums = float[kChannelRowTiles][kChannelColumnTiles][4];

// The warps of a block whose tile has kColumns columns, and where the sums of each begin within the tile.
template <int kColumns>
struct ChannelWarps {
  static constexpr int kAcross = kColumns / kChannelWarpColumns;
  static constexpr int kThreads = kChannelTile / kChannelWarpRows * kAcross * 32;
  static_assert(kChannelTile % kChannelWarpRows == 0 && kColumns % kChannelWarpColumns == 0, "warps cover the tile");

  static DANET_DEVICE int row() { return warp_index() / kAcross * kChannelWarpRows; }
  static DANET_DEVICE int column() { return warp_index() % kAcross * kChannelWarpColumns; }
};

// Tiles along a side of G for so many channels; and those on and above the diagonal.
DANET_DEVICE int tiles_along(int channels) { return (channels + kChannelTile - 1) / kChannelTile; }
DANET_DEVICE int gram_tiles(int blocks) { return blocks * (blocks + 1) / 2; }

// A few elements side by side, read or written at once.
template <class T, int kCount>
struct alignas(kCount * sizeof(T)) Several {
  T elements[kCount];
};

DANET_DEVICE float warp_sum(float value) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) value += shuffle_xor(value, mask);
  return value;
}

// A NaN counts for nothing.
DANET_DEVICE float warp_max(float value) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) value = fmaxf(value, shuffle_xor(value, mask));
  return value;
}

}  // namespace danet
