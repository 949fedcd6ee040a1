// The last step of channel attention, products over channels:
//   out = gamma P x + x;  dx = dout + gamma [P^T dout + (dG + dG^T) x]
#pragma once

#include "sm80/channel_attention_weights.cuh"

namespace danet {

template <class T>
struct ChannelForwardParameters {
  Operand<T> x;                // [B, C, N]
  Elements<const T> residual;  // [B, C, N], optional: x
  Elements<T> out;             // [B, C, N]
  const float* logits;         // [B, C, row_length], past the end of its rows -inf
  const float* row_max;        // [B, C]
  const float* row_sum;        // [B, C]
  Gamma gamma;
  bool channels_last;  // how x lies
  bool precise;        // fp32: whether products are computed as well as in fp32
};

template <class T>
struct ChannelBackwardParameters {
  Operand<T> x;                // [B, C, N]
  Operand<T> dout;             // [B, C, N]
  Operand<T> dgram;            // [B, C, C]: dG + dG^T, its rows magnified
  Elements<const T> residual;  // [B, C, N], optional: dout
  Elements<T> dx;              // [B, C, N]
  const float* logits;         // [B, C, row_length], past the end of its rows -inf
  const float* row_max;        // [B, C]
  const float* row_sum;        // [B, C]
  const float* delta;          // [B, C]
  const float* magnify;        // [B, C], optional
  Gamma gamma;
  bool channels_last;  // how x and dout lie
  bool precise;
};

template <class T, bool kChannelsLast>
struct ChannelApplySharedMemory {
  static constexpr bool kAlongChannels = kChannelsLast;
  static constexpr int kStep = 64 / static_cast<int>(sizeof(T));  // channels of a stage
  using Weights = Tile<T, kChannelTile, kStep, /*kChannelsLast=*/false>;
  using Values = Tile<T, kStep, kChannelPositions, kChannelsLast>;

  // Two stages: while one is multiplied, the other comes.
  static constexpr int kValuesOffset = Weights::kBytes;
  static constexpr int kStageBytes = Weights::kBytes + Values::kBytes;

  // Later the result, of 32 channels at a time, takes their place, in lines as x has them. Between lines there is as
  // much as keeps accumulators apart in the banks.
  static constexpr int kResultChannels = kChannelTile / kChannelRowTiles;
  static constexpr int kResultLine = kChannelsLast ? kResultChannels + 4 : kChannelPositions + 8;
  static constexpr int kResultBytes = 4 * kResultLine * (kChannelsLast ? kChannelPositions : kResultChannels);

  static DANET_DEVICE int result_offset(int channel, int position) {
    return kChannelsLast ? position * kResultLine + channel : channel * kResultLine + position;
  }

  static constexpr int kBytes = 2 * kStageBytes > kResultBytes ? 2 * kStageBytes : kResultBytes;
  static_assert(kBytes <= kSharedMemory, "a block must fit on every GPU");
  static_assert(kChannelTile % kStep == 0, "rows of the matrices are whole steps");
};

// acc [channels, positions] += weights [channels, C] values [C, positions], at the block's channels and positions.
template <class Plan, class T, class Weights>
DANET_DEVICE void add_products(ChannelSums& acc, Weights& weights, const Operand<T>& values, int64_t batch,
                               int first_position, bool precise) {
  const int C = values.channels;
  const auto weights_tile = [&](int stage) {  // [channels, kStep]
    return typename Plan::Weights{reinterpret_cast<T*>(shared_memory() + stage * Plan::kStageBytes)};
  };
  const auto values_tile = [&](int stage) {  // [kStep, positions]
    char* const memory = shared_memory() + stage * Plan::kStageBytes + Plan::kValuesOffset;
    return typename Plan::Values{reinterpret_cast<T*>(memory)};
  };
  const auto begin = [&](int stage, int d) {
    weights.begin(weights_tile(stage), d);
    values_tile(stage).template load<kApplyThreads>(values, batch, d, first_position);
    cp_async_commit();
  };
  begin(0, 0);
  weights.finish(weights_tile(0), 0);
  int stage = 0;
  for (int d = 0; d < C; d += Plan::kStep) {
    cp_async_wait<0>();
    synchronize();
    const bool more = d + Plan::kStep < C;
    if (more) begin(1 - stage, d + Plan::kStep);
    multiply<Plan::kStep>(acc, weights_tile(stage).by_channel(), ApplyWarps::row(), values_tile(stage).by_position(),
                          ApplyWarps::column(), C - d, precise);
    if (more) weights.finish(weights_tile(1 - stage), d + Plan::kStep);
    stage = 1 - stage;
  }
  synchronize();  // whoever comes next may write to shared memory
}

// out = result + residual. The result goes through shared memory, so that lanes write side by side if out lies as x
// does.
template <class Plan, class T>
DANET_DEVICE void write_tile(const ChannelSums& result, const Elements<const T>& residual, const Elements<T>& out,
                             int64_t batch, int first_channel, int first_position, int C, int N) {
  constexpr int kElements = Plan::kResultChannels * kChannelPositions;
  auto* const shared = reinterpret_cast<float*>(shared_memory());  // [kResultChannels, kChannelPositions]
#pragma unroll
  for (int r = 0; r < kChannelRowTiles; ++r) {
    if (r > 0) synchronize();
#pragma unroll
    for (int c = 0; c < kChannelColumnTiles; ++c) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int row = ApplyWarps::row() / kChannelRowTiles + accumulator_row(e);
        const int column = ApplyWarps::column() + 8 * c + accumulator_column(e);
        shared[Plan::result_offset(row, column)] = result[r][c][e];
      }
    }
    synchronize();
#pragma unroll 8
    for (int element = thread_index(); element < kElements; element += kApplyThreads) {
      const int row = Plan::kAlongChannels ? element % Plan::kResultChannels : element / kChannelPositions;
      const int column = Plan::kAlongChannels ? element / Plan::kResultChannels : element % kChannelPositions;
      const int channel = first_channel + row / 16 * kChannelWarpRows + 16 * r + row % 16;
      const int position = first_position + column;
      if (channel >= C || position >= N) continue;
      float value = shared[Plan::result_offset(row, column)];
      if (residual.data != nullptr) value += to_float(*residual.at(batch, channel, position));
      *out.at(batch, channel, position) = from_float<T>(value);
    }
  }
}

// Which tile of the result a block owns.
struct ChannelApplyTile {
  int batch;
  int first_channel;
  int first_position;

  DANET_DEVICE ChannelApplyTile(int C, int N) {
    const int64_t channel_blocks = tiles_along(C);
    const int64_t position_blocks = (N + kChannelPositions - 1) / kChannelPositions;
    batch = static_cast<int>(block_index() / channel_blocks / position_blocks);
    first_channel = static_cast<int>(block_index() % channel_blocks) * kChannelTile;
    first_position = static_cast<int>(block_index() / channel_blocks % position_blocks) * kChannelPositions;
  }

  // The channel of accumulators e in the warp's row tile r.
  DANET_DEVICE int channel(int r, int e) const {
    return first_channel + ApplyWarps::row() + 16 * r + accumulator_row(e);
  }
};

// Accumulators times the factor of their row: of row tile r, those at e = 0, 1 and at e = 2, 3 have one each.
DANET_DEVICE void multiply_rows(ChannelSums& acc, const float (&factors)[kChannelRowTiles][2]) {
#pragma unroll
  for (int r = 0; r < kChannelRowTiles; ++r) {
#pragma unroll
    for (int c = 0; c < kChannelColumnTiles; ++c) {
#pragma unroll
      for (int e = 0; e < 4; ++e) acc[r][c][e] *= factors[r][e / 2];
    }
  }
}

template <class T, bool kChannelsLast>
DANET_DEVICE void channel_attention_forward(const ChannelForwardParameters<T>& p) {
  using Plan = ChannelApplySharedMemory<T, kChannelsLast>;

  // 1. Which tile.
  const int C = p.x.channels, N = p.x.positions;
  const ChannelApplyTile tile(C, N);
  const int64_t statistics = int64_t{tile.batch} * C, matrix = statistics * tiles_along(C) * kChannelTile;

  // 2. The sum over the channels of x.
  ChannelSums acc = {};  // [channels, positions]
  WeightsFromLogits<T, typename Plan::Weights, false> weights{p.logits + matrix, p.row_max + statistics,
                                                              p.row_sum + statistics, C, tile.first_channel};
  add_products<Plan>(acc, weights, p.x, tile.batch, tile.first_position, p.precise);

  // 3. Finish.
  const float gamma = p.gamma.load();
  float strength[kChannelRowTiles][2];
#pragma unroll
  for (int r = 0; r < kChannelRowTiles; ++r) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int channel = tile.channel(r, 2 * half);
      strength[r][half] = channel < C ? 1.0f / p.row_sum[statistics + channel] * gamma : 0.0f;
    }
  }
  multiply_rows(acc, strength);
  write_tile<Plan>(acc, p.residual, p.out, tile.batch, tile.first_channel, tile.first_position, C, N);
}

// out = gamma P x + residual.
// Grid: (C / kChannelTile * N / kChannelPositions * B). Each block owns kChannelTile channels and kChannelPositions
// positions of one batch element; those that read the same positions run side by side.
template <class T>
DANET_KERNEL(kApplyThreads, 1) channel_attention_forward_kernel(ChannelForwardParameters<T> p) {
  DANET_FOR_LAYOUT(channel_attention_forward, T, p)
}

template <class T, bool kChannelsLast>
DANET_DEVICE void channel_attention_backward(const ChannelBackwardParameters<T>& p) {
  using Plan = ChannelApplySharedMemory<T, kChannelsLast>;

  // 1. Which tile.
  const int C = p.x.channels, N = p.x.positions;
  const ChannelApplyTile tile(C, N);
  const int64_t statistics = int64_t{tile.batch} * C, matrix = statistics * tiles_along(C) * kChannelTile;
  const float gamma = p.gamma.load();
  ChannelSums acc = {};  // [channels, positions]
  float strength[kChannelRowTiles][2];

  if (gamma == 0.0f) {
    // The result is known, unless a row of the map is NaN: then it is NaN as well.
    float spoiled = 0.0f;  // or NaN
    for (int channel = lane_index(); channel < C; channel += 32) spoiled += p.delta[statistics + channel] * 0.0f;
    spoiled = warp_sum(spoiled);
#pragma unroll
    for (int r = 0; r < kChannelRowTiles; ++r) strength[r][0] = strength[r][1] = spoiled;
  } else {
    // 2. P^T dout.
    WeightsFromLogits<T, typename Plan::Weights, true> weights{p.logits + matrix, p.row_max + statistics,
                                                               p.row_sum + statistics, C, tile.first_channel};
    add_products<Plan>(acc, weights, p.dout, tile.batch, tile.first_position, p.precise);

    // 3. (dG + dG^T) x. Its rows are magnified for fp16.
    float magnify[kChannelRowTiles][2];
#pragma unroll
    for (int r = 0; r < kChannelRowTiles; ++r) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int channel = tile.channel(r, 2 * half);
        magnify[r][half] = p.magnify != nullptr && channel < C ? p.magnify[statistics + channel] : 1.0f;
        strength[r][half] = 1.0f / magnify[r][half] * gamma;
      }
    }
    multiply_rows(acc, magnify);
    StoredWeights<T, typename Plan::Weights> dgram{p.dgram, tile.batch, tile.first_channel};
    add_products<Plan>(acc, dgram, p.x, tile.batch, tile.first_position, p.precise);
  }

  // 4. Finish.
  multiply_rows(acc, strength);
  write_tile<Plan>(acc, p.residual, p.dx, tile.batch, tile.first_channel, tile.first_position, C, N);
}

// dx = gamma [P^T dout + (dG + dG^T) x] + residual.
// Grid: (C / kChannelTile * N / kChannelPositions * B). Each block owns kChannelTile channels and kChannelPositions
// positions of one batch element; those that read the same positions run side by side.
template <class T>
DANET_KERNEL(kApplyThreads, 1) channel_attention_backward_kernel(ChannelBackwardParameters<T> p) {
  DANET_FOR_LAYOUT(channel_attention_backward, T, p)
}

}  // namespace danet
