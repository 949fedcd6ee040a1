// The last step of channel attention on Hopper, products over channels, for 16-bit types:
//   out = gamma P x + x;  dx = dout + gamma [P^T dout + (dG + dG^T) x]
// Here is what its two kernels have in common (channel_attention_fwd.cuh, channel_attention_bwd.cuh); the order of all
// that waits is in channel_attention_schedule.h.
#pragma once

#include "cuda/sm90/channel_attention_loader.cuh"
#include "ptx/wgmma_channel.cuh"

namespace danet {

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
    if (lane_index() == 0) arrive(&memory.empty[slot]);
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
    constexpr int kBlockBytes = kChannelsLast ? Tiles::kDepth : Tiles::kBoxBytes;  // of 64 positions
    return shared_matrix<128>(memory.values[slot], Tiles::kGroupBytes, kBlockBytes);
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
