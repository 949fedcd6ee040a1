// Products of bf16 matrices with fp32 sums on CPUs with AVX512-BF16, for which ATen has no GEMM.
//
// vdpbf16ps multiplies pairs: acc += a[2k] * b[2k] + a[2k + 1] * b[2k + 1]. So the contraction runs over pairs everywhere:
//   rows    [rows, 2 * pairs] bf16: a pair is two neighbours in memory, broadcast to all lanes
//   panels  [panels][pairs][64] of two bf16 in 32 bits: 64 lanes of the other operand
#pragma once

#include <algorithm>

#include "elements.h"
#include "features.h"
#include "memory.h"

#if DANET_HAS_BF16_KERNEL
#include <immintrin.h>

namespace danet {
namespace {

// What a product does with the block it writes to.
enum class Onto { kNothing, kSum, kRescaledSum };  // kRescaledSum: lane i of the sum is multiplied with rescale[i] first

// out [R, 64] (+)= rows [R, 2 * pairs] * panel [pairs][64]. R = 6 fills the registers: 24 sums, 4 of the panel, 1 broadcast.
template <int R>
__attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16"))) inline void multiply_rows(
    const uint16_t* rows, int64_t row_stride, const uint32_t* panel, int64_t pairs, Onto onto, const float* rescale,
    float* out, int64_t out_stride) {
  __m512 sum[R][4];
  for (int r = 0; r < R; ++r)
    for (int x = 0; x < 4; ++x) {
      sum[r][x] = onto == Onto::kNothing ? _mm512_setzero_ps() : _mm512_loadu_ps(out + r * out_stride + 16 * x);
      if (onto == Onto::kRescaledSum) sum[r][x] = _mm512_mul_ps(sum[r][x], _mm512_loadu_ps(rescale + 16 * x));
    }
  for (int64_t k = 0; k < pairs; ++k) {
    __m512bh lanes[4];
    for (int x = 0; x < 4; ++x) lanes[x] = (__m512bh)_mm512_loadu_si512(panel + 64 * k + 16 * x);
    for (int r = 0; r < R; ++r) {
      int32_t pair;
      std::memcpy(&pair, rows + r * row_stride + 2 * k, sizeof pair);
      const __m512bh broadcast = (__m512bh)_mm512_set1_epi32(pair);
      for (int x = 0; x < 4; ++x) sum[r][x] = _mm512_dpbf16_ps(sum[r][x], broadcast, lanes[x]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int x = 0; x < 4; ++x) _mm512_storeu_ps(out + r * out_stride + 16 * x, sum[r][x]);
}

// The same for any number of rows.
inline void multiply(const uint16_t* rows, int64_t row_stride, int64_t row_count, const uint32_t* panel, int64_t pairs,
                     Onto onto, const float* rescale, float* out, int64_t out_stride) {
  int64_t r = 0;
  for (; r + 6 <= row_count; r += 6)
    multiply_rows<6>(rows + r * row_stride, row_stride, panel, pairs, onto, rescale, out + r * out_stride, out_stride);
  const uint16_t* rest = rows + r * row_stride;
  float* rest_out = out + r * out_stride;
  switch (row_count - r) {
    case 5: return multiply_rows<5>(rest, row_stride, panel, pairs, onto, rescale, rest_out, out_stride);
    case 4: return multiply_rows<4>(rest, row_stride, panel, pairs, onto, rescale, rest_out, out_stride);
    case 3: return multiply_rows<3>(rest, row_stride, panel, pairs, onto, rescale, rest_out, out_stride);
    case 2: return multiply_rows<2>(rest, row_stride, panel, pairs, onto, rescale, rest_out, out_stride);
    case 1: return multiply_rows<1>(rest, row_stride, panel, pairs, onto, rescale, rest_out, out_stride);
    default: return;
  }
}

// destination [panel of 64 lanes][pair] = the pairs of rows of source [2 * pairs, lanes], zero beyond its edges.
DANET_SIMD void pack_pairs(const View<const BFloat16>& source, int64_t pairs, uint32_t* DANET_RESTRICT destination) {
  const int64_t lanes = std::min(kLanes, source.columns);
  for (int64_t k = 0; k < pairs; ++k) {
    uint32_t* DANET_RESTRICT to = destination + kLanes * k;
    const BFloat16* DANET_RESTRICT low = source.data + 2 * k * source.row_stride;
    const bool has_high = 2 * k + 1 < source.rows;
    const BFloat16* DANET_RESTRICT high = has_high ? low + source.row_stride : low;
    const uint32_t mask = has_high ? 0xffff0000u : 0u;
    if (source.column_stride == 1) {
#pragma omp simd
      for (int64_t i = 0; i < lanes; ++i) to[i] = low[i].bits | ((static_cast<uint32_t>(high[i].bits) << 16) & mask);
    } else {
      for (int64_t i = 0; i < lanes; ++i)
        to[i] = low[i * source.column_stride].bits |
                ((static_cast<uint32_t>(high[i * source.column_stride].bits) << 16) & mask);
    }
    for (int64_t i = lanes; i < kLanes; ++i) to[i] = 0;
  }
}

DANET_SIMD void copy_bits(const View<const BFloat16>& source, const View<BFloat16>& destination) {
  transform(source, destination, [](int64_t, int64_t, BFloat16 x) __attribute__((always_inline)) { return x; });
}

// Panels of matrices [rows, columns] of a batch: the contraction along rows, the lanes along columns.
class PackedPanels {
 public:
  PackedPanels(int64_t rows, int64_t columns, int64_t batch)
      : pairs_((rows + 1) / 2), panels_((columns + kLanes - 1) / kLanes), data_(batch * panels_ * pairs_ * kLanes) {}

  int64_t pairs() const { return pairs_; }
  int64_t panels() const { return panels_; }
  // Panel `panel` of matrix `b` in the batch, from `pair` on.
  const uint32_t* at(int64_t b, int64_t panel, int64_t pair = 0) const {
    return data_.data() + ((b * panels_ + panel) * pairs_ + pair) * kLanes;
  }

  // Packs `count` matrices; source(b) is the b-th.
  template <class Source>
  void pack(int64_t count, const Source& source) {
    constexpr int64_t kPairs = 128;
    const int64_t chunks = (pairs_ + kPairs - 1) / kPairs;
    run_tasks(count * panels_ * chunks, [&](TaskQueue& queue) {
      for (int64_t task; queue.next(task);) {
        const int64_t b = task / (panels_ * chunks), panel = task / chunks % panels_, pair = task % chunks * kPairs;
        const View<const BFloat16> whole = source(b);
        const int64_t row = 2 * pair, column = panel * kLanes, pairs = std::min(kPairs, pairs_ - pair);
        const View<const BFloat16> part =
            whole.block(row, column, std::min(2 * pairs, whole.rows - row), std::min(kLanes, whole.columns - column));
        pack_pairs(part, pairs, const_cast<uint32_t*>(at(b, panel, pair)));
      }
    });
  }

 private:
  int64_t pairs_, panels_;
  Scratch<uint32_t> data_;
};

// Rows of matrices [rows, columns] of a batch: the contraction along columns, padded with a zero to an even number.
class PackedRows {
 public:
  PackedRows(int64_t rows, int64_t columns, int64_t batch)
      : rows_(rows), columns_(columns), stride_((columns + 1) / 2 * 2), data_(batch * rows * stride_) {}

  int64_t stride() const { return stride_; }
  const uint16_t* at(int64_t b, int64_t row, int64_t column = 0) const {
    return data_.data() + (b * rows_ + row) * stride_ + column;
  }

  template <class Source>
  void pack(int64_t count, const Source& source) {
    constexpr int64_t kRows = 64;
    const int64_t chunks = (rows_ + kRows - 1) / kRows;
    run_tasks(count * chunks, [&](TaskQueue& queue) {
      for (int64_t task; queue.next(task);) {
        const int64_t b = task / chunks, row = task % chunks * kRows, height = std::min(kRows, rows_ - row);
        uint16_t* to = const_cast<uint16_t*>(at(b, row));
        copy_bits(source(b).block(row, 0, height, columns_),
                  View<BFloat16>{reinterpret_cast<BFloat16*>(to), height, columns_, stride_, 1});
        if (stride_ != columns_)
          for (int64_t r = 0; r < height; ++r) to[r * stride_ + columns_] = 0;
      }
    });
  }

 private:
  int64_t rows_, columns_, stride_;
  Scratch<uint16_t> data_;
};

}  // namespace
}  // namespace danet
#endif
