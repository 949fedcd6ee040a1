// Forward of position attention: out = gamma attn + residual, attn_i = sum_j softmax_j(scale q_i . k_j) v_j.
// One pass over the keys with an online softmax (docs/math.md); of the map there is only a tile, in registers.
#pragma once

#include <cmath>

#include "cuda/plan.h"
#include "sm80/parameters.cuh"

namespace danet {

template <class T>
struct PositionForwardParameters {
  Operand<T> query;            // [B, D, M]
  Operand<T> key;              // [B, D, N]
  Operand<T> value;            // [B, C, N]
  Elements<const T> residual;  // [B, C, M], optional
  Elements<T> out;             // [B, C, M]
  Elements<float> attn;        // [B, C, M], optional
  float* lse;                  // [B, M]
  Gamma gamma;
  float scale;
  bool precise;  // fp32: whether p v is computed as well as in fp32
  bool channels_last;
};

template <class T, bool kChannelsLast>
struct PositionForwardSharedMemory {
  using Tiles = PositionTiles<T>;
  using Query = Tile<T, kBlockD, Tiles::kRows, kChannelsLast>;  // one for each kBlockD channels
  using Key = Tile<T, kBlockD, Tiles::kColumns, kChannelsLast>;
  using Value = Tile<T, Tiles::kChannels, Tiles::kColumns, kChannelsLast>;

  static constexpr int kKeyOffset = 0;
  static constexpr int kValueOffset = kKeyOffset + Key::kBytes;
  static constexpr int kQueryOffset = kValueOffset + Value::kBytes;

  static constexpr int bytes(int D) { return kQueryOffset + (D + kBlockD - 1) / kBlockD * Query::kBytes; }
  static_assert(bytes(kLargestD) <= kSharedMemory, "a block must fit on every GPU");
};

// Running max and sum of the rows that a lane has a part in. The max is that of the row, the sum that of the lane's
// columns.
template <int kRowTiles>
struct OnlineSoftmax {
  float m[kRowTiles][2];
  float l[kRowTiles][2];

  DANET_DEVICE OnlineSoftmax() {
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
      m[r][0] = m[r][1] = -infinity();
      l[r][0] = l[r][1] = 0.0f;
    }
  }

  // Logits become p = exp(logit - m) with the new max m; `shrink` is what earlier sums have to be multiplied by. The
  // max comes off before the change to base 2: logits in the thousands would lose digits on the way there.
  template <int kColumnTiles>
  DANET_DEVICE void add(float (&s)[kRowTiles][kColumnTiles][4], float (&shrink)[kRowTiles][2]) {
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float new_m = m[r][half];
#pragma unroll
        for (int c = 0; c < kColumnTiles; ++c) {
          new_m = fmaxf(new_m, fmaxf(s[r][c][2 * half], s[r][c][2 * half + 1]));
        }
        new_m = fmaxf(new_m, shuffle_xor(new_m, 1));
        new_m = fmaxf(new_m, shuffle_xor(new_m, 2));
        const float safe_m = new_m == -infinity() ? 0.0f : new_m;  // no inf - inf before the first finite logit
        shrink[r][half] = exp2_fast((m[r][half] - safe_m) * kLog2e);
        float sum = 0.0f;
#pragma unroll
        for (int c = 0; c < kColumnTiles; ++c) {
#pragma unroll
          for (int e = 2 * half; e < 2 * half + 2; ++e) {
            s[r][c][e] = exp2_fast((s[r][c][e] - safe_m) * kLog2e);
            sum += s[r][c][e];
          }
        }
        l[r][half] = l[r][half] * shrink[r][half] + sum;
        m[r][half] = new_m;
      }
    }
  }

  // The sums of the whole rows.
  DANET_DEVICE void finish() {
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        l[r][half] += shuffle_xor(l[r][half], 1);
        l[r][half] += shuffle_xor(l[r][half], 2);
      }
    }
  }
};

// Grid: blocks of M * blocks of C * B. Each block owns kRows queries and kChannels channels of one batch element; each
// of its warps a quarter of the queries.
template <class T, bool kChannelsLast>
DANET_DEVICE void position_attention_forward(const PositionForwardParameters<T>& p) {
  using Tiles = PositionTiles<T>;
  using Plan = PositionForwardSharedMemory<T, kChannelsLast>;
  constexpr int kRowTiles = Tiles::kRows / (16 * kWarps), kColumnTiles = Tiles::kColumns / 8;
  constexpr int kChannelTiles = Tiles::kChannels / 8;
  static_assert(Tiles::kRows % (16 * kWarps) == 0 && kColumnTiles % 2 == 0, "whole tiles of 16 x 16");

  // 1. Which tile.
  const int D = p.query.channels, M = p.query.positions, N = p.key.positions, C = p.value.channels;
  const int query_blocks = (M + Tiles::kRows - 1) / Tiles::kRows;
  const int channel_blocks = (C + Tiles::kChannels - 1) / Tiles::kChannels;
  const int first_query = static_cast<int>(block_index() % query_blocks) * Tiles::kRows;
  const int first_channel = static_cast<int>(block_index() / query_blocks % channel_blocks) * Tiles::kChannels;
  const int64_t batch = block_index() / query_blocks / channel_blocks;
  const int row = warp_index() * 16 * kRowTiles;  // first of this warp in the tile

  char* const memory = shared_memory();
  const typename Plan::Key key{reinterpret_cast<T*>(memory + Plan::kKeyOffset)};
  const typename Plan::Value value{reinterpret_cast<T*>(memory + Plan::kValueOffset)};
  const auto query = [&](int d) {
    return typename Plan::Query{reinterpret_cast<T*>(memory + Plan::kQueryOffset + d / kBlockD * Plan::Query::kBytes)};
  };

  // 2. Load the queries, and the first keys.
  for (int d = 0; d < D; d += kBlockD) query(d).template load<kThreads>(p.query, batch, d, first_query);
  key.template load<kThreads>(p.key, batch, 0, 0);
  cp_async_commit();

  OnlineSoftmax<kRowTiles> softmax;
  float acc[kRowTiles][kChannelTiles][4] = {};  // [queries, channels]
  for (int first_key = 0; first_key < N; first_key += Tiles::kColumns) {
    // 3. Scores, while the values come.
    float s[kRowTiles][kColumnTiles][4] = {};  // [queries, keys]
    for (int d = 0; d < D; d += kBlockD) {
      if (d > 0) {
        synchronize();
        key.template load<kThreads>(p.key, batch, d, first_key);
        cp_async_commit();
      }
      cp_async_wait<0>();
      synchronize();
      if (d == 0) {
        value.template load<kThreads>(p.value, batch, first_channel, first_key);
        cp_async_commit();
      }
      multiply<kBlockD>(s, query(d).by_position(), row, key.by_position(), 0, D - d, /*precise=*/true);
    }

    // 4. Softmax.
    multiply_by(s, p.scale);
    if (N - first_key < Tiles::kColumns) exclude_columns(s, N - first_key);
    float shrink[kRowTiles][2];
    softmax.add(s, shrink);
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
      for (int c = 0; c < kChannelTiles; ++c) {
#pragma unroll
        for (int e = 0; e < 4; ++e) acc[r][c][e] *= shrink[r][e / 2];
      }
    }

    // 5. Accumulate, while the next keys come.
    cp_async_wait<0>();
    synchronize();
    if (first_key + Tiles::kColumns < N) {
      key.template load<kThreads>(p.key, batch, 0, first_key + Tiles::kColumns);
      cp_async_commit();
    }
    multiply_weights(acc, s, value.by_channel(), 0, p.precise);
  }

  // 6. Finish: attn = acc / l, out = gamma attn + residual, lse = m + ln(l). A row with a logit of +inf is NaN
  // throughout, and so is its lse: l is NaN there.
  softmax.finish();
  const float gamma = p.gamma.load();
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int query_index = first_query + row + 16 * r + accumulator_row(2 * half);
      if (query_index >= M) continue;
      const float l = softmax.l[r][half];
      if (first_channel == 0 && lane_index() % 4 == 0) p.lse[batch * M + query_index] = softmax.m[r][half] + logf(l);
      const float inverse = 1.0f / l;
#pragma unroll
      for (int c = 0; c < kChannelTiles; ++c) {
#pragma unroll
        for (int e = 2 * half; e < 2 * half + 2; ++e) {
          const int channel = first_channel + 8 * c + accumulator_column(e);
          if (channel >= C) continue;
          float result = acc[r][c][e] * inverse;
          if (p.attn.data != nullptr) *p.attn.at(batch, channel, query_index) = result;
          result *= gamma;
          if (p.residual.data != nullptr) result += to_float(*p.residual.at(batch, channel, query_index));
          *p.out.at(batch, channel, query_index) = from_float<T>(result);
        }
      }
    }
  }
}

template <class T>
DANET_KERNEL(kThreads, kBlocksPerMultiprocessor) position_attention_forward_kernel(PositionForwardParameters<T> p) {
  DANET_FOR_LAYOUT(position_attention_forward, T, p)
}

}  // namespace danet
