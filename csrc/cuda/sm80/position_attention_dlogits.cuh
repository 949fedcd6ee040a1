// Gradients of key and query, through dS_ij = P_ij (dout_i . v_j - delta_i):
//     dk_j = gamma scale sum_i dS_ij q_i;  dq_i = gamma scale sum_j dS_ij k_j
// One kernel for both: a block owns positions of one side of the map and runs over those of the other.
#pragma once

#include "cuda/plan.h"
#include "sm80/parameters.cuh"

namespace danet {

template <class T>
struct PositionDlogitsParameters {
  Operand<T> own;           // [B, D, L]: key, or query if not own_keys
  Operand<T> other;         // [B, D, K]: query, or key
  Operand<T> own_values;    // [B, C, L]: value, or dout
  Operand<T> other_values;  // [B, C, K]: dout, or value
  const float* lse;         // [B, M]
  const float* delta;       // [B, M]
  const float* magnify;     // a power of two that keeps dS inside the range of fp16, in device memory; or nullptr
  float* sums;              // [splits, B, D, L]: the gradient of own, summed over the positions of one split
  float* other_sums;        // [B, D, K], zero-filled: that of other is added to it, in any order; or nullptr
  Gamma gamma;
  float scale;
  int64_t B;
  int split_length;  // positions of other that a split has
  bool own_keys;
  bool precise;  // fp32: whether products other than the scores are computed as well as in fp32
  bool channels_last;
};

// Two stages of a ring, each with kBlockC channels of both sides, and dS.
template <class T, bool kChannelsLast>
struct PositionDlogitsSharedMemory {
  using Tiles = PositionTiles<T>;
  static_assert(Tiles::kBlockC == kBlockD, "products over C and over D go through the same stages");
  using Own = Tile<T, kBlockD, Tiles::kRows, kChannelsLast>;
  using Other = Tile<T, kBlockD, Tiles::kColumns, kChannelsLast>;
  using DS = Tile<T, Tiles::kRows, Tiles::kColumns, /*kChannelsLast=*/false>;  // lines are own positions

  static constexpr int kStageBytes = Own::kBytes + Other::kBytes;
  static constexpr int kDSOffset = 2 * kStageBytes;
  static constexpr int kBytes = kDSOffset + DS::kBytes;
  static_assert(kBytes <= kSharedMemory, "a block must fit on every GPU");
};

template <class T, bool kChannelsLast>
DANET_DEVICE void position_attention_dlogits(const PositionDlogitsParameters<T>& p) {
  using Tiles = PositionTiles<T>;
  using Plan = PositionDlogitsSharedMemory<T, kChannelsLast>;
  constexpr int kRowTiles = Tiles::kRows / (16 * kWarps), kColumnTiles = Tiles::kColumns / 8, kDTiles = kBlockD / 8;

  // 1. Which tile, which positions of the other side.
  const int D = p.own.channels, C = p.own_values.channels, L = p.own.positions, K = p.other.positions;
  const int own_blocks = (L + Tiles::kRows - 1) / Tiles::kRows, d_blocks = (D + kBlockD - 1) / kBlockD;
  const int c_blocks = (C + kBlockD - 1) / kBlockD;
  const int first_own = static_cast<int>(block_index() % own_blocks) * Tiles::kRows;
  const int own_d = static_cast<int>(block_index() / own_blocks % d_blocks);  // which kBlockD channels of the result
  const int64_t batch = block_index() / own_blocks / d_blocks % p.B;
  const int split = static_cast<int>(block_index() / own_blocks / d_blocks / p.B);
  const int first_other = split * p.split_length;
  const int row = warp_index() * 16 * kRowTiles;  // first of this warp in the tile
  const auto magnification = [&] { return p.magnify == nullptr ? 1.0f : *p.magnify; };
  const auto strength = [&] { return p.scale * p.gamma.load() / magnification(); };  // read anew: registers are short
  const int last_other =
      p.gamma.load() == 0.0f ? first_other : (K - first_other < p.split_length ? K : first_other + p.split_length);
  const float* const lse = p.lse + batch * (p.own_keys ? K : L);
  const float* const delta = p.delta + batch * (p.own_keys ? K : L);

  char* const memory = shared_memory();
  const auto own = [&](int stage) {
    return typename Plan::Own{reinterpret_cast<T*>(memory + stage * Plan::kStageBytes)};
  };
  const auto other = [&](int stage) {
    return typename Plan::Other{reinterpret_cast<T*>(memory + stage * Plan::kStageBytes + Plan::Own::kBytes)};
  };
  const typename Plan::DS shared_ds{reinterpret_cast<T*>(memory + Plan::kDSOffset)};

  // The steps for one tile of the map: products over C, then over D, of which the block's own channels come last.
  const int steps = c_blocks + d_blocks;
  int stage = 0;  // that the last copies went to
  const auto load_step = [&](int position, int step, int to) {
    if (step < c_blocks) {
      own(to).template load<kThreads>(p.own_values, batch, step * kBlockD, first_own);
      other(to).template load<kThreads>(p.other_values, batch, step * kBlockD, position);
    } else {
      const int d = (own_d + 1 + step - c_blocks) % d_blocks * kBlockD;
      own(to).template load<kThreads>(p.own, batch, d, first_own);
      other(to).template load<kThreads>(p.other, batch, d, position);
    }
    cp_async_commit();
  };
  // The stage of a step, once it is there and everybody is done with the other one, which takes the next step.
  const auto next_stage = [&](int position, int step) {
    cp_async_wait<0>();
    synchronize();
    const int ready = stage;
    stage = 1 - stage;
    if (step + 1 < steps) {
      load_step(position, step + 1, stage);
    } else if (position + Tiles::kColumns < last_other) {
      load_step(position + Tiles::kColumns, 0, stage);
    }
    return ready;
  };

  float acc[kRowTiles][kDTiles][4] = {};  // [own positions, channels]
  if (first_other < last_other) load_step(first_other, 0, 0);
  for (int position = first_other; position < last_other; position += Tiles::kColumns) {
    // 2. dP = dout . v.
    float ds[kRowTiles][kColumnTiles][4] = {};  // [own positions, other positions]
    for (int step = 0; step < c_blocks; ++step) {
      const int ready = next_stage(position, step);
      multiply<kBlockD>(ds, own(ready).by_position(), row, other(ready).by_position(), 0, C - step * kBlockD,
                        p.precise);
    }

    // 3. Scores.
    float s[kRowTiles][kColumnTiles][4] = {};  // [own positions, other positions]
    int ready = 0;
    for (int step = c_blocks; step < steps; ++step) {
      ready = next_stage(position, step);
      multiply<kBlockD>(s, own(ready).by_position(), row, other(ready).by_position(), 0, D, /*precise=*/true);
    }

    // 4. dS. Every P is at most 1; queries past the end have none.
    const auto finish = [&](float& score, float& product, bool inside, float row_lse, float row_delta) {
      const float exponent = (score * p.scale - row_lse) * kLog2e;
      const float weight = exp2_fast(exponent > 0.0f ? 0.0f : exponent);
      product = inside ? weight * (product - row_delta) * magnification() : 0.0f;
    };
    if (p.own_keys) {
#pragma unroll
      for (int c = 0; c < kColumnTiles; ++c) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int query = position + 8 * c + accumulator_column(e);
          const bool inside = query < K;
          const float row_lse = inside ? lse[query] : 0.0f, row_delta = inside ? delta[query] : 0.0f;
#pragma unroll
          for (int r = 0; r < kRowTiles; ++r) {
            finish(s[r][c][e], ds[r][c][e], inside, row_lse, row_delta);
            finish(s[r][c][e + 2], ds[r][c][e + 2], inside, row_lse, row_delta);
          }
        }
      }
    } else {
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int query = first_own + row + 16 * r + accumulator_row(2 * half);
          const bool inside = query < L;
          const float row_lse = inside ? lse[query] : 0.0f, row_delta = inside ? delta[query] : 0.0f;
#pragma unroll
          for (int c = 0; c < kColumnTiles; ++c) {
            finish(s[r][c][2 * half], ds[r][c][2 * half], inside, row_lse, row_delta);
            finish(s[r][c][2 * half + 1], ds[r][c][2 * half + 1], inside, row_lse, row_delta);
          }
        }
      }
    }

    // 5. Accumulate.
    multiply_weights(acc, ds, other(ready).by_channel(), 0, p.precise);
    if (p.other_sums == nullptr) continue;

    // 6. What these own positions give to the gradient of the other side: dS, now with all of its rows, times own.
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
      for (int c = 0; c < kColumnTiles; ++c) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          T* const line = shared_ds.data + (row + 16 * r + accumulator_row(e)) * Plan::DS::kLine;
          line[8 * c + accumulator_column(e)] = from_float<T>(ds[r][c][e]);
        }
      }
    }
    synchronize();
    constexpr int kGroups = Tiles::kColumns / 16;              // of 16 other positions, one for each warp
    constexpr int kSharedTiles = kDTiles * kGroups / kWarps;   // or several warps share one's channels
    static_assert(kWarps % kGroups == 0 && kSharedTiles % 2 == 0, "each warp has whole tiles");
    const int other_row = warp_index() % kGroups * 16, channel_row = warp_index() / kGroups * 8 * kSharedTiles;
    float shared[1][kSharedTiles][4] = {};  // [other positions, channels]
    multiply<Tiles::kRows>(shared, shared_ds.by_position(), other_row, own(ready).by_channel(), channel_row,
                           Tiles::kRows, p.precise);
    // From tile to tile the address is added to: as so many products it would fill the registers.
    const int channel = own_d * kBlockD + channel_row + accumulator_column(0);
    const int other_index = position + other_row + accumulator_row(0);
    float* to = p.other_sums + (batch * D + channel) * K + other_index;
#pragma unroll
    for (int c = 0; c < kSharedTiles; ++c) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        if (channel + 8 * c + e % 2 < D && other_index + e / 2 * 8 < K) {
          atomic_add(to + e % 2 * K + e / 2 * 8, shared[0][c][e] * strength());
        }
      }
      to += 8 * K;
    }
  }

  // 7. Finish.
  float* const sums = p.sums + (split * p.B + batch) * D * L;
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
    for (int c = 0; c < kDTiles; ++c) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int own_index = first_own + row + 16 * r + accumulator_row(e);
        const int channel = own_d * kBlockD + 8 * c + accumulator_column(e);
        if (own_index < L && channel < D) {
          sums[static_cast<int64_t>(channel) * L + own_index] = acc[r][c][e] * strength();
        }
      }
    }
  }
}

// Grid: blocks of L * blocks of D * B * splits. Each block owns kRows positions of one batch element and kBlockD
// channels of the result, and runs over split_length positions of the other side; each of its warps owns a quarter of
// the positions.
template <class T>
DANET_KERNEL(kThreads, kBlocksPerMultiprocessor) position_attention_dlogits_kernel(PositionDlogitsParameters<T> p) {
  DANET_FOR_LAYOUT(position_attention_dlogits, T, p)
}

}  // namespace danet
