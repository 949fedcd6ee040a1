// Tiles of the Hopper kernels of position attention, what a block has in shared memory, and which tile it computes.
#pragma once

#include "cuda/plan.h"
#include "ptx/tma.cuh"
#include "sm90/position_attention_schedule.h"

namespace danet {

struct HopperTiles {
  static constexpr int kRows = kHopperRows;  // positions that a block owns
  static constexpr int kD = 64;           // channels of query and key, filled up with zeros
  static constexpr int kColumns = kHopperColumns;  // positions of the other side that a step takes
  static constexpr int kHalf = 32;        // of them: those that one block loads, and one warpgroup makes weights of
  static constexpr int kChannels = kHopperChannels;  // of the values, of a block
  static constexpr int kOwn = 256;        // of them: those of one warpgroup
  static constexpr int kLine = 64;        // elements of a line of a tile: 128 bytes
  static constexpr int kDepth = 16;       // of one product
  static constexpr int kThreads = 3 * 128;
  static constexpr int kAttending = 2 * 128;
  static constexpr int kLoader = 2;       // the warpgroup of the loader, after those that attend
  static constexpr int kTileBytes = kRows * kLine * 2;            // of own positions, of others, of weights
  static constexpr int kPieceBytes = kOwn * kColumns * 2;         // of values for one warpgroup
  static constexpr int kGroupBytes = 8 * kLine * 2;               // eight lines: the swizzle repeats
  static constexpr int kAlignment = kGroupBytes;
  static constexpr int kRegisters = 232, kLoaderRegisters = 40;
  static_assert(kRows == kLine && kColumns == kLine && kD == kLine, "all tiles but those of values are alike");
  static_assert(2 * kHalf == kColumns && 2 * kOwn == kChannels, "two warpgroups, two blocks");
  static_assert(PositionForwardSchedule::kClusterBlocks == kHopperBlocks, "the plan counts clusters");
  static_assert(kColumns % kDepth == 0 && kD % kDepth == 0, "whole products");
  static_assert(2 * 128 * kRegisters + 128 * kLoaderRegisters <= 65536, "the registers of a multiprocessor");
};

// Both sides and the values: L own positions, K of the other side. channels_last: [B, positions, channels].
struct HopperOperands {
  TensorMap own;     // [B, D, L]; tiles of 64 x 64
  TensorMap other;   // [B, D, K]; tiles of 64 x 32, in channels_last of 32 x 64
  TensorMap values;  // [B, C, K]; tiles of 128 x 64, in channels_last of 64 x 64
  int C, L, K;
  bool channels_last;
  int whole, splits, steps;  // HopperRounds
  float* parts;              // kHopperPart numbers for each part of a tile that is shared
};

struct HopperSharedMemory {
  using Tiles = HopperTiles;
  using Schedule = PositionForwardSchedule;

  alignas(Tiles::kAlignment) char values[Schedule::kValueSlots][Tiles::kPieceBytes];  // [256, 64], or 4 x [64, 64]
  char weights[Schedule::kWeightSlots][Tiles::kTileBytes];  // [64, 64]; the last one first has the own positions
  char other[Schedule::kKeySlots][Tiles::kTileBytes];       // 2 x [64, 32], or [64, 64] in channels_last
  float maximum[Schedule::kReaders][Tiles::kRows];
  float sum[Schedule::kReaders][Tiles::kRows];
  Barrier own_full;
  Barrier other_full[Schedule::kKeySlots], other_empty[Schedule::kKeySlots];
  Barrier values_full[Schedule::kValueSlots], values_empty[Schedule::kValueSlots];

  // With what it may take to reach the first boundary.
  static constexpr int bytes();

  DANET_DEVICE Barrier* full(Ring ring, int slot) {
    return ring == Ring::kQuery ? &own_full : ring == Ring::kKey ? &other_full[slot] : &values_full[slot];
  }
  DANET_DEVICE Barrier* empty(Ring ring, int slot) {
    return ring == Ring::kKey ? &other_empty[slot] : &values_empty[slot];
  }
};

constexpr int HopperSharedMemory::bytes() {
  constexpr int kMost = 232448;  // bytes that a block may have on sm_90
  static_assert(sizeof(HopperSharedMemory) + Tiles::kAlignment <= kMost, "a block must fit");
  return static_cast<int>(sizeof(HopperSharedMemory)) + Tiles::kAlignment;
}

// The place of a block.
struct HopperTile {
  int first_position, first_channel, batch, rank;
  int first_other;  // position of the other side
  int steps;
  float* sums;      // [64, 512] of this block in its part, or [512, 64] in NCHW; nullptr: the tile is not shared
};

// The tile with this number.
DANET_DEVICE HopperTile hopper_tile(const HopperOperands& p, int64_t number, int rank) {
  constexpr int kClusterRows = kHopperBlocks * kHopperRows;
  const int position_tiles = (p.L + kClusterRows - 1) / kClusterRows;
  const int channel_tiles = (p.C + kHopperChannels - 1) / kHopperChannels;
  const int first_position = static_cast<int>(number % position_tiles) * kClusterRows + rank * kHopperRows;
  const int first_channel = static_cast<int>(number / position_tiles % channel_tiles) * kHopperChannels;
  return {first_position, first_channel, static_cast<int>(number / position_tiles / channel_tiles), rank, 0,
          (p.K + kHopperColumns - 1) / kHopperColumns, nullptr};
}

// That of a cluster, or its part of one.
DANET_DEVICE HopperTile hopper_tile_of_cluster(const HopperOperands& p, int64_t cluster, int rank) {
  if (cluster < p.whole || p.splits == 1) return hopper_tile(p, cluster, rank);
  const int64_t part = cluster - p.whole;
  const int first_step = static_cast<int>(part % p.splits) * p.steps;
  HopperTile tile = hopper_tile(p, p.whole + part / p.splits, rank);
  tile.first_other = first_step * kHopperColumns;
  tile.steps = tile.steps - first_step < p.steps ? tile.steps - first_step : p.steps;
  tile.sums = p.parts + part * kHopperPart + rank * kHopperSums;
  return tile;
}

// [64, 2] of a block in its part: maximum and sum of every row.
DANET_DEVICE float* hopper_statistics(float* sums, int rank) {
  return sums + (kHopperBlocks - rank) * kHopperSums + rank * (2 * kHopperRows);
}

}  // namespace danet
