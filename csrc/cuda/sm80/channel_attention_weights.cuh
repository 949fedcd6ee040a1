// The left factors of the products over channels: where the tiles [kChannelTile, channels of a step] of weights come
// from. begin() starts what takes time, before a product; finish() does the rest, after it. The tile may be read after
// the wait for copies and the barrier that follow.
#pragma once

#include "sm80/channel_attention_tiles.cuh"

namespace danet {

using ApplyWarps = ChannelWarps<kChannelPositions>;
constexpr int kApplyThreads = ApplyWarps::kThreads;

// P, without the division by the sum of its rows, or if kTransposed P^T, with it: formed from logits on the way to
// shared memory, and stored nowhere else. G is symmetric, so P^T[c, d] comes from the logits at [c, d] too, with the
// statistics of row d. A thread has four columns of every kRowsAtOnce-th row.
template <class T, class Tile, bool kTransposed>
struct WeightsFromLogits {
  static constexpr int kThreadsPerRow = Tile::kLength / 4;
  static constexpr int kRowsAtOnce = kApplyThreads / kThreadsPerRow;
  static constexpr int kPasses = kChannelTile / kRowsAtOnce;
  static_assert(kApplyThreads % kThreadsPerRow == 0 && kChannelTile % kRowsAtOnce == 0, "each logit has one thread");

  const float* logits;   // [C, row_length] of this batch element
  const float* row_max;  // [C] likewise
  const float* row_sum;  // [C] likewise
  int C;
  int first_channel;
  Several<float, 4> pending[kPasses] = {};  // on their way since begin()

  static DANET_DEVICE int row(int pass) { return thread_index() / kThreadsPerRow + pass * kRowsAtOnce; }
  static DANET_DEVICE int column() { return thread_index() % kThreadsPerRow * 4; }

  DANET_DEVICE void begin(const Tile& /*tile*/, int d) {
    const int64_t row_length = tiles_along(C) * kChannelTile;
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
      const int channel = first_channel + row(pass);
      pending[pass] = {{-infinity(), -infinity(), -infinity(), -infinity()}};
      if (channel >= C) continue;
      pending[pass] = *reinterpret_cast<const Several<float, 4>*>(logits + channel * row_length + d + column());
    }
  }

  DANET_DEVICE void finish(const Tile& tile, int d) {
    float m[4] = {}, inverse[4] = {1.0f, 1.0f, 1.0f, 1.0f};
    if (kTransposed) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (d + column() + i >= C) continue;
        m[i] = row_max[d + column() + i];
        inverse[i] = 1.0f / row_sum[d + column() + i];
      }
    }
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
      const int channel = first_channel + row(pass);
      const float row_m = kTransposed || channel >= C ? 0.0f : row_max[channel];
      Several<T, 4> weights;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float s = pending[pass].elements[i];
        const float weight = exp2_fast((s - (kTransposed ? m[i] : row_m)) * kLog2e) * inverse[i];
        weights.elements[i] = from_float<T>(weight);
      }
      *reinterpret_cast<Several<T, 4>*>(tile.data + row(pass) * Tile::kLine + column()) = weights;
    }
  }
};

// Weights that lie in memory as they are used.
template <class T, class Tile>
struct StoredWeights {
  Operand<T> matrix;  // [B, C, C]
  int batch;
  int first_channel;

  DANET_DEVICE void begin(const Tile& tile, int d) {
    tile.template load<kApplyThreads>(matrix, batch, first_channel, d);
  }
  DANET_DEVICE void finish(const Tile& /*tile*/, int /*d*/) {}
};

}  // namespace danet
