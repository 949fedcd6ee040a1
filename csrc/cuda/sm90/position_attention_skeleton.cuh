// The skeleton of the Hopper kernels of position attention, for 16-bit types and D <= 64. A block owns 64 positions of
// one side of the map and 512 channels, and runs over the positions of the other side: acc = W(own other^T) values^T,
// where W makes weights of logits. The forward owns queries; the gradient of value owns keys, and its values are dout.
// The order of all that waits is in position_attention_schedule.h; here is what is done.
#pragma once

#include "ptx/mma.cuh"
#include "ptx/wgmma.cuh"
#include "sm80/parameters.cuh"
#include "sm90/position_attention_tiles.cuh"

namespace danet {

// Actions of the loader, which is one thread.
template <bool kChannelsLast>
struct HopperLoader {
  using Tiles = HopperTiles;
  static constexpr int kBoth = 3;  // blocks of the cluster, as bits

  const HopperOperands& p;
  HopperSharedMemory& memory;
  HopperTile tile;

  DANET_DEVICE void wait_empty(Ring ring, int slot, int parity) { wait_for_phase(memory.empty(ring, slot), parity); }

  DANET_DEVICE void load(Ring ring, int slot, int piece) {
    Barrier* const full = memory.full(ring, slot);
    const auto at = [](int channel, int position) {  // element and line
      return kChannelsLast ? Position{channel, position} : Position{position, channel};
    };
    if (ring == Ring::kQuery) {
      arrive_and_expect(full, Tiles::kTileBytes);
      const Position from = at(0, tile.first_position);
      load_tile(memory.weights[PositionForwardSchedule::kWeightSlots - 1], p.own, from.element, from.line, tile.batch,
                full);
    } else if (ring == Ring::kKey) {
      arrive_and_expect(full, Tiles::kTileBytes);
      const Position from = at(0, tile.first_other + piece * Tiles::kColumns + tile.rank * Tiles::kHalf);
      load_tile(memory.other[slot] + tile.rank * (Tiles::kTileBytes / 2), p.other, from.element, from.line, tile.batch,
                full, kBoth);
    } else {
      constexpr int kShare = Tiles::kOwn / 2;  // channels that a block loads
      constexpr int kLoads = kChannelsLast ? kShare / Tiles::kLine : 1;
      arrive_and_expect(full, Tiles::kPieceBytes);
      char* const to = memory.values[slot] + tile.rank * (Tiles::kPieceBytes / 2);
      const int channel = tile.first_channel + piece % 2 * Tiles::kOwn + tile.rank * kShare;
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        const Position from = at(channel + i * Tiles::kLine, tile.first_other + piece / 2 * Tiles::kColumns);
        load_tile(to + i * (Tiles::kPieceBytes / 2 / kLoads), p.values, from.element, from.line, tile.batch, full,
                  kBoth);
      }
    }
  }

 private:
  struct Position { int element, line; };
};

// Actions of a warpgroup that attends that all kernels share; the rest is in those that derive from it.
template <class T, bool kChannelsLast>
struct HopperReader {
  using Tiles = HopperTiles;
  static constexpr int kDepth = Tiles::kDepth;

  HopperSharedMemory& memory;
  const HopperTile& tile;
  int warpgroup;
  int left;                          // positions that are left, from this warpgroup's half of the step on
  uint32_t own[Tiles::kD / kDepth][4];
  float logits[Tiles::kHalf / 2];    // [64, 32]
  float acc[Tiles::kOwn / 2];        // [64, 256]

  DANET_DEVICE HopperReader(int positions, HopperSharedMemory& shared, const HopperTile& place, int number)
      : memory(shared), tile(place), warpgroup(number), left(positions - place.first_other - number * Tiles::kHalf) {
#pragma unroll
    for (int i = 0; i < Tiles::kOwn / 2; ++i) acc[i] = 0.0f;
  }

  static DANET_DEVICE int lane() { return thread_index() % 32; }
  static DANET_DEVICE int warp() { return thread_index() / 32 % 4; }
  static DANET_DEVICE int row() { return 16 * warp() + lane() / 4; }  // and eight below

  // The address of 16 bytes of a line of 128.
  static DANET_DEVICE char* piece(char* tile, int line, int number) {
    return tile + line * (2 * Tiles::kLine) + ((number ^ line % 8) << 4);
  }

  DANET_DEVICE void wait_full(Ring ring, int slot, int parity) { wait_for_phase(memory.full(ring, slot), parity); }

  DANET_DEVICE void leave(Ring ring, int slot) {
    if (lane() < PositionForwardSchedule::kClusterBlocks) arrive_at_rank(memory.empty(ring, slot), lane());
  }

  DANET_DEVICE void meet() { synchronize_some<Tiles::kAttending>(1); }

  DANET_DEVICE void take_queries(int slot) {
    char* const tile = memory.weights[slot];
#pragma unroll
    for (int d = 0; d < Tiles::kD / kDepth; ++d) {
      const char* address = kChannelsLast
                                ? piece(tile, 16 * warp() + lane() % 16, 2 * d + lane() / 16)
                                : piece(tile, kDepth * d + lane() % 8 + lane() / 16 * 8, 2 * warp() + lane() / 8 % 2);
      ldmatrix_x4(own[d], address, !kChannelsLast);
    }
  }

  DANET_DEVICE void begin_logits(int slot) {
    constexpr int kLineBytes = kChannelsLast ? 2 * Tiles::kLine : 2 * Tiles::kHalf;
    constexpr int kNext = kChannelsLast ? 2 * kDepth : kDepth * kLineBytes;  // bytes to the next depths
    const char* half = memory.other[slot] + warpgroup * (Tiles::kTileBytes / 2);
    const uint64_t key = shared_matrix<kLineBytes>(half, 8 * kLineBytes, kDepth);
    begin_products();
#pragma unroll
    for (int d = 0; d < Tiles::kD / kDepth; ++d) {
      multiply_64x32x16<T, !kChannelsLast>(logits, own[d], shared_matrix_after(key, d * kNext), d > 0);
    }
    commit_products();
  }

  DANET_DEVICE void begin_sum(int weight_slot, int value_slot) {
    constexpr int kNext = kChannelsLast ? kDepth * 2 * Tiles::kLine : 2 * kDepth;
    constexpr int kBlockBytes = kChannelsLast ? Tiles::kColumns * 2 * Tiles::kLine : kDepth;  // of 64 channels
    const uint64_t weights = shared_matrix<128>(memory.weights[weight_slot], Tiles::kGroupBytes, kDepth);
    const uint64_t value = shared_matrix<128>(memory.values[value_slot], Tiles::kGroupBytes, kBlockBytes);
    begin_products();
#pragma unroll
    for (int d = 0; d < Tiles::kColumns / kDepth; ++d) {
      multiply_64x256x16<T, kChannelsLast>(acc, shared_matrix_after(weights, d * 2 * kDepth),
                                           shared_matrix_after(value, d * kNext));
    }
    commit_products();
  }

  template <int kPending>
  DANET_DEVICE void finish_products() { wait_for_products<kPending>(); }

  // Column of logits[i] within this warpgroup's half of the step, and the row: lane / 4, or eight below.
  static DANET_DEVICE int column(int i) { return i / 4 * 8 + lane() % 4 * 2 + i % 2; }
  static DANET_DEVICE int half_of(int i) { return i / 2 % 2; }

  // The logits, which have become weights, rounded and for both warpgroups.
  DANET_DEVICE void share_weights(int slot) {
    char* const weights = memory.weights[slot];
#pragma unroll
    for (int c = 0; c < Tiles::kHalf / 8; c += 2) {
      const float* s = &logits[4 * c];
      const uint32_t registers[4] = {pack<T>(s[0], s[1]), pack<T>(s[2], s[3]), pack<T>(s[4], s[5]),
                                     pack<T>(s[6], s[7])};
      const int number = warpgroup * (Tiles::kHalf / 8) + c + lane() / 16;
      stmatrix_x4(piece(weights, 16 * warp() + lane() % 16, number), registers);
    }
    fence_async_proxy();
  }

  // Results of a warpgroup in shared memory, in lines as tensors have them.
  static constexpr int kLines = kChannelsLast ? Tiles::kRows : Tiles::kOwn;
  static constexpr int kLength = kChannelsLast ? Tiles::kOwn : Tiles::kRows;
  static constexpr int kLine = kLength + (kChannelsLast ? 8 : 4);  // keeps what a warp writes apart in the banks
  static_assert(2 * kLines * kLine * 4 <= PositionForwardSchedule::kValueSlots * Tiles::kPieceBytes,
                "fits in the memory of the values");

  DANET_DEVICE float* results() { return reinterpret_cast<float*>(memory.values[0]) + warpgroup * kLines * kLine; }

  // The sums of the rows of one half, times a factor, to shared memory.
  DANET_DEVICE void collect(int half, float factor) {
    float* const lines = results();
    const int r = row() + 8 * half;
#pragma unroll
    for (int c = 0; c < Tiles::kOwn / 8; ++c) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int channel = 8 * c + lane() % 4 * 2 + e;
        lines[kChannelsLast ? r * kLine + channel : channel * kLine + r] = acc[4 * c + 2 * half + e] * factor;
      }
    }
  }

  // The same to the memory of a part; sums outside of the tensor stay what they are.
  DANET_DEVICE void store_part(int C, int L) {
    for_results(C, L, [&](int channel, int position, float result) {
      const int c = channel - tile.first_channel, r = position - tile.first_position;
      tile.sums[kChannelsLast ? r * Tiles::kChannels + c : c * Tiles::kRows + r] = result;
    });
  }

  // Calls store(channel, position, result) for what was collected inside of [C, L], a warp to a line.
  template <class Store>
  DANET_DEVICE void for_results(int C, int L, const Store& store) {
    const float* const lines = results();
    for (int line = warp(); line < kLines; line += 4) {
#pragma unroll 2
      for (int element = lane(); element < kLength; element += 32) {
        const int channel = tile.first_channel + warpgroup * Tiles::kOwn + (kChannelsLast ? element : line);
        const int position = tile.first_position + (kChannelsLast ? line : element);
        if (channel < C && position < L) store(channel, position, lines[line * kLine + element]);
      }
    }
  }
};

template <bool kChannelsLast>
DANET_DEVICE void hopper_load(const HopperOperands& operands, HopperSharedMemory& memory, const HopperTile& tile,
                              int steps) {
  HopperLoader<kChannelsLast> loader{operands, memory, tile};
  load_pieces(loader, steps);
}

template <class Reader, class Parameters>
DANET_DEVICE void hopper_attend(const Parameters& p, HopperSharedMemory& memory, const HopperTile& tile, int steps,
                                int warpgroup) {
  Reader reader(p, memory, tile, warpgroup);
  attend(reader, steps, warpgroup);
}

// The body of a kernel whose grid is two blocks for each cluster of HopperRounds. They have neighbouring positions.
// Reader<T, kChannelsLast> are the actions of a warpgroup that attends.
template <class T, template <class, bool> class Reader, class Parameters>
DANET_DEVICE void hopper_body(const Parameters& p) {
  using Tiles = HopperTiles;
  using Schedule = PositionForwardSchedule;

  // 1. Which tile.
  const HopperOperands& operands = p.operands;
  const HopperTile tile = hopper_tile_of_cluster(operands, block_index() / kHopperBlocks, cluster_rank());
  const int steps = p.is_zero() ? 0 : tile.steps;
  auto& memory = *reinterpret_cast<HopperSharedMemory*>(align_shared(shared_memory(), Tiles::kAlignment));

  // 2. Barriers, for both blocks before either uses them.
  if (thread_index() == 0) {
    init_barrier(&memory.own_full, 1);
    for (int slot = 0; slot < Schedule::kKeySlots; ++slot) {
      init_barrier(&memory.other_full[slot], 1);
      init_barrier(&memory.other_empty[slot], Schedule::kKeyArrivals);
    }
    for (int slot = 0; slot < Schedule::kValueSlots; ++slot) {
      init_barrier(&memory.values_full[slot], 1);
      init_barrier(&memory.values_empty[slot], Schedule::kValueArrivals);
    }
    fence_barrier_init();
  }
  synchronize_cluster();

  // 3. Each to its role.
  const int warpgroup = thread_index() / 128;
  if (warpgroup == Tiles::kLoader) {
    give_registers<Tiles::kLoaderRegisters>();
    if (thread_index() == Tiles::kLoader * 128) {
      if (operands.channels_last) {
        hopper_load<true>(operands, memory, tile, steps);
      } else {
        hopper_load<false>(operands, memory, tile, steps);
      }
    }
  } else {
    take_registers<Tiles::kRegisters>();
    if (operands.channels_last) {
      hopper_attend<Reader<T, true>>(p, memory, tile, steps, warpgroup);
    } else {
      hopper_attend<Reader<T, false>>(p, memory, tile, steps, warpgroup);
    }
  }

  // 4. Nobody leaves while the other block may still send to this one's barriers.
  synchronize_cluster();
}

}  // namespace danet
