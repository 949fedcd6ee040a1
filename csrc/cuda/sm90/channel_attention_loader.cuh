// What the last step of channel attention on Hopper reads, where it keeps it, and the thread that loads it; what is done
// with it is in channel_attention_apply.cuh.
#pragma once

#include "cuda/sm90/channel_attention_schedule.h"
#include "ptx/cluster.cuh"
#include "ptx/tma.cuh"
#include "sm80/channel_attention_tiles.cuh"

namespace danet {

struct HopperApplyTiles {
  static constexpr int kChannels = ChannelApplySchedule::kChannels;  // of a step
  static constexpr int kLine = 64;                          // elements of a line of a tile: 128 bytes
  static constexpr int kRows = kChannelTile / ChannelSchedule::kReaders;  // channels of the result, of a warpgroup
  static constexpr int kPositions = kChannelPositions;      // of the result
  static constexpr int kDepth = 16;                         // of one product
  static constexpr int kMultiplying = ChannelSchedule::kReaders * 128;
  static constexpr int kLoader = kMultiplying;              // the thread that loads, in a warpgroup of its own
  static constexpr int kThreads = kMultiplying + 128;
  static constexpr int kRegisters = 240, kLoaderRegisters = 24;
  static constexpr int kValuesBytes = kChannels * kPositions * 2;
  static constexpr int kBoxBytes = kChannels * kLine * 2;   // 64 channels x 64 positions
  static constexpr int kWeightsBytes = kChannelTile * kChannels * 2;
  static constexpr int kGroupBytes = 8 * kLine * 2;         // eight lines: the swizzle repeats
  static_assert(kMultiplying * kRegisters + 128 * kLoaderRegisters <= 65536, "the registers of a multiprocessor");
  static_assert(kChannels == kLine && kRows == kLine, "a step is one line of weights");
  static_assert(kChannelTile % kChannels == 0, "rows of the matrices are whole steps");
};

// What both kernels read. `formed` are the values that the weights made from logits multiply: x, in the backward dout.
template <class T>
struct HopperApplyParameters {
  TensorMap formed;            // [B, C, N]; tiles of 64 x 64, or [B, N, C] in channels_last; tiles of 256 x 64
  TensorMap x;                 // likewise; backward only
  TensorMap dgram;             // [B, C, C]: dG + dG^T, its rows magnified; tiles of 128 x 64; backward only
  Elements<const T> residual;  // [B, C, N], optional
  Elements<T> out;             // [B, C, N]: out, or dx
  const float* logits;         // [B, C, row_length], past the end of its rows -inf
  const float* row_max;        // [B, C]
  const float* row_sum;        // [B, C]
  const float* delta;          // [B, C]; backward only
  const float* magnify;        // [B, C], optional
  Gamma gamma;
  int C, N;
  bool channels_last;  // how the values lie
  bool wide;           // whether lines of residual and out begin on 16-byte boundaries
};

// m and 1 / l of a column of P^T.
struct HopperColumn { float m, inverse; };

struct HopperApplySharedMemory {
  using Tiles = HopperApplyTiles;
  static constexpr int kSlots = ChannelApplySchedule::kSlots;

  alignas(Tiles::kGroupBytes) char values[kSlots][Tiles::kValuesBytes];  // 4 x [64, 64], or [256, 64]
  char weights[kSlots][Tiles::kWeightsBytes];                            // [128, 64] of dgram; backward only
  alignas(16) HopperColumn columns[Tiles::kMultiplying / 32][Tiles::kChannels];  // of every warp
  Barrier full[kSlots], empty[kSlots];

  static constexpr int bytes();  // with what it may take to reach the first boundary
};

constexpr int HopperApplySharedMemory::bytes() {
  constexpr int kMost = 232448;  // bytes that a block may have on sm_90
  static_assert(sizeof(HopperApplySharedMemory) + Tiles::kGroupBytes <= kMost, "a block must fit");
  return static_cast<int>(sizeof(HopperApplySharedMemory)) + Tiles::kGroupBytes;
}

// The part of a block: which tile of the result, and how many steps it takes.
struct HopperApplyTile {
  int batch, first_channel, first_position;
  int formed_steps, stored_steps;
  int64_t statistics;  // where those of the batch element begin
  int row_length;      // of the matrices [C, C]

  template <class T>
  DANET_DEVICE HopperApplyTile(const HopperApplyParameters<T>& p, bool backward) {
    const int channel_blocks = tiles_along(p.C);
    const int position_blocks = (p.N + HopperApplyTiles::kPositions - 1) / HopperApplyTiles::kPositions;
    batch = static_cast<int>(block_index() / channel_blocks / position_blocks);
    first_channel = static_cast<int>(block_index() % channel_blocks) * kChannelTile;
    first_position = static_cast<int>(block_index() / channel_blocks % position_blocks) * HopperApplyTiles::kPositions;
    statistics = int64_t{batch} * p.C;
    row_length = channel_blocks * kChannelTile;
    const int steps = (p.C + HopperApplyTiles::kChannels - 1) / HopperApplyTiles::kChannels;
    const bool known = backward && p.gamma.load() == 0.0f;  // then dx is: nothing to sum
    formed_steps = known ? 0 : steps;
    stored_steps = known || !backward ? 0 : steps;
  }
};

// Actions of the loader, which is one thread.
template <class T, bool kChannelsLast>
struct HopperApplyLoader {
  using Tiles = HopperApplyTiles;

  const HopperApplyParameters<T>& p;
  HopperApplySharedMemory& memory;
  const HopperApplyTile& tile;

  DANET_DEVICE void wait_empty(int slot, int parity) { wait_for_phase(&memory.empty[slot], parity); }

  DANET_DEVICE void load(int slot, int step) {
    Barrier* const full = &memory.full[slot];
    const bool stored = step >= tile.formed_steps;
    const TensorMap& values = stored ? p.x : p.formed;
    const int channel = (stored ? step - tile.formed_steps : step) * Tiles::kChannels;
    arrive_and_expect(full, stored ? Tiles::kValuesBytes + Tiles::kWeightsBytes : Tiles::kValuesBytes);
    if (stored) load_tile(memory.weights[slot], p.dgram, channel, tile.first_channel, tile.batch, full);
    if constexpr (kChannelsLast) {
      load_tile(memory.values[slot], values, channel, tile.first_position, tile.batch, full);
    } else {
#pragma unroll
      for (int i = 0; i < Tiles::kPositions / Tiles::kLine; ++i) {
        const int position = tile.first_position + i * Tiles::kLine;
        load_tile(memory.values[slot] + i * Tiles::kBoxBytes, values, position, channel, tile.batch, full);
      }
    }
  }
};

}  // namespace danet
