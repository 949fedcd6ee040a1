// Gradient of value: dv_j = gamma sum_i P_ij dout_i, P_ij = exp(scale q_i . k_j - lse_i).
// The forward's way through the tiles, with keys and queries in each other's place, and nothing to be found out on the
// way.
#pragma once

#include "cuda/plan.h"
#include "sm80/parameters.cuh"

namespace danet {

template <class T>
struct PositionDvalueParameters {
  Operand<T> query;   // [B, D, M]
  Operand<T> key;     // [B, D, N]
  Operand<T> dout;    // [B, C, M]
  const float* lse;   // [B, M]
  Elements<T> dvalue; // [B, C, N]
  Gamma gamma;
  float scale;
  bool precise;  // fp32: whether P dout is computed as well as in fp32
  bool channels_last;
};

template <class T, bool kChannelsLast>
struct PositionDvalueSharedMemory {
  using Tiles = PositionTiles<T>;
  using Key = Tile<T, kBlockD, Tiles::kRows, kChannelsLast>;  // one for each kBlockD channels
  using Query = Tile<T, kBlockD, Tiles::kColumns, kChannelsLast>;
  using Dout = Tile<T, Tiles::kChannels, Tiles::kColumns, kChannelsLast>;

  static constexpr int kLseOffset = 0;  // fp32, one for each query
  static constexpr int kQueryOffset = kLseOffset + Tiles::kColumns * static_cast<int>(sizeof(float));
  static constexpr int kDoutOffset = kQueryOffset + Query::kBytes;
  static constexpr int kKeyOffset = kDoutOffset + Dout::kBytes;

  static constexpr int bytes(int D) { return kKeyOffset + (D + kBlockD - 1) / kBlockD * Key::kBytes; }
  static_assert(bytes(kLargestD) <= kSharedMemory, "a block must fit on every GPU");
};

template <class T, bool kChannelsLast>
DANET_DEVICE void position_attention_dvalue(const PositionDvalueParameters<T>& p) {
  using Tiles = PositionTiles<T>;
  using Plan = PositionDvalueSharedMemory<T, kChannelsLast>;
  constexpr int kRowTiles = Tiles::kRows / (16 * kWarps), kColumnTiles = Tiles::kColumns / 8;
  constexpr int kChannelTiles = Tiles::kChannels / 8;

  // 1. Which tile.
  const int D = p.key.channels, M = p.query.positions, N = p.key.positions, C = p.dout.channels;
  const int key_blocks = (N + Tiles::kRows - 1) / Tiles::kRows;
  const int channel_blocks = (C + Tiles::kChannels - 1) / Tiles::kChannels;
  const int first_key = static_cast<int>(block_index() % key_blocks) * Tiles::kRows;
  const int first_channel = static_cast<int>(block_index() / key_blocks % channel_blocks) * Tiles::kChannels;
  const int64_t batch = block_index() / key_blocks / channel_blocks;
  const int row = warp_index() * 16 * kRowTiles;  // first of this warp in the tile
  const float gamma = p.gamma.load();
  const int last_query = gamma == 0.0f ? 0 : M;

  char* const memory = shared_memory();
  const typename Plan::Query query{reinterpret_cast<T*>(memory + Plan::kQueryOffset)};
  const typename Plan::Dout dout{reinterpret_cast<T*>(memory + Plan::kDoutOffset)};
  const auto key = [&](int d) {
    return typename Plan::Key{reinterpret_cast<T*>(memory + Plan::kKeyOffset + d / kBlockD * Plan::Key::kBytes)};
  };

  float* const lse = reinterpret_cast<float*>(memory + Plan::kLseOffset);
  const auto load_queries = [&](int first_query) {
    query.template load<kThreads>(p.query, batch, 0, first_query);
    cp_async_commit();
    const int query_index = first_query + thread_index();
    if (thread_index() < Tiles::kColumns) lse[thread_index()] = query_index < M ? p.lse[batch * M + query_index] : 0.0f;
  };

  // 2. Load the keys, and the first queries.
  float acc[kRowTiles][kChannelTiles][4] = {};  // [keys, channels]
  if (last_query > 0) {
    for (int d = 0; d < D; d += kBlockD) key(d).template load<kThreads>(p.key, batch, d, first_key);
    load_queries(0);
  }
  for (int first_query = 0; first_query < last_query; first_query += Tiles::kColumns) {
    // 3. Scores, while dout comes.
    float s[kRowTiles][kColumnTiles][4] = {};  // [keys, queries]
    for (int d = 0; d < D; d += kBlockD) {
      if (d > 0) {
        synchronize();
        query.template load<kThreads>(p.query, batch, d, first_query);
        cp_async_commit();
      }
      cp_async_wait<0>();
      synchronize();
      if (d == 0) {
        dout.template load<kThreads>(p.dout, batch, first_channel, first_query);
        cp_async_commit();
      }
      multiply<kBlockD>(s, key(d).by_position(), row, query.by_position(), 0, D - d, /*precise=*/true);
    }

    // 4. P. Queries past the end have none.
    multiply_by(s, p.scale);
    if (M - first_query < Tiles::kColumns) exclude_columns(s, M - first_query);
#pragma unroll
    for (int c = 0; c < kColumnTiles; ++c) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float row_lse = lse[8 * c + accumulator_column(e)];
#pragma unroll
        for (int r = 0; r < kRowTiles; ++r) {
          s[r][c][e] = exp2_fast((s[r][c][e] - row_lse) * kLog2e);
          s[r][c][e + 2] = exp2_fast((s[r][c][e + 2] - row_lse) * kLog2e);
        }
      }
    }

    // 5. Accumulate, while the next queries come.
    cp_async_wait<0>();
    synchronize();
    if (first_query + Tiles::kColumns < M) {
      load_queries(first_query + Tiles::kColumns);
    }
    multiply_weights(acc, s, dout.by_channel(), 0, p.precise);
  }

  // 6. Finish.
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
    for (int c = 0; c < kChannelTiles; ++c) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int key_index = first_key + row + 16 * r + accumulator_row(e);
        const int channel = first_channel + 8 * c + accumulator_column(e);
        if (key_index < N && channel < C) {
          *p.dvalue.at(batch, channel, key_index) = from_float<T>(acc[r][c][e] * gamma);
        }
      }
    }
  }
}

// Grid: blocks of N * blocks of C * B. Each block owns kRows keys and kChannels channels of one batch element; each of
// its warps a quarter of the keys.
template <class T>
DANET_KERNEL(kThreads, kBlocksPerMultiprocessor) position_attention_dvalue_kernel(PositionDvalueParameters<T> p) {
  DANET_FOR_LAYOUT(position_attention_dvalue, T, p)
}

}  // namespace danet
