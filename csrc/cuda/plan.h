// Tiles and splits of the CUDA kernels of position attention: pure functions of shapes, for the launchers, for
// memory_estimate and for the tests.
#pragma once

#include <cstdint>

#include "launch.h"

namespace danet {

constexpr int kWarps = 4;  // of a block; each owns a quarter of the rows of its tile
constexpr int kThreads = 32 * kWarps;
constexpr int kBlocksPerMultiprocessor = 2;
constexpr int kLargestD = 256;
constexpr int kBlockD = 64;         // channels of query and key that a tile in shared memory holds
constexpr int kSharedMemory = 101376;  // bytes that a block may have on every GPU from sm_80 on (sm_86 has the least)

// Of the 16-bit types, and of fp32, whose tiles are twice as large and whose products need more registers.
template <class T>
struct PositionTiles {
  static constexpr bool kWide = sizeof(T) == 4;
  static constexpr int kRows = kWide ? 64 : 128;    // positions that a block owns
  static constexpr int kColumns = kWide ? 32 : 64;  // positions of the other side that it takes at a time
  static constexpr int kChannels = 128;             // of value that a block owns
  static constexpr int kBlockC = 64;                // channels of value and dout that a product over C takes at a time
};

constexpr int64_t kMostRounds = 8;  // bounds the memory that sums of splits take by what the GPU is

// Positions of the other side that one of `splits` blocks takes, of K: whole tiles.
constexpr int64_t position_split_length(int64_t K, int64_t columns, int64_t splits) {
  return ceil_div(ceil_div(K, columns), splits) * columns;
}

// On Hopper a cluster of two blocks computes a tile of 128 own positions and 512 channels.
constexpr int kHopperBlocks = 2;      // of a cluster
constexpr int kHopperRows = 64;       // positions that a block owns
constexpr int kHopperColumns = 64;    // positions of the other side that it takes at a time
constexpr int kHopperChannels = 512;  // of the values

// How tiles are given to clusters. As many tiles as fill rounds of all multiprocessors go to one cluster each. For
// those that are left there would be a round in which most multiprocessors have nothing to do; so each of them is
// shared by clusters that take a part of the other side, as many as there are multiprocessors for, and their sums are
// added.
struct HopperRounds {
  int64_t whole = 0;   // tiles of one cluster
  int64_t shared = 0;  // tiles, after those, of `splits` clusters each
  int64_t splits = 1;
  int64_t steps = 0;   // that a cluster takes of a tile that is shared; the last one takes what is left, at least one

  constexpr int64_t clusters() const { return whole + shared * splits; }
  constexpr int64_t parts() const { return splits == 1 ? 0 : shared * splits; }  // sums that are written to memory
};

// For L own positions and K of the other side.
HopperRounds hopper_rounds(int64_t B, int64_t C, int64_t L, int64_t K, int64_t multiprocessors);

// fp32 numbers that a part takes in memory: the sums of its blocks, [64, 512] each, and maximum and sum of every row.
constexpr int64_t kHopperSums = int64_t{kHopperRows} * kHopperChannels;
constexpr int64_t kHopperPart = kHopperBlocks * (kHopperSums + 2 * kHopperRows);

// How many blocks share the other side for one tile of the gradient of query or key, for `L` positions of their own
// side and `K` of the other. Such that rounds of blocks are full; each leaves a sum of its own, so there are few.
int64_t position_splits(int64_t B, int64_t L, int64_t K, int64_t D, Dtype dtype, int64_t multiprocessors);

}  // namespace danet
