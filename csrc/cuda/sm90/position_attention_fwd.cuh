// Forward of position attention on Hopper: out = gamma attn + residual, attn_i = sum_j softmax_j(scale q_i . k_j) v_j, for
// 16-bit types and D <= 64. One pass over the keys with an online softmax (docs/math.md). The order of all that waits is
// in position_attention_schedule.h; here is what is done.
#pragma once

#include <cmath>

#include "cuda/sm90/position_attention_schedule.h"
#include "ptx/mma.cuh"
#include "ptx/tma.cuh"
#include "ptx/wgmma.cuh"
#include "sm80/parameters.cuh"

namespace danet {

struct HopperTiles {
  static constexpr int kRows = 64;        // queries of a block
  static constexpr int kD = 64;           // channels of query and key, filled up with zeros
  static constexpr int kColumns = 64;     // keys of a step
  static constexpr int kHalf = 32;        // of them: those that one block loads, and one warpgroup makes weights of
  static constexpr int kChannels = 512;   // of value, of a block
  static constexpr int kOwn = 256;        // of them: those of one warpgroup
  static constexpr int kLine = 64;        // elements of a line of a tile: 128 bytes
  static constexpr int kThreads = 3 * 128;
  static constexpr int kAttending = 2 * 128;
  static constexpr int kLoader = 2;       // the warpgroup of the loader, after those that attend
  static constexpr int kTileBytes = kRows * kLine * 2;            // of queries, of weights, of keys
  static constexpr int kPieceBytes = kOwn * kColumns * 2;         // of values for one warpgroup
  static constexpr int kGroupBytes = 8 * kLine * 2;               // eight lines: the swizzle repeats
  static constexpr int kAlignment = kGroupBytes;
  static constexpr int kRegisters = 240, kLoaderRegisters = 24;
  static_assert(kRows == kLine && kColumns == kLine && kD == kLine, "tiles of queries, keys and weights are alike");
  static_assert(2 * kHalf == kColumns && 2 * kOwn == kChannels, "two warpgroups, two blocks");
  static_assert(2 * 128 * kRegisters + 128 * kLoaderRegisters <= 65536, "the registers of a multiprocessor");
};

template <class T>
struct HopperForwardParameters {
  TensorMap query;             // [B, D, M], or [B, M, D] in channels_last; tiles of 64 x 64
  TensorMap key;               // [B, D, N]; tiles of 64 x 32, or [B, N, D] of 32 x 64
  TensorMap value;             // [B, C, N]; tiles of 128 x 64, or [B, N, C] of 64 x 64
  Elements<const T> residual;  // [B, C, M], optional
  Elements<T> out;             // [B, C, M]
  Elements<float> attn;        // [B, C, M], optional
  float* lse;                  // [B, M]
  Gamma gamma;
  float scale;
  int C, M, N;
  bool channels_last;
};

struct HopperForwardSharedMemory {
  using Tiles = HopperTiles;
  using Schedule = PositionForwardSchedule;

  alignas(Tiles::kAlignment) char value[Schedule::kValueSlots][Tiles::kPieceBytes];  // [256, 64] or 4 x [64, 64]
  char weights[Schedule::kWeightSlots][Tiles::kTileBytes];  // [64 queries, 64 keys]; the last one first has the queries
  char key[Schedule::kKeySlots][Tiles::kTileBytes];         // 2 x [64, 32], or [64, 64] in channels_last
  float maximum[Schedule::kReaders][Tiles::kRows];
  float sum[Schedule::kReaders][Tiles::kRows];
  Barrier query_full;
  Barrier key_full[Schedule::kKeySlots], key_empty[Schedule::kKeySlots];
  Barrier value_full[Schedule::kValueSlots], value_empty[Schedule::kValueSlots];

  // With what it may take to reach the first boundary.
  static constexpr int bytes();

  DANET_DEVICE Barrier* full(Ring ring, int slot) {
    return ring == Ring::kQuery ? &query_full : ring == Ring::kKey ? &key_full[slot] : &value_full[slot];
  }
  DANET_DEVICE Barrier* empty(Ring ring, int slot) {
    return ring == Ring::kKey ? &key_empty[slot] : &value_empty[slot];
  }
};

constexpr int HopperForwardSharedMemory::bytes() {
  constexpr int kMost = 232448;  // bytes that a block may have on sm_90
  static_assert(sizeof(HopperForwardSharedMemory) + Tiles::kAlignment <= kMost, "a block must fit");
  return static_cast<int>(sizeof(HopperForwardSharedMemory)) + Tiles::kAlignment;
}

// The place of a block.
struct HopperForwardTile {
  int first_query, first_channel, batch, rank;
};

// Actions of the loader, which is one thread.
template <class T, bool kChannelsLast>
struct HopperForwardLoader {
  using Tiles = HopperTiles;
  static constexpr int kBoth = 3;  // blocks of the cluster, as bits

  const HopperForwardParameters<T>& p;
  HopperForwardSharedMemory& memory;
  HopperForwardTile tile;

  DANET_DEVICE void wait_empty(Ring ring, int slot, int parity) { wait_for_phase(memory.empty(ring, slot), parity); }

  DANET_DEVICE void load(Ring ring, int slot, int piece) {
    Barrier* const full = memory.full(ring, slot);
    const auto at = [](int channel, int position) {  // element and line
      return kChannelsLast ? Position{channel, position} : Position{position, channel};
    };
    if (ring == Ring::kQuery) {
      arrive_and_expect(full, Tiles::kTileBytes);
      const Position from = at(0, tile.first_query);
      load_tile(memory.weights[PositionForwardSchedule::kWeightSlots - 1], p.query, from.element, from.line, tile.batch,
                full);
    } else if (ring == Ring::kKey) {
      arrive_and_expect(full, Tiles::kTileBytes);
      const Position from = at(0, piece * Tiles::kColumns + tile.rank * Tiles::kHalf);
      load_tile(memory.key[slot] + tile.rank * (Tiles::kTileBytes / 2), p.key, from.element, from.line, tile.batch,
                full, kBoth);
    } else {
      constexpr int kShare = Tiles::kOwn / 2;  // channels that a block loads
      constexpr int kLoads = kChannelsLast ? kShare / Tiles::kLine : 1;
      arrive_and_expect(full, Tiles::kPieceBytes);
      char* const to = memory.value[slot] + tile.rank * (Tiles::kPieceBytes / 2);
      const int channel = tile.first_channel + piece % 2 * Tiles::kOwn + tile.rank * kShare;
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        const Position from = at(channel + i * Tiles::kLine, piece / 2 * Tiles::kColumns);
        load_tile(to + i * (Tiles::kPieceBytes / 2 / kLoads), p.value, from.element, from.line, tile.batch, full, kBoth);
      }
    }
  }

 private:
  struct Position { int element, line; };
};

// Actions of a warpgroup that attends.
template <class T, bool kChannelsLast>
struct HopperForwardReader {
  using Tiles = HopperTiles;
  static constexpr int kDepth = 16;  // of one product

  const HopperForwardParameters<T>& p;
  HopperForwardSharedMemory& memory;
  const HopperForwardTile& tile;
  int warpgroup;
  int left;                          // keys that are left, from this warpgroup's half of the step on
  uint32_t query[Tiles::kD / kDepth][4];
  float logits[Tiles::kHalf / 2];    // [64, 32]
  float acc[Tiles::kOwn / 2];        // [64, 256]
  float m[2], l[2], shrink[2];       // of rows lane / 4 and eight below; l of the own columns

  DANET_DEVICE HopperForwardReader(const HopperForwardParameters<T>& parameters, HopperForwardSharedMemory& shared,
                                   const HopperForwardTile& place, int number)
      : p(parameters), memory(shared), tile(place), warpgroup(number), left(parameters.N - number * Tiles::kHalf) {
#pragma unroll
    for (int i = 0; i < Tiles::kOwn / 2; ++i) acc[i] = 0.0f;
    m[0] = m[1] = -infinity();
    l[0] = l[1] = 0.0f;
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
      ldmatrix_x4(query[d], address, !kChannelsLast);
    }
  }

  DANET_DEVICE void begin_logits(int slot) {
    constexpr int kLineBytes = kChannelsLast ? 2 * Tiles::kLine : 2 * Tiles::kHalf;
    constexpr int kNext = kChannelsLast ? 2 * kDepth : kDepth * kLineBytes;  // bytes to the next depths
    const char* half = memory.key[slot] + warpgroup * (Tiles::kTileBytes / 2);
    const uint64_t key = shared_matrix<kLineBytes>(half, 8 * kLineBytes, kDepth);
    begin_products();
#pragma unroll
    for (int d = 0; d < Tiles::kD / kDepth; ++d) {
      multiply_64x32x16<T, !kChannelsLast>(logits, query[d], shared_matrix_after(key, d * kNext), d > 0);
    }
    commit_products();
  }

  DANET_DEVICE void begin_sum(int weight_slot, int value_slot) {
    constexpr int kNext = kChannelsLast ? kDepth * 2 * Tiles::kLine : 2 * kDepth;
    constexpr int kBlockBytes = kChannelsLast ? Tiles::kColumns * 2 * Tiles::kLine : kDepth;  // of 64 channels
    const uint64_t weights = shared_matrix<128>(memory.weights[weight_slot], Tiles::kGroupBytes, kDepth);
    const uint64_t value = shared_matrix<128>(memory.value[value_slot], Tiles::kGroupBytes, kBlockBytes);
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

  // The maximum of this half of the row, for both warpgroups.
  DANET_DEVICE void share_maximum() {
#pragma unroll
    for (int c = 0; c < Tiles::kHalf / 8; ++c) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int column = 8 * c + lane() % 4 * 2 + e % 2;
        logits[4 * c + e] = column < left ? logits[4 * c + e] * p.scale : -infinity();
      }
    }
    left -= Tiles::kColumns;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      shrink[half] = m[half];
#pragma unroll
      for (int c = 0; c < Tiles::kHalf / 8; ++c) {
        m[half] = fmaxf(m[half], fmaxf(logits[4 * c + 2 * half], logits[4 * c + 2 * half + 1]));
      }
      m[half] = fmaxf(m[half], shuffle_xor(m[half], 1));
      m[half] = fmaxf(m[half], shuffle_xor(m[half], 2));
      if (lane() % 4 == 0) memory.maximum[warpgroup][row() + 8 * half] = m[half];
    }
  }

  // Logits become exp(logit - m), rounded. The maximum comes off before the change to base 2: logits in the thousands
  // would lose digits on the way there.
  DANET_DEVICE void weigh(int slot) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      m[half] = fmaxf(m[half], memory.maximum[1 - warpgroup][row() + 8 * half]);
      const float safe_m = m[half] == -infinity() ? 0.0f : m[half];  // no inf - inf before the first finite logit
      shrink[half] = exp2_fast((shrink[half] - safe_m) * kLog2e);
      l[half] *= shrink[half];
#pragma unroll
      for (int c = 0; c < Tiles::kHalf / 8; ++c) {
#pragma unroll
        for (int e = 2 * half; e < 2 * half + 2; ++e) {
          logits[4 * c + e] = exp2_fast((logits[4 * c + e] - safe_m) * kLog2e);
          l[half] += logits[4 * c + e];
        }
      }
    }
    char* const tile = memory.weights[slot];
#pragma unroll
    for (int c = 0; c < Tiles::kHalf / 8; c += 2) {
      const float* s = &logits[4 * c];
      const uint32_t registers[4] = {pack<T>(s[0], s[1]), pack<T>(s[2], s[3]), pack<T>(s[4], s[5]), pack<T>(s[6], s[7])};
      stmatrix_x4(piece(tile, 16 * warp() + lane() % 16, warpgroup * (Tiles::kHalf / 8) + c + lane() / 16), registers);
    }
    fence_async_proxy();
  }

  // Maxima stay as they are most of the time, once some keys have been seen.
  DANET_DEVICE void rescale() {
    if (!any_lane(shrink[0] != 1.0f || shrink[1] != 1.0f)) return;
#pragma unroll
    for (int i = 0; i < Tiles::kOwn / 2; ++i) acc[i] *= shrink[i / 2 % 2];
  }

  // Of the own columns of whole rows, for both warpgroups.
  DANET_DEVICE void share_sums() {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      l[half] += shuffle_xor(l[half], 1);
      l[half] += shuffle_xor(l[half], 2);
      if (lane() % 4 == 0) memory.sum[warpgroup][row() + 8 * half] = l[half];
    }
  }

  // Results of a warpgroup, in lines as tensors have them.
  static constexpr int kLines = kChannelsLast ? Tiles::kRows : Tiles::kOwn;
  static constexpr int kLength = kChannelsLast ? Tiles::kOwn : Tiles::kRows;
  static constexpr int kLine = kLength + (kChannelsLast ? 8 : 4);  // keeps what a warp writes apart in the banks
  static_assert(2 * kLines * kLine * 4 <= PositionForwardSchedule::kValueSlots * Tiles::kPieceBytes,
                "fits in the memory of the values");

  DANET_DEVICE float* results() { return reinterpret_cast<float*>(memory.value[0]) + warpgroup * kLines * kLine; }

  // attn = acc / l, lse = m + ln(l). A row with a logit of +inf is NaN throughout, and so is its lse: l is NaN there.
  DANET_DEVICE void collect_results() {
    float* const lines = results();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int r = row() + 8 * half, query_index = tile.first_query + r;
      const float sum = memory.sum[0][r] + memory.sum[1][r], inverse = 1.0f / sum;
      if (warpgroup == 0 && tile.first_channel == 0 && lane() % 4 == 0 && query_index < p.M) {
        p.lse[static_cast<int64_t>(tile.batch) * p.M + query_index] = m[half] + logf(sum);
      }
#pragma unroll
      for (int c = 0; c < Tiles::kOwn / 8; ++c) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int channel = 8 * c + lane() % 4 * 2 + e;
          lines[kChannelsLast ? r * kLine + channel : channel * kLine + r] = acc[4 * c + 2 * half + e] * inverse;
        }
      }
    }
  }

  // out = gamma attn + residual, a warp to a line.
  DANET_DEVICE void store_results() {
    const float* const lines = results();
    const float gamma = p.gamma.load();
    for (int line = warp(); line < kLines; line += 4) {
#pragma unroll 2
      for (int element = lane(); element < kLength; element += 32) {
        const int channel = tile.first_channel + warpgroup * Tiles::kOwn + (kChannelsLast ? element : line);
        const int query_index = tile.first_query + (kChannelsLast ? line : element);
        if (channel >= p.C || query_index >= p.M) continue;
        float result = lines[line * kLine + element];
        if (p.attn.data != nullptr) *p.attn.at(tile.batch, channel, query_index) = result;
        result *= gamma;
        if (p.residual.data != nullptr) result += to_float(*p.residual.at(tile.batch, channel, query_index));
        *p.out.at(tile.batch, channel, query_index) = from_float<T>(result);
      }
    }
  }
};

template <class T, bool kChannelsLast>
DANET_DEVICE void hopper_forward_load(const HopperForwardParameters<T>& p, HopperForwardSharedMemory& memory,
                                      const HopperForwardTile& tile, int steps) {
  HopperForwardLoader<T, kChannelsLast> loader{p, memory, tile};
  load_pieces(loader, steps);
}

template <class T, bool kChannelsLast>
DANET_DEVICE void hopper_forward_attend(const HopperForwardParameters<T>& p, HopperForwardSharedMemory& memory,
                                        const HopperForwardTile& tile, int steps, int warpgroup) {
  HopperForwardReader<T, kChannelsLast> reader(p, memory, tile, warpgroup);
  attend(reader, steps, warpgroup);
}

// Grid: blocks of M, made even * blocks of C * B. Each block owns 64 queries and 512 channels of one batch element, each
// of its warpgroups that attend half of the channels. The two blocks of a cluster have neighbouring queries.
template <class T>
DANET_CLUSTER_KERNEL(HopperTiles::kThreads, PositionForwardSchedule::kClusterBlocks)
position_attention_hopper_forward_kernel(DANET_PARAMETER HopperForwardParameters<T> p) {
  using Tiles = HopperTiles;
  using Schedule = PositionForwardSchedule;

  // 1. Which tile.
  constexpr int kClusterRows = Schedule::kClusterBlocks * Tiles::kRows;
  const int query_blocks = (p.M + kClusterRows - 1) / kClusterRows * Schedule::kClusterBlocks;
  const int channel_blocks = (p.C + Tiles::kChannels - 1) / Tiles::kChannels;
  const int steps = (p.N + Tiles::kColumns - 1) / Tiles::kColumns;
  const HopperForwardTile tile{static_cast<int>(block_index() % query_blocks) * Tiles::kRows,
                               static_cast<int>(block_index() / query_blocks % channel_blocks) * Tiles::kChannels,
                               static_cast<int>(block_index() / query_blocks / channel_blocks), cluster_rank()};
  auto& memory =
      *reinterpret_cast<HopperForwardSharedMemory*>(align_shared(shared_memory(), HopperTiles::kAlignment));

  // 2. Barriers, for both blocks before either uses them.
  if (thread_index() == 0) {
    init_barrier(&memory.query_full, 1);
    for (int slot = 0; slot < Schedule::kKeySlots; ++slot) {
      init_barrier(&memory.key_full[slot], 1);
      init_barrier(&memory.key_empty[slot], Schedule::kKeyArrivals);
    }
    for (int slot = 0; slot < Schedule::kValueSlots; ++slot) {
      init_barrier(&memory.value_full[slot], 1);
      init_barrier(&memory.value_empty[slot], Schedule::kValueArrivals);
    }
    fence_barrier_init();
  }
  synchronize_cluster();

  // 3. Each to its role.
  const int warpgroup = thread_index() / 128;
  if (warpgroup == Tiles::kLoader) {
    give_registers<Tiles::kLoaderRegisters>();
    if (thread_index() == Tiles::kLoader * 128) {
      if (p.channels_last) {
        hopper_forward_load<T, true>(p, memory, tile, steps);
      } else {
        hopper_forward_load<T, false>(p, memory, tile, steps);
      }
    }
  } else {
    take_registers<Tiles::kRegisters>();
    if (p.channels_last) {
      hopper_forward_attend<T, true>(p, memory, tile, steps, warpgroup);
    } else {
      hopper_forward_attend<T, false>(p, memory, tile, steps, warpgroup);
    }
  }

  // 4. Nobody leaves while the other block may still send to this one's barriers.
  synchronize_cluster();
}

}  // namespace danet
