// Tiles and workspaces of channel attention: pure functions of shape and dtype, like those of plan.h.
#pragma once

#include <cstdint>

#include "launch.h"

namespace danet {

struct ChannelPlan {
  int64_t panel;    // columns of G that one task computes, down to their last row at or above the diagonal
  int64_t splits;   // partial sums of G over the positions; each has a [C, C] of its own
  int64_t split;    // positions per partial sum
  int64_t step;     // positions per product
  int64_t rows;     // channels of a block of the result
  int64_t columns;  // positions of a block of the result
  int64_t batch;    // batch elements in flight
};
ChannelPlan plan_channel(int64_t B, int64_t C, int64_t N);

// Bytes that a call allocates beyond its results, at most. They stay bounded however large N and B are.
int64_t channel_forward_workspace(int64_t B, int64_t C, int64_t N, Dtype dtype, int64_t threads);
int64_t channel_backward_workspace(int64_t B, int64_t C, int64_t N, Dtype dtype, int64_t threads);

}  // namespace danet
