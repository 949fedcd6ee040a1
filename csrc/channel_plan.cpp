#include "channel_plan.h"

#include <algorithm>

#include "plan.h"

namespace danet {
namespace {

constexpr int64_t kTasks = 16;   // per phase, where the shape allows: as many threads find work
constexpr int64_t kAligned = 16;  // tiles start on cache lines

int64_t aligned(int64_t columns) { return ceil_div(columns, kAligned) * kAligned; }

int64_t accumulator_size(Dtype dtype) { return dtype == Dtype::kFloat64 ? 8 : 4; }

// Elements of a worker's tile of `rows` channels that is read as it is, or widened first.
int64_t widened(Dtype dtype, int64_t rows, int64_t columns) { return element_size(dtype) == 2 ? rows * columns : 0; }

// Elements of the scratch of a worker, for sums of products and for the result.
int64_t product_scratch(const ChannelPlan& plan, Dtype dtype, int64_t C, int64_t panel) {
  return plan.panel * C + widened(dtype, C + panel, plan.step);
}
int64_t result_scratch(const ChannelPlan& plan, Dtype dtype, int64_t C, int64_t products) {
  return plan.rows * (C + products * plan.columns) + widened(dtype, C, plan.columns);
}

}  // namespace

ChannelPlan plan_channel(int64_t B, int64_t C, int64_t N) {
  ChannelPlan plan;
  plan.panel = std::clamp<int64_t>(C, 1, 128);
  const int64_t panels = ceil_div(C, plan.panel);
  const int64_t splits = std::clamp<int64_t>(ceil_div(kTasks, std::max<int64_t>(panels, 1)), 1, ceil_div(N + 1, 256));
  plan.split = std::max(aligned(ceil_div(N, splits)), kAligned);
  plan.splits = std::max<int64_t>(ceil_div(N, plan.split), 1);
  plan.step = std::min<int64_t>(aligned(ceil_div(plan.split, ceil_div(plan.split, 1024))), std::max<int64_t>(N, 1));
  plan.batch = std::clamp<int64_t>(kTasks / std::max<int64_t>(panels * plan.splits, 1), 1, std::max<int64_t>(B, 1));
  plan.rows = std::clamp<int64_t>(C, 1, 128);
  const int64_t blocks = plan.batch * std::max<int64_t>(ceil_div(C, plan.rows), 1);
  const int64_t columns = std::clamp<int64_t>(aligned(ceil_div(N * blocks, kTasks)), 64, 512);
  plan.columns = std::clamp<int64_t>(N, 1, columns);
  return plan;
}

int64_t channel_forward_workspace(int64_t B, int64_t C, int64_t N, Dtype dtype, int64_t threads) {
  const ChannelPlan plan = plan_channel(B, C, N);
  const int64_t shared = plan.batch * plan.splits * C * C;
  const int64_t scratch = std::max(product_scratch(plan, dtype, C, 0), result_scratch(plan, dtype, C, 1));
  return accumulator_size(dtype) * (shared + threads * scratch);
}

int64_t channel_backward_workspace(int64_t B, int64_t C, int64_t N, Dtype dtype, int64_t threads) {
  const ChannelPlan plan = plan_channel(B, C, N);
  const int64_t shared = plan.batch * (2 * plan.splits * C * C + C);
  const int64_t scratch = std::max(product_scratch(plan, dtype, C, plan.panel), result_scratch(plan, dtype, C, 2));
  return accumulator_size(dtype) * (shared + threads * scratch);
}

}  // namespace danet
