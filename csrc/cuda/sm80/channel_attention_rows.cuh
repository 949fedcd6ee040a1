// Between the products of channel attention, row by row of the matrices [C, C]: logits and statistics of their softmax,
// and in the backward the gradient of G. A matrix has rows of whole tiles, `row_length` elements each.
#pragma once

#include <cmath>

#include "sm80/channel_attention_tiles.cuh"

namespace danet {

constexpr int kChannelRowThreads = 256;
constexpr int kChannelRows = kChannelRowThreads / 32;  // of a block: one for each warp
constexpr int kLaneColumns = kChannelTile / 32;     // of a tile, of each lane: lane, lane + 32, ...
static_assert(kChannelTile % kChannelRows == 0, "the rows of a block lie in one row of tiles");

// A tile [kChannelRows, kChannelTile] in shared memory, written by one mapping of threads and read by another. Its
// lines are 4 banks apart, so that 8 rows of 4 columns are in different ones.
struct RowsSharedMemory {
  static constexpr int kLine = kChannelTile + 4;
  static constexpr int kBytes = kChannelRows * kLine * static_cast<int>(sizeof(float));

  static DANET_DEVICE float& at(int row, int column) {
    return reinterpret_cast<float*>(shared_memory())[row * kLine + column];
  }
};

struct ChannelSoftmaxParameters {
  const float* partial;  // [B, tiles, splits, kChannelTile, kChannelTile]: tiles of G, and of H if that is wanted
  float* logits;         // [B, C, row_length]: sign G, past the end of its rows -inf
  float* row_max;        // [B, C]
  float* row_sum;        // [B, C]
  float* dweights;       // [B, C, row_length]: H, optional
  float* delta;          // [B, C]: r, optional as H
  int C;
  int splits;
  bool official;  // the sign of the logits is -1
};

struct ChannelDgramParameters {
  const float* logits;    // [B, C, row_length]
  const float* dweights;  // [B, C, row_length]: H
  const float* row_max;   // [B, C]
  const float* row_sum;   // [B, C]
  const float* delta;     // [B, C]: r
  Gamma gamma;
  void* dgram;     // [B, C, row_length] of `dtype`: dG + dG^T, past the end of its rows 0
  Dtype dtype;
  float* magnify;  // [B, C]: powers of two that bring the rows of dgram into the range of fp16, optional
  int C;
  bool official;
};

// Sums over `splits` of kLaneColumns elements of a tile, from the first to the last, at offsets within a tile.
DANET_DEVICE void sum_of_parts(float (&sums)[kLaneColumns], const float* tile, const int (&offsets)[kLaneColumns],
                               int splits) {
#pragma unroll
  for (int i = 0; i < kLaneColumns; ++i) sums[i] = 0.0f;
#pragma unroll 8
  for (int split = 0; split < splits; ++split) {
#pragma unroll
    for (int i = 0; i < kLaneColumns; ++i) sums[i] += tile[offsets[i]];
    tile += kChannelTile * kChannelTile;
  }
}

// Thread t of a transposing access takes elements t, t + kChannelRowThreads, ... of [kChannelTile columns,
// kChannelRows], so that a warp reads whole sectors of memory where rows of the result are columns there.
DANET_DEVICE int transposed_row(int i) { return (thread_index() + i * kChannelRowThreads) % kChannelRows; }
DANET_DEVICE int transposed_column(int i) { return (thread_index() + i * kChannelRowThreads) / kChannelRows; }

// The logits sign G, and of each row the max and the sum of exp(logit - max); also H and r = sum_i P_ci H_ci.
// Grid: (C / kChannelRows * B). Each block owns kChannelRows rows of one batch element, each warp one of them.
DANET_KERNEL(kChannelRowThreads, 4) channel_attention_softmax_kernel(ChannelSoftmaxParameters p) {
  const int row_blocks = (p.C + kChannelRows - 1) / kChannelRows;
  const int64_t batch = block_index() / row_blocks;
  const int first_row = static_cast<int>(block_index() % row_blocks) * kChannelRows;
  const int row = first_row + warp_index();
  const int blocks = tiles_along(p.C);
  const int64_t tiles = gram_tiles(blocks) + (p.dweights != nullptr ? blocks * blocks : 0);
  const int64_t tile_elements = int64_t{p.splits} * (kChannelTile * kChannelTile);
  const float* const gram = p.partial + batch * tiles * tile_elements;
  const int row_block = first_row / kChannelTile, row_in_block = first_row % kChannelTile;
  const int64_t line = (batch * p.C + row) * blocks * kChannelTile;  // where the row of the warp begins

  float m = -infinity();  // running max of the columns that the lane has seen
  float l = 0.0f;         // running sum
  float r = 0.0f;         // running sum of p H
  for (int block = 0; block < blocks; ++block) {
    // 1. G: below the diagonal, also within a tile, its mirror image.
    const int low = row_block < block ? row_block : block, high = row_block < block ? block : row_block;
    const bool below = block < row_block;
    int offsets[kLaneColumns];
#pragma unroll
    for (int i = 0; i < kLaneColumns; ++i) {
      const int own_row = row_in_block + (below ? transposed_row(i) : warp_index());
      const int own_column = below ? transposed_column(i) : lane_index() + 32 * i;
      const bool mirror = below || (block == row_block && own_column < own_row);
      offsets[i] = mirror ? own_column * kChannelTile + own_row : own_row * kChannelTile + own_column;
    }
    float g[kLaneColumns];
    sum_of_parts(g, gram + (gram_tiles(high) + low) * tile_elements, offsets, p.splits);
    if (below) {
      synchronize();
#pragma unroll
      for (int i = 0; i < kLaneColumns; ++i) RowsSharedMemory::at(transposed_row(i), transposed_column(i)) = g[i];
      synchronize();
#pragma unroll
      for (int i = 0; i < kLaneColumns; ++i) g[i] = RowsSharedMemory::at(warp_index(), lane_index() + 32 * i);
    }

    // 2. H.
    float h[kLaneColumns] = {};
    if (p.dweights != nullptr) {
#pragma unroll
      for (int i = 0; i < kLaneColumns; ++i) {
        offsets[i] = (row_in_block + warp_index()) * kChannelTile + lane_index() + 32 * i;
      }
      sum_of_parts(h, gram + (gram_tiles(blocks) + row_block * blocks + block) * tile_elements, offsets, p.splits);
    }

    // 3. Online softmax, of the lane's columns.
    float s[kLaneColumns];
    float new_m = m;
#pragma unroll
    for (int i = 0; i < kLaneColumns; ++i) {
      const bool inside = block * kChannelTile + lane_index() + 32 * i < p.C;
      s[i] = inside ? (p.official ? -g[i] : g[i]) : -infinity();
      new_m = fmaxf(new_m, s[i]);
    }
    const float safe_m = new_m == -infinity() ? 0.0f : new_m;  // no inf - inf before the first finite logit
    const float shrink = exp2_fast((m - safe_m) * kLog2e);
    m = new_m;
    l *= shrink;
    r *= shrink;
#pragma unroll
    for (int i = 0; i < kLaneColumns; ++i) {
      const int column = block * kChannelTile + lane_index() + 32 * i;
      float weight = exp2_fast((s[i] - safe_m) * kLog2e);
      if (p.official && column < p.C && s[i] == -infinity()) weight = not_a_number();  // rowmax(G) - G is inf - inf
      l += weight;
      if (column < p.C) r += weight * h[i];
      if (row >= p.C) continue;
      p.logits[line + column] = s[i];
      if (p.dweights != nullptr) p.dweights[line + column] = h[i];
    }
  }

  // 4. Statistics of the row from those of the lanes. A lane that saw nothing has the max -inf and the sum 0.
  const float row_m = warp_max(m);
  const float safe_m = row_m == -infinity() ? 0.0f : row_m;
  const float shrink = exp2_fast((m - safe_m) * kLog2e);
  const float row_l = warp_sum(l * shrink), row_r = warp_sum(r * shrink);
  if (row >= p.C || lane_index() != 0) return;
  p.row_max[batch * p.C + row] = row_m;
  p.row_sum[batch * p.C + row] = row_l;
  if (p.delta != nullptr) p.delta[batch * p.C + row] = row_r / row_l;
}

// dG + dG^T of the warp's row, at the lane's columns of a block; 0 outside of the matrix. All threads of the block take
// part.
DANET_DEVICE void rows_of_dgram(float (&w)[kLaneColumns], const ChannelDgramParameters& p, int64_t batch, int first_row,
                                int block) {
  // 1. H^T, by way of shared memory.
  const int row_length = tiles_along(p.C) * kChannelTile;
  const int64_t statistics = batch * p.C;
  synchronize();
#pragma unroll
  for (int i = 0; i < kLaneColumns; ++i) {
    const int row = first_row + transposed_row(i), column = block * kChannelTile + transposed_column(i);
    const bool inside = row < p.C && column < p.C;
    RowsSharedMemory::at(transposed_row(i), transposed_column(i)) =
        inside ? p.dweights[(statistics + column) * row_length + row] : 0.0f;
  }
  synchronize();

  // 2. dG + dG^T.
  const int row = first_row + warp_index();
#pragma unroll
  for (int i = 0; i < kLaneColumns; ++i) {
    const int column = block * kChannelTile + lane_index() + 32 * i;
    w[i] = 0.0f;
    if (row >= p.C || column >= p.C) continue;
    const int64_t own = statistics + row, mirrored = statistics + column;
    const float s = p.logits[own * row_length + column];
    const float h = p.dweights[own * row_length + column];
    const float h_mirrored = RowsSharedMemory::at(warp_index(), lane_index() + 32 * i);
    const float weight = exp2_fast((s - p.row_max[own]) * kLog2e) / p.row_sum[own];
    const float weight_mirrored = exp2_fast((s - p.row_max[mirrored]) * kLog2e) / p.row_sum[mirrored];
    const float sum = weight * (h - p.delta[own]) + weight_mirrored * (h_mirrored - p.delta[mirrored]);
    w[i] = p.official ? -sum : sum;
  }
}

// dG + dG^T, the gradient of G through both of its factors, without gamma.
// Grid: (C / kChannelRows * B). Each block owns kChannelRows rows of one batch element, each warp one of them.
DANET_KERNEL(kChannelRowThreads, 2) channel_attention_dgram_kernel(ChannelDgramParameters p) {
  if (p.gamma.load() == 0.0f) return;  // then nobody reads the result
  const int row_blocks = (p.C + kChannelRows - 1) / kChannelRows;
  const int64_t batch = block_index() / row_blocks;
  const int first_row = static_cast<int>(block_index() % row_blocks) * kChannelRows;
  const int row = first_row + warp_index();
  const int blocks = tiles_along(p.C);
  float w[kLaneColumns];

  // 1. What brings the largest element of the row to 2^14 or above, and not above 2^15.
  float factor = 1.0f;
  if (p.magnify != nullptr) {
    float largest = 0.0f;
    for (int block = 0; block < blocks; ++block) {
      rows_of_dgram(w, p, batch, first_row, block);
#pragma unroll
      for (int i = 0; i < kLaneColumns; ++i) largest = fmaxf(largest, fabsf(w[i]));
    }
    const float exponent = floorf(15.0f - log2f(warp_max(largest)));
    factor = ldexpf(1.0f, static_cast<int>(fminf(fmaxf(exponent, -100.0f), 40.0f)));
    if (row < p.C && lane_index() == 0) p.magnify[batch * p.C + row] = factor;
  }

  // 2. Write.
  for (int block = 0; block < blocks; ++block) {
    rows_of_dgram(w, p, batch, first_row, block);
    if (row >= p.C) continue;
    const int64_t line = (batch * p.C + row) * blocks * kChannelTile + block * kChannelTile;
#pragma unroll
    for (int i = 0; i < kLaneColumns; ++i) {
      const int64_t element = line + lane_index() + 32 * i;
      const float value = w[i] * factor;
      switch (p.dtype) {
        case Dtype::kBFloat16: static_cast<BFloat16*>(p.dgram)[element] = from_float<BFloat16>(value); break;
        case Dtype::kFloat16: static_cast<Float16*>(p.dgram)[element] = from_float<Float16>(value); break;
        default: static_cast<float*>(p.dgram)[element] = value;
      }
    }
  }
}

}  // namespace danet
