#include "cuda/channel_plan.h"

#include <algorithm>

namespace danet {
namespace {

constexpr int64_t kLeastSplit = 256;  // positions
// Of the time for a tile: what it takes to write one more partial sum and to read it; 256 positions of a usual crop.
constexpr double kSplitCost = 1.0 / 36.0;
constexpr int64_t kMostRounds = 8;
constexpr int64_t kTileBytes = int64_t{4} * kChannelTile * kChannelTile;

}  // namespace

int64_t channel_cuda_splits(int64_t B, int64_t C, int64_t N, bool backward, int64_t multiprocessors) {
  const int64_t tiles = std::max<int64_t>(B * channel_cuda_tiles(C, backward), 1);
  const int64_t most = std::max<int64_t>(std::min(N / kLeastSplit, kMostRounds * multiprocessors / tiles), 1);
  const auto cost = [&](int64_t splits) {
    const auto rounds = static_cast<double>(ceil_div(tiles * splits, multiprocessors));
    return rounds * (1.0 / static_cast<double>(splits) + kSplitCost);
  };
  int64_t best = 1;
  for (int64_t splits = 2; splits <= most; ++splits) {
    if (cost(splits) < cost(best)) best = splits;
  }
  return std::max<int64_t>(ceil_div(N, std::max<int64_t>(channel_cuda_split_positions(N, best), 1)), 1);
}

int64_t channel_cuda_image_bytes(int64_t C, Dtype dtype, bool backward) {
  const int64_t matrix = C * channel_cuda_blocks(C) * kChannelTile;
  return channel_cuda_tiles(C, backward) * kTileBytes + matrix * (backward ? 8 + element_size(dtype) : 4);
}

int64_t channel_cuda_images_at_once(int64_t C, Dtype dtype, bool backward) {
  const int64_t bytes = std::max<int64_t>(channel_cuda_image_bytes(C, dtype, backward), 1);
  return std::max<int64_t>(kChannelLargestWorkspace / bytes, 1);
}

int64_t channel_cuda_workspace(int64_t B, int64_t C, int64_t N, Dtype dtype, bool backward, int64_t multiprocessors) {
  const int64_t images = std::min(B, channel_cuda_images_at_once(C, dtype, backward));
  const int64_t row_bytes = backward ? C * 4 * (dtype == Dtype::kFloat16 ? 3 : 2) : 0;  // row_max, row_sum, magnify
  const auto bytes = [&](int64_t together) {
    const int64_t more_sums = channel_cuda_splits(together, C, N, backward, multiprocessors) - 1;
    return together * (channel_cuda_image_bytes(C, dtype, backward) + row_bytes +
                       more_sums * channel_cuda_tiles(C, backward) * kTileBytes);
  };
  if (images == 0) return 0;
  // The last images of a batch may be fewer, and their tiles in more splits. All images have their delta.
  return std::max(bytes(images), bytes(B % images)) + (backward ? B * C * 4 : 0);
}

}  // namespace danet
