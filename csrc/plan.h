// Tiles and workspaces of the kernels: pure functions of shape and dtype, used by the launchers and, through
// danet_kernels._C, by memory_estimate and the tests. Nothing here depends on the number of threads except the bytes of
// their scratch.
#pragma once

#include <cstdint>

#include "launch.h"

namespace danet {

struct PositionForwardPlan {
  int64_t block_m;  // queries per task
  int64_t block_n;  // keys per tile
  int64_t batch;    // batch elements in flight, so that small maps keep all threads busy
};
PositionForwardPlan plan_position_forward(int64_t B, int64_t C, int64_t M, int64_t N);

struct PositionBackwardPlan {
  int64_t block_m;          // queries per tile
  int64_t block_n;          // keys per tile
  int64_t tiles_per_group;  // key tiles that one task takes in turn; it owns their rows of dK and dV
  int64_t groups;           // tasks per batch element; each has a partial sum of dQ [D, M] of its own
  int64_t batch;            // batch elements in flight
};
PositionBackwardPlan plan_position_backward(int64_t B, int64_t M, int64_t N);

// Bytes that a call allocates beyond its results, at most. bf16_kernel: whether the AVX512-BF16 kernel runs.
int64_t position_forward_workspace(int64_t B, int64_t C, int64_t D, int64_t M, int64_t N, Dtype dtype, int64_t threads,
                                   bool bf16_kernel);
int64_t position_backward_workspace(int64_t B, int64_t C, int64_t D, int64_t M, int64_t N, Dtype dtype,
                                    int64_t threads);

}  // namespace danet
