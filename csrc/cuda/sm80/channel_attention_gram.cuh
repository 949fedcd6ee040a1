// The first step of channel attention, sums over positions: G = x x^T, and in the backward H = dout x^T.
// G is symmetric: only its tiles on and above the diagonal are computed.
#pragma once

#include "sm80/channel_attention_tiles.cuh"

namespace danet {

template <class T>
struct ChannelGramParameters {
  Operand<T> x;     // [B, C, N]
  Operand<T> dout;  // [B, C, N]; data == nullptr: only G is needed
  float* partial;   // [B, tiles, splits, kChannelTile, kChannelTile]: tiles of G, then of H
  int splits;
  int split_positions;  // a multiple of kChannelSplitMultiple
  bool channels_last;   // how the operands lie
  bool precise;         // fp32: whether H is computed as well as in fp32, as G always is
};

using GramWarps = ChannelWarps<kChannelTile>;
constexpr int kGramThreads = GramWarps::kThreads;

// Two stages: while one is multiplied, the other comes.
template <class T, bool kChannelsLast>
struct ChannelGramSharedMemory {
  static constexpr int kStep = 128 / static_cast<int>(sizeof(T));  // positions of a stage
  using Rows = Tile<T, kChannelTile, kStep, kChannelsLast>;

  static constexpr int kRightOffset = Rows::kBytes;
  static constexpr int kStageBytes = 2 * Rows::kBytes;
  static constexpr int kBytes = 2 * kStageBytes;
  static_assert(kBytes <= kSharedMemory, "a block must fit on every GPU");
  static_assert(kChannelSplitMultiple % kStep == 0, "splits are whole steps");
};

// Tensor cores do not round as they add: the error grows with the number of terms. After so many a sum starts afresh.
constexpr int kLongestSum = 2048;  // positions
static_assert(kLongestSum % kChannelSplitMultiple == 0, "a sum is whole steps");

// target [kChannelTile, kChannelTile] = sums, or += sums. Each element belongs to one lane of one block.
DANET_DEVICE void write_sums(float* target, const ChannelSums& sums, bool add) {
#pragma unroll
  for (int r = 0; r < kChannelRowTiles; ++r) {
#pragma unroll
    for (int c = 0; c < kChannelColumnTiles; ++c) {
#pragma unroll
      for (int e = 0; e < 4; e += 2) {
        const int row = GramWarps::row() + 16 * r + accumulator_row(e);
        const int column = GramWarps::column() + 8 * c + accumulator_column(e);
        auto* const address = reinterpret_cast<Several<float, 2>*>(target + row * kChannelTile + column);
        Several<float, 2> sum{{sums[r][c][e], sums[r][c][e + 1]}};
        if (add) {
          const Several<float, 2> before = *address;
          sum.elements[0] += before.elements[0];
          sum.elements[1] += before.elements[1];
        }
        *address = sum;
      }
    }
  }
}

template <class T, bool kChannelsLast>
DANET_DEVICE void channel_attention_gram(const ChannelGramParameters<T>& p) {
  using Plan = ChannelGramSharedMemory<T, kChannelsLast>;

  // 1. Which tile. Those of G come column after column.
  const int C = p.x.channels, N = p.x.positions;
  const int blocks = tiles_along(C);
  const int tiles = gram_tiles(blocks) + (p.dout.data != nullptr ? blocks * blocks : 0);
  const int split = static_cast<int>(block_index() % p.splits);
  const int tile = static_cast<int>(block_index() / p.splits % tiles);
  const int64_t batch = block_index() / p.splits / tiles;
  const bool is_gram = tile < gram_tiles(blocks);
  int row = (tile - gram_tiles(blocks)) / blocks, column = (tile - gram_tiles(blocks)) % blocks;
  if (is_gram) {
    column = 0;
    while (gram_tiles(column + 1) <= tile) ++column;
    row = tile - gram_tiles(column);
  }
  const Operand<T> left = is_gram ? p.x : p.dout;
  const bool one_operand = is_gram && row == column;  // on the diagonal of G
  const int first = split * p.split_positions;
  const int last = N - first < p.split_positions ? N : first + p.split_positions;
  float* const target = p.partial + block_index() * (kChannelTile * kChannelTile);

  // 2. Load.
  const auto rows = [&](int stage) {
    return typename Plan::Rows{reinterpret_cast<T*>(shared_memory() + stage * Plan::kStageBytes)};
  };
  const auto columns = [&](int stage) {
    char* const memory = shared_memory() + stage * Plan::kStageBytes + (one_operand ? 0 : Plan::kRightOffset);
    return typename Plan::Rows{reinterpret_cast<T*>(memory)};
  };
  const auto load = [&](int stage, int position) {
    rows(stage).template load<kGramThreads>(left, batch, row * kChannelTile, position);
    if (!one_operand) columns(stage).template load<kGramThreads>(p.x, batch, column * kChannelTile, position);
    cp_async_commit();
  };
  load(0, first);

  // 3. Accumulate [channels of the rows, channels of the columns].
  int stage = 0;
  for (int start = first; start < last; start += kLongestSum) {
    const int end = last - start < kLongestSum ? last : start + kLongestSum;
    ChannelSums acc = {};
    for (int position = start; position < end; position += Plan::kStep) {
      cp_async_wait<0>();
      synchronize();
      if (position + Plan::kStep < last) load(1 - stage, position + Plan::kStep);
      multiply<Plan::kStep>(acc, rows(stage).by_channel(), GramWarps::row(), columns(stage).by_channel(),
                            GramWarps::column(), last - position, is_gram || p.precise);
      stage = 1 - stage;
    }

    // 4. Write.
    write_sums(target, acc, /*add=*/start > first);
  }
}

// Partial sums of G on and above the diagonal, and of all of H.
// Grid: (splits * tiles * B). Each block owns one tile and sums over split_positions.
template <class T>
DANET_KERNEL(kGramThreads, 2) channel_attention_gram_kernel(ChannelGramParameters<T> p) {
  DANET_FOR_LAYOUT(channel_attention_gram, T, p)
}

}  // namespace danet
