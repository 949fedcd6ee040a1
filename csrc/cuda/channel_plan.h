// How channel attention is shared out among the blocks of its CUDA kernels, and how large its workspace is: pure
// functions of shapes, for the launchers, for memory_estimate and for the tests.
#pragma once

#include <cstdint>

#include "launch.h"

namespace danet {

constexpr int kChannelTile = 128;          // rows and columns of a tile of G = x x^T, or of H = dout x^T
constexpr int kChannelPositions = 256;     // of a tile of the result, of kChannelTile channels
constexpr int kChannelSplitMultiple = 64;  // positions; a multiple of every step over positions

// Bytes, more or less, from which on a batch goes in parts: matrices [C, C] of every image would outgrow x where N is
// small.
constexpr int64_t kChannelLargestWorkspace = int64_t{1} << 28;

// Tiles along one side of G.
constexpr int64_t channel_cuda_blocks(int64_t C) { return ceil_div(C, kChannelTile); }

// Tiles of G on and above the diagonal; the backward also needs all of H.
constexpr int64_t channel_cuda_tiles(int64_t C, bool backward) {
  const int64_t blocks = channel_cuda_blocks(C), upper = blocks * (blocks + 1) / 2;
  return backward ? upper + blocks * blocks : upper;
}

// Positions that one of `splits` blocks adds up, of N: a multiple of kChannelSplitMultiple.
constexpr int64_t channel_cuda_split_positions(int64_t N, int64_t splits) {
  return ceil_div(ceil_div(N, kChannelSplitMultiple), splits) * kChannelSplitMultiple;
}

// How many blocks share a tile, where B images go together. Such that rounds of one block for each multiprocessor are
// full, and no split is empty. From some thousand positions on, neither their number nor the memory that their sums
// take depends on N.
int64_t channel_cuda_splits(int64_t B, int64_t C, int64_t N, bool backward, int64_t multiprocessors);

// Workspace for one image, with one partial sum: its tiles, the logits, and in the backward H and dG + dG^T.
int64_t channel_cuda_image_bytes(int64_t C, Dtype dtype, bool backward);

// Images of a batch that go together.
int64_t channel_cuda_images_at_once(int64_t C, Dtype dtype, bool backward);

// Bytes that a call allocates beyond its results, at most: those of ChannelWorkspace.
int64_t channel_cuda_workspace(int64_t B, int64_t C, int64_t N, Dtype dtype, bool backward, int64_t multiprocessors);

}  // namespace danet
