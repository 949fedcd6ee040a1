// Forward of position attention on Hopper: out = gamma attn + residual, attn_i = sum_j softmax_j(scale q_i . k_j) v_j,
// for 16-bit types and D <= 64. One pass over the keys with an online softmax (docs/math.md).
#pragma once

#include <cmath>

#include "sm90/position_attention_skeleton.cuh"

namespace danet {

template <class T>
struct HopperForwardParameters {
  HopperOperands operands;     // query [B, D, M], key [B, D, N], value [B, C, N]
  Elements<const T> residual;  // [B, C, M], optional
  Elements<T> out;             // [B, C, M]
  Elements<float> attn;        // [B, C, M], optional
  float* lse;                  // [B, M]
  Gamma gamma;
  float scale;

  DANET_DEVICE bool is_zero() const { return false; }
};

template <class T, bool kChannelsLast>
struct HopperForwardReader : HopperReader<T, kChannelsLast> {
  using Base = HopperReader<T, kChannelsLast>;
  using Tiles = HopperTiles;
  using Base::acc, Base::left, Base::logits, Base::memory, Base::tile, Base::warpgroup;
  using Base::column, Base::half_of, Base::lane, Base::row;

  const HopperForwardParameters<T>& p;
  float m[2], l[2], shrink[2];  // of rows lane / 4 and eight below; l of the own columns

  DANET_DEVICE HopperForwardReader(const HopperForwardParameters<T>& parameters, HopperSharedMemory& shared,
                                   const HopperTile& place, int number)
      : Base(parameters.operands.K, shared, place, number), p(parameters) {
    m[0] = m[1] = -infinity();
    l[0] = l[1] = 0.0f;
  }

  // The maximum of this half of the row, for both warpgroups.
  DANET_DEVICE void share_maximum() {
#pragma unroll
    for (int i = 0; i < Tiles::kHalf / 2; ++i) logits[i] = column(i) < left ? logits[i] * p.scale : -infinity();
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

  // Logits become exp(logit - m). The maximum comes off before the change to base 2: logits in the thousands would lose
  // digits on the way there.
  DANET_DEVICE void weigh(int slot) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      m[half] = fmaxf(m[half], memory.maximum[1 - warpgroup][row() + 8 * half]);
      const float safe_m = m[half] == -infinity() ? 0.0f : m[half];  // no inf - inf before the first finite logit
      shrink[half] = exp2_fast((shrink[half] - safe_m) * kLog2e);
      l[half] *= shrink[half];
#pragma unroll
      for (int i = 0; i < Tiles::kHalf / 2; ++i) {
        if (half_of(i) != half) continue;
        logits[i] = exp2_fast((logits[i] - safe_m) * kLog2e);
        l[half] += logits[i];
      }
    }
    Base::share_weights(slot);
  }

  // Maxima stay as they are most of the time, once some keys have been seen.
  DANET_DEVICE void rescale() {
    if (!any_lane(shrink[0] != 1.0f || shrink[1] != 1.0f)) return;
#pragma unroll
    for (int i = 0; i < Tiles::kOwn / 2; ++i) acc[i] *= shrink[half_of(i)];
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

  // attn = acc / l, lse = m + ln(l). A row with a logit of +inf is NaN throughout, and so is its lse: l is NaN there.
  DANET_DEVICE void collect_results() {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int r = row() + 8 * half, query_index = tile.first_position + r;
      const float sum = memory.sum[0][r] + memory.sum[1][r];
      if (tile.sums != nullptr) {
        float* const statistics = hopper_statistics(tile.sums, tile.rank) + 2 * r;
        if (warpgroup == 0 && lane() % 4 == 0) statistics[0] = m[half], statistics[1] = sum;
        Base::collect(half, 1.0f);
        continue;
      }
      if (warpgroup == 0 && tile.first_channel == 0 && lane() % 4 == 0 && query_index < p.operands.L) {
        p.lse[static_cast<int64_t>(tile.batch) * p.operands.L + query_index] = m[half] + logf(sum);
      }
      Base::collect(half, 1.0f / sum);
    }
  }

  DANET_DEVICE void store_results() {
    if (tile.sums != nullptr) return Base::store_part(p.operands.C, p.operands.L);
    const float gamma = p.gamma.load();
    Base::for_results(p.operands.C, p.operands.L, [&](int channel, int query_index, float result) {
      if (p.attn.data != nullptr) *p.attn.at(tile.batch, channel, query_index) = result;
      result *= gamma;
      if (p.residual.data != nullptr) result += to_float(*p.residual.at(tile.batch, channel, query_index));
      *p.out.at(tile.batch, channel, query_index) = from_float<T>(result);
    });
  }
};

// Grid: two blocks for each cluster of HopperRounds. Each block owns 64 queries and 512 channels of one batch element,
// each of its warpgroups that attend half of the channels; of a tile that is shared, for a part of the keys.
template <class T>
DANET_CLUSTER_KERNEL(HopperTiles::kThreads, PositionForwardSchedule::kClusterBlocks)
position_attention_hopper_forward_kernel(DANET_PARAMETER HopperForwardParameters<T> p) {
  hopper_body<T, HopperForwardReader>(p);
}

}  // namespace danet
