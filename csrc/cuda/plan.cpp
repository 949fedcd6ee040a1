#include "plan.h"

#include <algorithm>

namespace danet {

int64_t position_splits(int64_t B, int64_t L, int64_t K, int64_t D, Dtype dtype, int64_t multiprocessors) {
  const bool wide = dtype == Dtype::kFloat32;
  const int64_t rows = wide ? PositionTiles<float>::kRows : PositionTiles<uint16_t>::kRows;
  const int64_t columns = wide ? PositionTiles<float>::kColumns : PositionTiles<uint16_t>::kColumns;
  const int64_t tiles = ceil_div(L, rows) * ceil_div(D, int64_t{kBlockD}) * B;
  const int64_t slots = kBlocksPerMultiprocessor * multiprocessors;
  const int64_t most = std::clamp<int64_t>(kMostRounds * slots / tiles, 1, ceil_div(K, columns));
  // A sum more costs a 200th of a tile: it is written and read again.
  const auto cost = [&](int64_t splits) {
    return static_cast<double>(ceil_div(tiles * splits, slots)) / static_cast<double>(splits) +
           0.005 * static_cast<double>(splits);
  };
  int64_t best = 1;
  for (int64_t splits = 2; splits <= most; ++splits) {
    if (cost(splits) < cost(best)) best = splits;
  }
  const int64_t length = position_split_length(K, columns, best);
  return ceil_div(K, length);
}

HopperRounds hopper_rounds(int64_t B, int64_t C, int64_t L, int64_t K, int64_t multiprocessors) {
  const int64_t tiles = ceil_div(L, kHopperBlocks * kHopperRows) * ceil_div(C, kHopperChannels) * B;
  const int64_t at_once = std::max<int64_t>(multiprocessors / kHopperBlocks, 1), steps = ceil_div(K, kHopperColumns);
  HopperRounds rounds;
  rounds.steps = steps;
  rounds.whole = tiles / at_once * at_once;
  rounds.shared = tiles - rounds.whole;
  if (rounds.shared == 0) return rounds;
  rounds.steps = ceil_div(steps, std::min(at_once / rounds.shared, steps));
  rounds.splits = ceil_div(steps, rounds.steps);
  return rounds;
}

}  // namespace danet
