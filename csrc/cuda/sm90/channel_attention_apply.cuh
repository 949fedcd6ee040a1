// The last step of channel attention on Hopper, products over channels, for 16-bit types:
//   out = gamma P x + x;  dx = dout + gamma [P^T dout + (dG + dG^T) x]
// Here is what its two kernels have in common (channel_attention_fwd.cuh, channel_attention_bwd.cuh); the order of all
// that waits is in channel_attention_schedule.h.
#pragma once

#include "cuda/sm90/channel_attention_schedule.h"
#include "ptx/tma.cuh"
#include "ptx/wgmma_channel.cuh"
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

// Actions of a warpgroup that multiplies. Its weights are P, without the division by the sum of its rows, or in the
// backward P^T, with it: made from logits as the operand registers of the thread hold them, and stored nowhere. G is
// symmetric, so P^T[c, d] comes from the logits at [c, d] too, with the statistics of row d.
template <class T, bool kChannelsLast, bool kBackward>
struct HopperApplyReader {
  using Tiles = HopperApplyTiles;
  static constexpr int kProducts = Tiles::kChannels / Tiles::kDepth;     // of a step
  static constexpr int kSums = Tiles::kRows * Tiles::kPositions / 128;   // of a thread

  const HopperApplyParameters<T>& p;
  HopperApplySharedMemory& memory;
  const HopperApplyTile& tile;
  int warpgroup;
  float acc[kSums];                          // [64 channels, 256 positions]
  Several<float, 2> logits[kProducts][4];    // [64 channels, 64], as `weights`
  uint32_t weights[kProducts][4];            // [64 channels, 64]
  float row_m[2];                            // of rows lane / 4 and eight below; forward only
  float m[2], l[2];                          // of columns lane and lane + 32; backward only

  DANET_DEVICE HopperApplyReader(const HopperApplyParameters<T>& parameters, HopperApplySharedMemory& shared,
                                 const HopperApplyTile& place, int number)
      : p(parameters), memory(shared), tile(place), warpgroup(number) {
#pragma unroll
    for (int i = 0; i < kSums; ++i) acc[i] = 0.0f;
    if constexpr (!kBackward) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        row_m[half] = channel(half) < p.C ? p.row_max[tile.statistics + channel(half)] : 0.0f;
      }
    }
  }

  static DANET_DEVICE int row(int half) { return warp_index() % 4 * 16 + lane_index() / 4 + 8 * half; }
  DANET_DEVICE int channel(int half) const { return tile.first_channel + warpgroup * Tiles::kRows + row(half); }

  DANET_DEVICE void wait_full(int slot, int parity) { wait_for_phase(&memory.full[slot], parity); }

  DANET_DEVICE void leave(int slot) {
    if (lane_index() == 0) arrive_at_rank(&memory.empty[slot], 0);
  }

  DANET_DEVICE void meet() { synchronize_some<Tiles::kMultiplying>(kMeeting); }

  // Four lanes read a sector of a row. Logits past the end of a row are -inf in memory.
  DANET_DEVICE void fetch_logits(int step) {
    const int first = step * Tiles::kChannels;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const bool inside = channel(half) < p.C;
      const float* const line = p.logits + (tile.statistics + channel(half)) * tile.row_length + first;
#pragma unroll
      for (int i = 0; i < 2 * kProducts; ++i) {
        Several<float, 2>& pair = logits[i / 2][i % 2 * 2 + half];
        pair = {{-infinity(), -infinity()}};
        if (inside) pair = *reinterpret_cast<const Several<float, 2>*>(line + 8 * i + lane_index() % 4 * 2);
      }
    }
    if constexpr (kBackward) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int column = first + lane_index() + 32 * i;
        m[i] = column < p.C ? p.row_max[tile.statistics + column] : 0.0f;
        l[i] = column < p.C ? p.row_sum[tile.statistics + column] : 1.0f;
      }
    }
  }

  // The maximum comes off before the change to base 2: logits in the thousands would lose digits on the way there.
  DANET_DEVICE void make_weights() {
    HopperColumn* const columns = memory.columns[warp_index()];
    if constexpr (kBackward) {
      meet_in_warp();  // all lanes have read those of the step before
#pragma unroll
      for (int i = 0; i < 2; ++i) columns[lane_index() + 32 * i] = {m[i], 1.0f / l[i]};
      meet_in_warp();
    }
#pragma unroll
    for (int i = 0; i < 2 * kProducts; ++i) {
      HopperColumn pair[2];
      if constexpr (kBackward) {
        const Several<HopperColumn, 2>* const from = reinterpret_cast<const Several<HopperColumn, 2>*>(columns + 8 * i);
        const Several<HopperColumn, 2> both = from[lane_index() % 4];
        pair[0] = both.elements[0], pair[1] = both.elements[1];
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float(&s)[2] = logits[i / 2][i % 2 * 2 + half].elements;
        float weight[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          weight[e] = kBackward ? exp2_fast((s[e] - pair[e].m) * kLog2e) * pair[e].inverse
                                : exp2_fast((s[e] - row_m[half]) * kLog2e);
        }
        weights[i / 2][i % 2 * 2 + half] = pack<T>(weight[0], weight[1]);
      }
    }
  }

  DANET_DEVICE void begin_formed_product(int slot) {
    const uint64_t values = values_of(slot);
    begin_products();
#pragma unroll
    for (int d = 0; d < kProducts; ++d) {
      multiply_registers_64x256x16<T, !kChannelsLast>(acc, weights[d], shared_matrix_after(values, d * kNext));
    }
    commit_products();
  }

  // Rows of dgram are magnified for fp16: those of the sum so far become so too.
  DANET_DEVICE void begin_stored_sum() {
    const float factors[2] = {magnify(0), magnify(1)};
#pragma unroll
    for (int i = 0; i < kSums; ++i) acc[i] *= factors[i / 2 % 2];
  }

  DANET_DEVICE void begin_stored_product(int slot) {
    const uint64_t values = values_of(slot);
    const uint64_t own = shared_matrix<128>(memory.weights[slot] + warpgroup * (Tiles::kWeightsBytes / 2),
                                            Tiles::kGroupBytes, Tiles::kDepth);
    begin_products();
#pragma unroll
    for (int d = 0; d < kProducts; ++d) {
      multiply_64x256x16<T, !kChannelsLast>(acc, shared_matrix_after(own, d * 2 * Tiles::kDepth),
                                            shared_matrix_after(values, d * kNext));
    }
    commit_products();
  }

  template <int kPending>
  DANET_DEVICE void finish_products() { wait_for_products<kPending>(); }

  // Results of a warpgroup, in lines as the tensors have them.
  static constexpr int kLines = kChannelsLast ? Tiles::kPositions : Tiles::kRows;
  static constexpr int kLength = kChannelsLast ? Tiles::kRows : Tiles::kPositions;
  static constexpr int kResultLine = kLength + (kChannelsLast ? 4 : 8);  // keeps what a warp writes apart in the banks
  static_assert(ChannelSchedule::kReaders * kLines * kResultLine * 4 <=
                    HopperApplySharedMemory::kSlots * (Tiles::kValuesBytes + Tiles::kWeightsBytes),
                "fits in the memory of the ring");

  DANET_DEVICE void collect_results() {
    float* const lines = results();
    float strength[2];
    find_strength(strength);
#pragma unroll
    for (int i = 0; i < kSums; ++i) {
      const int half = i / 2 % 2, position = i / 4 * 8 + lane_index() % 4 * 2 + i % 2;
      lines[kChannelsLast ? position * kResultLine + row(half) : row(half) * kResultLine + position] =
          acc[i] * strength[half];
    }
  }

  // out = result + residual, eight elements at a time.
  DANET_DEVICE void store_results() {
    constexpr int kPiece = 8, kPieces = kLength / kPiece;
    const float* const lines = results();
#pragma unroll 2
    for (int i = thread_index() % 128; i < kLines * kPieces; i += 128) {
      const int line = i / kPieces, element = i % kPieces * kPiece;
      const int c = tile.first_channel + warpgroup * Tiles::kRows + (kChannelsLast ? element : line);
      const int n = tile.first_position + (kChannelsLast ? line : element);
      if (c >= p.C || n >= p.N) continue;
      const float* const from = lines + line * kResultLine + element;
      const int left = kChannelsLast ? p.C - c : p.N - n;
      if (p.wide && left >= kPiece) {
        store_piece(from, c, n);
      } else {
        for (int e = 0; e < kPiece && e < left; ++e) {
          const int own_c = kChannelsLast ? c + e : c, own_n = kChannelsLast ? n : n + e;
          float result = from[e];
          if (p.residual.data != nullptr) result += to_float(*p.residual.at(tile.batch, own_c, own_n));
          *p.out.at(tile.batch, own_c, own_n) = from_float<T>(result);
        }
      }
    }
  }

 private:
  static constexpr int kMeeting = 1;  // named barriers: this one, and one for each warp
  static constexpr int kNext = kChannelsLast ? 2 * Tiles::kDepth : Tiles::kDepth * 2 * Tiles::kLine;  // bytes

  static DANET_DEVICE void meet_in_warp() { synchronize_some<32>(kMeeting + 1 + warp_index()); }

  DANET_DEVICE uint64_t values_of(int slot) const {  // [64, 256]
    return shared_matrix<128>(memory.values[slot], Tiles::kGroupBytes, kChannelsLast ? Tiles::kDepth : Tiles::kBoxBytes);
  }

  DANET_DEVICE float magnify(int half) const {
    return p.magnify != nullptr && channel(half) < p.C ? p.magnify[tile.statistics + channel(half)] : 1.0f;
  }

  // The factors of sums on the way to the result.
  DANET_DEVICE void find_strength(float (&strength)[2]) const {
    const float gamma = p.gamma.load();
    if (kBackward && gamma == 0.0f) {
      // The result is known, unless a row of the map is NaN: then it is NaN as well.
      float spoiled = 0.0f;  // or NaN
      for (int c = lane_index(); c < p.C; c += 32) spoiled += p.delta[tile.statistics + c] * 0.0f;
      strength[0] = strength[1] = warp_sum(spoiled);
      return;
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if constexpr (kBackward) {
        strength[half] = 1.0f / magnify(half) * gamma;
      } else {
        const bool inside = channel(half) < p.C;
        strength[half] = inside ? 1.0f / p.row_sum[tile.statistics + channel(half)] * gamma : 0.0f;
      }
    }
  }

  DANET_DEVICE float* results() const {
    return reinterpret_cast<float*>(memory.values[0]) + warpgroup * kLines * kResultLine;
  }

  DANET_DEVICE void store_piece(const float* from, int c, int n) {
    const auto* const low = reinterpret_cast<const Several<float, 4>*>(from);
    const Several<float, 4> parts[2] = {low[0], low[1]};
    Several<T, 8> residual{};
    if (p.residual.data != nullptr) {
      residual = *reinterpret_cast<const Several<T, 8>*>(p.residual.at(tile.batch, c, n));
    }
    Several<T, 8> result;
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      float value = parts[e / 4].elements[e % 4];
      if (p.residual.data != nullptr) value += to_float(residual.elements[e]);
      result.elements[e] = from_float<T>(value);
    }
    *reinterpret_cast<Several<T, 8>*>(p.out.at(tile.batch, c, n)) = result;
  }
};

template <class T, bool kChannelsLast, bool kBackward>
DANET_DEVICE void channel_attention_hopper_apply(const HopperApplyParameters<T>& p, HopperApplySharedMemory& memory) {
  const HopperApplyTile tile(p, kBackward);
  if (thread_index() >= HopperApplyTiles::kLoader) {
    give_registers<HopperApplyTiles::kLoaderRegisters>();
    if (thread_index() != HopperApplyTiles::kLoader) return;
    HopperApplyLoader<T, kChannelsLast> loader{p, memory, tile};
    fill_ring<ChannelApplySchedule>(loader, tile.formed_steps + tile.stored_steps);
  } else {
    take_registers<HopperApplyTiles::kRegisters>();
    HopperApplyReader<T, kChannelsLast, kBackward> reader(p, memory, tile, thread_index() / 128);
    sum_over_channels<ChannelApplySchedule>(reader, tile.formed_steps, tile.stored_steps);
  }
}

// The body of both kernels.
template <class T, bool kBackward>
DANET_DEVICE void channel_attention_hopper_apply(const HopperApplyParameters<T>& p) {
  // 1. Barriers.
  auto& memory =
      *reinterpret_cast<HopperApplySharedMemory*>(align_shared(shared_memory(), HopperApplyTiles::kGroupBytes));
  if (thread_index() == 0) {
    for (int slot = 0; slot < ChannelApplySchedule::kSlots; ++slot) {
      init_barrier(&memory.full[slot], 1);
      init_barrier(&memory.empty[slot], ChannelApplySchedule::kArrivals);
    }
    fence_barrier_init();
  }
  synchronize();

  // 2. Each to its role.
  if (p.channels_last) {
    channel_attention_hopper_apply<T, true, kBackward>(p, memory);
  } else {
    channel_attention_hopper_apply<T, false, kBackward>(p, memory);
  }
}

}  // namespace danet
