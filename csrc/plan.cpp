#include "plan.h"

#include <algorithm>

namespace danet {
namespace {

// Enough for the threads of a workstation, few enough for the partial sums of dQ.
constexpr int64_t kTasksInFlight = 16;

int64_t accumulator_size(Dtype dtype) { return dtype == Dtype::kFloat64 ? 8 : 4; }

// Copies of the operands widened to the accumulator dtype, for one batch element.
int64_t widened(Dtype dtype, int64_t elements) { return element_size(dtype) == 2 ? 4 * elements : 0; }

}  // namespace

PositionForwardPlan plan_position_forward(int64_t B, int64_t C, int64_t M, int64_t N) {
  PositionForwardPlan plan;
  plan.block_m = std::min<int64_t>(128, M);
  // With few channels the tiles' products cost little whatever their size, and short ones keep the chains of additions
  // short.
  plan.block_n = std::min<int64_t>(C < 64 ? 128 : 512, N);
  plan.batch = std::clamp<int64_t>(kTasksInFlight / ceil_div(M, plan.block_m), 1, B);
  return plan;
}

PositionBackwardPlan plan_position_backward(int64_t B, int64_t M, int64_t N) {
  PositionBackwardPlan plan;
  plan.block_m = std::min<int64_t>(256, M);
  // Small maps get smaller key tiles, so that there are several tasks.
  plan.block_n = std::min<int64_t>(std::clamp<int64_t>(ceil_div(N, kTasksInFlight * 64) * 64, 64, 512), N);
  const int64_t tiles = ceil_div(N, plan.block_n);
  plan.tiles_per_group = ceil_div(tiles, kTasksInFlight);
  plan.groups = ceil_div(tiles, plan.tiles_per_group);
  plan.batch = std::clamp<int64_t>(kTasksInFlight / plan.groups, 1, B);
  return plan;
}

int64_t position_forward_workspace(int64_t B, int64_t C, int64_t D, int64_t M, int64_t N, Dtype dtype, int64_t threads,
                                   bool bf16_kernel) {
  const PositionForwardPlan plan = plan_position_forward(B, C, M, N);
  if (bf16_kernel) {
    const int64_t lanes = ceil_div(plan.block_m, 64) * 64;
    const int64_t shared = plan.batch * 2 * ((D + 1) * (M + 63) + N * (D + 1) + C * (N + 1));
    return shared + threads * 4 * (plan.block_n * 64 + lanes * (C + 3) + ceil_div(plan.block_n, 2) * 64);
  }
  const int64_t size = accumulator_size(dtype);
  const int64_t shared = plan.batch * widened(dtype, D * M + D * N + C * N);
  return shared + threads * size * plan.block_m * (plan.block_n + 2 * C + 3);
}

int64_t position_backward_workspace(int64_t B, int64_t C, int64_t D, int64_t M, int64_t N, Dtype dtype,
                                    int64_t threads) {
  const PositionBackwardPlan plan = plan_position_backward(B, M, N);
  const int64_t size = accumulator_size(dtype), bm = plan.block_m, bn = plan.block_n;
  const int64_t shared =
      plan.batch * (size * (M + plan.groups * D * M) + widened(dtype, D * M + D * N + C * N + C * M));
  return shared + threads * size * (2 * bn * bm + C * bn + D * bn + std::max(C * bn, D * std::max(bn, bm)));
}

}  // namespace danet
