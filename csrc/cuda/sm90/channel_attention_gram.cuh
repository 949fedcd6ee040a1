// The first step of channel attention on Hopper, sums over positions: G = x x^T, and in the backward H = dout x^T, for
// 16-bit types. The partial sums lie as those of sm80/channel_attention_gram.cuh, and the same kernels add them up. The
// order of all that waits is in channel_attention_schedule.h; here is what is done.
#pragma once

#include "cuda/sm90/channel_attention_schedule.h"
#include "ptx/cluster.cuh"
#include "ptx/tma.cuh"
#include "ptx/wgmma_channel.cuh"
#include "sm80/channel_attention_tiles.cuh"

namespace danet {

struct HopperGramTiles {
  static constexpr int kLine = 64;                                  // elements of a line of a tile: 128 bytes
  static constexpr int kPositions = ChannelGramSchedule::kPositions;
  static constexpr int kRows = kChannelTile / ChannelSchedule::kReaders;  // of G or H, of a warpgroup
  static constexpr int kDepth = 16;                                 // of one product
  static constexpr int kThreads = ChannelSchedule::kReaders * 128 + 32;
  static constexpr int kLoader = ChannelSchedule::kReaders * 128;   // the thread that loads
  static constexpr int kTileBytes = kChannelTile * kPositions * 2;
  static constexpr int kHalfBytes = kTileBytes / 2;                 // 64 channels
  static constexpr int kGroupBytes = 8 * kLine * 2;                 // eight lines: the swizzle repeats
  static_assert(kRows == kLine && kPositions == kLine, "64 channels are a box in either layout");
  static_assert(kChannelSplitMultiple % kPositions == 0, "splits are whole steps");
};

template <class T>
struct HopperGramParameters {
  TensorMap x;     // [B, C, N]; tiles of 128 x 64, or [B, N, C] in channels_last; tiles of 64 x 64
  TensorMap dout;  // likewise; goes unused where only G is needed
  float* partial;  // [B, tiles, splits, kChannelTile, kChannelTile]: tiles of G, then of H
  int C, N;
  int splits;
  int split_positions;  // a multiple of kChannelSplitMultiple
  bool has_dout;
  bool channels_last;  // how the operands lie
};

struct HopperGramSharedMemory {
  using Tiles = HopperGramTiles;
  using Schedule = ChannelGramSchedule;

  alignas(Tiles::kGroupBytes) char left[Schedule::kSlots][Tiles::kTileBytes];  // [128, 64], or 2 x [64, 64]
  char right[Schedule::kSlots][Tiles::kTileBytes];  // likewise; empty on the diagonal of G, where left is both
  Barrier full[Schedule::kSlots], empty[Schedule::kSlots];

  static constexpr int bytes();  // with what it may take to reach the first boundary
};

constexpr int HopperGramSharedMemory::bytes() {
  constexpr int kMost = 232448;  // bytes that a block may have on sm_90
  static_assert(sizeof(HopperGramSharedMemory) + Tiles::kGroupBytes <= kMost, "a block must fit");
  return static_cast<int>(sizeof(HopperGramSharedMemory)) + Tiles::kGroupBytes;
}

// The part of a block. Tiles of G come column after column, then those of H row after row.
struct HopperGramTile {
  bool is_gram;
  int row, column;  // of tiles
  int batch;
  int first;        // position
  int steps;

  template <class T>
  DANET_DEVICE explicit HopperGramTile(const HopperGramParameters<T>& p) {
    const int blocks = tiles_along(p.C);
    const int tiles = gram_tiles(blocks) + (p.has_dout ? blocks * blocks : 0);
    const int split = static_cast<int>(block_index() % p.splits);
    const int tile = static_cast<int>(block_index() / p.splits % tiles);
    batch = static_cast<int>(block_index() / p.splits / tiles);
    is_gram = tile < gram_tiles(blocks);
    row = (tile - gram_tiles(blocks)) / blocks, column = (tile - gram_tiles(blocks)) % blocks;
    if (is_gram) {
      column = 0;
      while (gram_tiles(column + 1) <= tile) ++column;
      row = tile - gram_tiles(column);
    }
    first = split * p.split_positions;
    const int positions = p.N - first < p.split_positions ? p.N - first : p.split_positions;
    steps = (positions + HopperGramTiles::kPositions - 1) / HopperGramTiles::kPositions;
  }

  DANET_DEVICE bool one_operand() const { return is_gram && row == column; }  // on the diagonal of G
};

// Actions of the loader, which is one thread.
template <class T, bool kChannelsLast>
struct HopperGramLoader {
  using Tiles = HopperGramTiles;

  const HopperGramParameters<T>& p;
  HopperGramSharedMemory& memory;
  const HopperGramTile& tile;

  DANET_DEVICE void wait_empty(int slot, int parity) { wait_for_phase(&memory.empty[slot], parity); }

  DANET_DEVICE void load(int slot, int step) {
    Barrier* const full = &memory.full[slot];
    const int position = tile.first + step * Tiles::kPositions;
    arrive_and_expect(full, tile.one_operand() ? Tiles::kTileBytes : 2 * Tiles::kTileBytes);
    load_rows(memory.left[slot], tile.is_gram ? p.x : p.dout, tile.row * kChannelTile, position, full);
    if (!tile.one_operand()) load_rows(memory.right[slot], p.x, tile.column * kChannelTile, position, full);
  }

 private:
  DANET_DEVICE void load_rows(char* to, const TensorMap& map, int channel, int position, Barrier* full) {
    if (kChannelsLast) {
      load_tile(to, map, channel, position, tile.batch, full);
      load_tile(to + Tiles::kHalfBytes, map, channel + Tiles::kLine, position, tile.batch, full);
    } else {
      load_tile(to, map, position, channel, tile.batch, full);
    }
  }
};

// Actions of a warpgroup that multiplies.
template <class T, bool kChannelsLast>
struct HopperGramReader {
  using Tiles = HopperGramTiles;
  static constexpr int kSums = Tiles::kRows * kChannelTile / 128;  // of a thread

  HopperGramSharedMemory& memory;
  const HopperGramTile& tile;
  int warpgroup;
  float acc[kSums];    // [64, 128]: the sum that tensor cores are at
  float total[kSums];  // [64, 128]: those before it

  DANET_DEVICE HopperGramReader(HopperGramSharedMemory& shared, const HopperGramTile& place, int number)
      : memory(shared), tile(place), warpgroup(number) {
#pragma unroll
    for (int i = 0; i < kSums; ++i) acc[i] = total[i] = 0.0f;
  }

  DANET_DEVICE void wait_full(int slot, int parity) { wait_for_phase(&memory.full[slot], parity); }

  DANET_DEVICE void leave(int slot) {
    if (lane_index() == 0) arrive(&memory.empty[slot]);
  }

  // Either way that lines run, 64 channels are half of a tile, and where the own rows begin.
  DANET_DEVICE void begin_product(int slot) {
    constexpr int kNext = kChannelsLast ? Tiles::kDepth * 2 * Tiles::kLine : 2 * Tiles::kDepth;  // bytes to next depths
    const char* const columns = tile.one_operand() ? memory.left[slot] : memory.right[slot];
    const uint64_t a = shared_matrix<128>(memory.left[slot] + warpgroup * Tiles::kHalfBytes, Tiles::kGroupBytes,
                                          Tiles::kHalfBytes);
    const uint64_t b = shared_matrix<128>(columns, Tiles::kGroupBytes, Tiles::kHalfBytes);
    begin_products();
#pragma unroll
    for (int d = 0; d < Tiles::kPositions / Tiles::kDepth; ++d) {
      multiply_64x128x16<T, kChannelsLast, kChannelsLast>(acc, shared_matrix_after(a, d * kNext),
                                                          shared_matrix_after(b, d * kNext));
    }
    commit_products();
  }

  template <int kPending>
  DANET_DEVICE void finish_products() { wait_for_products<kPending>(); }

  DANET_DEVICE void end_sum() {
#pragma unroll
    for (int i = 0; i < kSums; ++i) {
      total[i] += acc[i];
      acc[i] = 0.0f;
    }
  }

  // target [kChannelTile, kChannelTile]: each element belongs to one thread of one block; four lanes write a sector.
  DANET_DEVICE void write(float* target) const {
    const int row = warpgroup * Tiles::kRows + warp_index() % 4 * 16;
#pragma unroll
    for (int c = 0; c < kChannelTile / 8; ++c) {
#pragma unroll
      for (int e = 0; e < 4; e += 2) {
        float* const address = target + (row + accumulator_row(e)) * kChannelTile + 8 * c + accumulator_column(e);
        *reinterpret_cast<Several<float, 2>*>(address) = {{total[4 * c + e], total[4 * c + e + 1]}};
      }
    }
  }
};

template <class T, bool kChannelsLast>
DANET_DEVICE void channel_attention_hopper_gram(const HopperGramParameters<T>& p, HopperGramSharedMemory& memory,
                                                const HopperGramTile& tile) {
  if (thread_index() >= HopperGramTiles::kLoader) {
    if (thread_index() != HopperGramTiles::kLoader) return;
    HopperGramLoader<T, kChannelsLast> loader{p, memory, tile};
    fill_ring<ChannelGramSchedule>(loader, tile.steps);
  } else {
    HopperGramReader<T, kChannelsLast> reader(memory, tile, thread_index() / 128);
    sum_over_positions<ChannelGramSchedule>(reader, tile.steps);
    reader.write(p.partial + block_index() * (kChannelTile * kChannelTile));
  }
}

// Partial sums of G on and above the diagonal, and of all of H.
// Grid: (splits * tiles * B). Each block owns one tile and sums over split_positions, each of its warpgroups that
// multiply 64 of its rows. A block is a cluster of its own.
template <class T>
DANET_CLUSTER_KERNEL(HopperGramTiles::kThreads, 1)
channel_attention_hopper_gram_kernel(DANET_PARAMETER HopperGramParameters<T> p) {
  // 1. Which tile.
  const HopperGramTile tile(p);
  auto& memory =
      *reinterpret_cast<HopperGramSharedMemory*>(align_shared(shared_memory(), HopperGramTiles::kGroupBytes));

  // 2. Barriers.
  if (thread_index() == 0) {
    for (int slot = 0; slot < ChannelGramSchedule::kSlots; ++slot) {
      init_barrier(&memory.full[slot], 1);
      init_barrier(&memory.empty[slot], ChannelGramSchedule::kArrivals);
    }
    fence_barrier_init();
  }
  synchronize();

  // 3. Each to its role.
  if (p.channels_last) {
    channel_attention_hopper_gram<T, true>(p, memory, tile);
  } else {
    channel_attention_hopper_gram<T, false>(p, memory, tile);
  }
}

}  // namespace danet
