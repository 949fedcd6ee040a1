// Gradient of value on Hopper: dv_j = gamma sum_i P_ij dout_i, P_ij = exp(scale q_i . k_j - lse_i), for 16-bit types
// and D <= 64. The forward's way with keys and queries in each other's place, and no maximum to find out.
#pragma once

#include "sm90/position_attention_skeleton.cuh"

namespace danet {

template <class T>
struct HopperDvalueParameters {
  HopperOperands operands;  // key [B, D, N], query [B, D, M], dout [B, C, M]
  const float* lse;         // [B, M]
  Elements<T> dvalue;       // [B, C, N]
  Gamma gamma;
  float scale;

  DANET_DEVICE bool is_zero() const { return gamma.load() == 0.0f; }
};

template <class T, bool kChannelsLast>
struct HopperDvalueReader : HopperReader<T, kChannelsLast> {
  using Base = HopperReader<T, kChannelsLast>;
  using Tiles = HopperTiles;
  using Base::column, Base::left, Base::logits, Base::tile;

  const HopperDvalueParameters<T>& p;
  const float* lse;  // of the first query of this warpgroup's half of the step

  DANET_DEVICE HopperDvalueReader(const HopperDvalueParameters<T>& parameters, HopperSharedMemory& shared,
                                  const HopperTile& place, int number)
      : Base(parameters.operands.K, shared, place, number),
        p(parameters),
        lse(p.lse + static_cast<int64_t>(place.batch) * p.operands.K + place.first_other + number * Tiles::kHalf) {}

  DANET_DEVICE void share_maximum() {}
  DANET_DEVICE void rescale() {}
  DANET_DEVICE void share_sums() {}

  // Logits [keys, queries] become P. Queries past the end have none.
  DANET_DEVICE void weigh(int slot) {
#pragma unroll
    for (int i = 0; i < Tiles::kHalf / 2; ++i) {
      const float row_lse = column(i) < left ? lse[column(i)] : 0.0f;
      const float logit = column(i) < left ? logits[i] * p.scale : -infinity();
      logits[i] = exp2_fast((logit - row_lse) * kLog2e);
    }
    left -= Tiles::kColumns;
    lse += Tiles::kColumns;
    Base::share_weights(slot);
  }

  DANET_DEVICE void collect_results() {
    const float factor = tile.sums == nullptr ? p.gamma.load() : 1.0f;
#pragma unroll
    for (int half = 0; half < 2; ++half) Base::collect(half, factor);
  }

  DANET_DEVICE void store_results() {
    if (tile.sums != nullptr) return Base::store_part(p.operands.C, p.operands.L);
    Base::for_results(p.operands.C, p.operands.L, [&](int channel, int key_index, float result) {
      *p.dvalue.at(tile.batch, channel, key_index) = from_float<T>(result);
    });
  }
};

// Grid: two blocks for each cluster of HopperRounds. Each block owns 64 keys and 512 channels of one batch element,
// each of its warpgroups that attend half of the channels; of a tile that is shared, for a part of the queries.
template <class T>
DANET_CLUSTER_KERNEL(HopperTiles::kThreads, PositionForwardSchedule::kClusterBlocks)
position_attention_hopper_dvalue_kernel(DANET_PARAMETER HopperDvalueParameters<T> p) {
  hopper_body<T, HopperDvalueReader>(p);
}

}  // namespace danet
