// delta_i = sum_c dout_ic attn_ic, the part of the backward that every query has once.
#pragma once

#include "cuda/plan.h"
#include "sm80/parameters.cuh"

namespace danet {

constexpr int kDeltaQueries = 32;  // of a block

template <class T>
struct PositionDeltaParameters {
  Elements<const T> dout;      // [B, C, M]
  Elements<const float> attn;  // [B, C, M]
  float* delta;                // [B, M]
  int C;
  int M;
};

// Grid: blocks of M * B. Each block owns kDeltaQueries queries of one batch element. Lanes are queries where those lie
// side by side, and warps share the channels; where channels do, lanes are channels, and warps share the queries.
template <class T>
DANET_KERNEL(kThreads, kBlocksPerMultiprocessor) position_attention_delta_kernel(PositionDeltaParameters<T> p) {
  const int query_blocks = (p.M + kDeltaQueries - 1) / kDeltaQueries;
  const int first_query = static_cast<int>(block_index() % query_blocks) * kDeltaQueries;
  const int64_t batch = block_index() / query_blocks;
  const auto product = [&](int channel, int query) {
    return to_float(*p.dout.at(batch, channel, query)) * *p.attn.at(batch, channel, query);
  };
  if (p.dout.position_stride == 1) {
    float* const sums = reinterpret_cast<float*>(shared_memory());  // [kWarps, kDeltaQueries]
    const int query = first_query + lane_index();
    float sum = 0.0f;
    if (query < p.M) {
      for (int channel = warp_index(); channel < p.C; channel += kWarps) sum += product(channel, query);
    }
    sums[thread_index()] = sum;
    synchronize();
    if (warp_index() == 0 && query < p.M) {
      for (int warp = 1; warp < kWarps; ++warp) sum += sums[32 * warp + lane_index()];
      p.delta[batch * p.M + query] = sum;
    }
  } else {
    for (int offset = warp_index(); offset < kDeltaQueries && first_query + offset < p.M; offset += kWarps) {
      float sum = 0.0f;
      for (int channel = lane_index(); channel < p.C; channel += 32) sum += product(channel, first_query + offset);
#pragma unroll
      for (int mask = 16; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
      if (lane_index() == 0) p.delta[batch * p.M + first_query + offset] = sum;
    }
  }
}

}  // namespace danet
