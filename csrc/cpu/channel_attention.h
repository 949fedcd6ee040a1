// What the forward and the backward of channel attention share, once G is there.
#pragma once

#include "gram.h"

namespace danet {
namespace {

constexpr int64_t kRowLanes = 16;  // sums along a row keep so many partial sums, whatever the instruction set

// Blocks of the result are made in its layout, and so are the products and their left factors: GEMMs and the last pass then run
// along contiguous memory.
inline bool channels_contiguous(const Output& out) { return out.row_stride == 1 && out.column_stride != 1; }
template <class T>
View<T> block_of(T* data, int64_t rows, int64_t columns, bool channels_contiguous) {
  return channels_contiguous ? View<T>{data, rows, columns, 1, rows} : View<T>{data, rows, columns, columns, 1};
}

enum class Statistics { kOfRows, kOfColumns };

// P = exp(sign * G - max) / sum, for a block of G.
template <class T>
DANET_SIMD void probabilities(const View<const T>& G, T sign, const T* max, const T* sum, Statistics of, T* P) {
  for (int64_t r = 0; r < G.rows; ++r) {
    const T* DANET_RESTRICT from = G.data + r * G.row_stride;
    T* DANET_RESTRICT to = P + r * G.columns;
    if (of == Statistics::kOfRows) {
      const T row_max = max[r], row_sum = sum[r];
#pragma omp simd
      for (int64_t c = 0; c < G.columns; ++c) to[c] = fast_exp(sign * from[c] - row_max) / row_sum;
    } else {
#pragma omp simd
      for (int64_t c = 0; c < G.columns; ++c) to[c] = fast_exp(sign * from[c] - max[c]) / sum[c];
    }
  }
}

enum class Map { kPlain, kTransposed };

// Rows row .. row + rows of P, or of its transpose, [rows, C] in `data`. G is symmetric: of its rows and its columns, those are
// read that run along the memory written.
template <class T>
View<const T> rows_of_map(const View<const T>& G, Map map, int64_t row, int64_t rows, T sign, const T* max, const T* sum,
                          bool channels_contiguous, T* data) {
  const int64_t C = G.columns, at = map == Map::kPlain ? row : 0;
  const bool of_rows = (map == Map::kPlain) != channels_contiguous;
  probabilities<T>(channels_contiguous ? G.block(0, row, C, rows) : G.block(row, 0, rows, C), sign, max + at, sum + at,
                   of_rows ? Statistics::kOfRows : Statistics::kOfColumns, data);
  return block_of<const T>(data, rows, C, channels_contiguous);
}

// out = gamma * (first + second) + residual, rounded once. first and second, which is optional, lie in the layout of out.
template <class T, class E>
DANET_SIMD void blend(const View<const T>& first, const T* second, T gamma, View<const E> residual, View<E> out) {
  if (first.column_stride != 1) {
    out = out.transposed();
    residual = residual.transposed();
  }
  for (int64_t r = 0; r < out.rows; ++r) {
    const T* DANET_RESTRICT a = first.data + r * out.columns;
    const T* DANET_RESTRICT b = second ? second + r * out.columns : nullptr;
    const E* DANET_RESTRICT x = residual.data + r * residual.row_stride;
    E* DANET_RESTRICT to = out.data + r * out.row_stride;
    const auto line = [=](auto value) __attribute__((always_inline)) {
      if (out.column_stride == 1) {
#pragma omp simd
        for (int64_t c = 0; c < out.columns; ++c) narrow(value(c), to[c]);
      } else {
        for (int64_t c = 0; c < out.columns; ++c) narrow(value(c), to[c * out.column_stride]);
      }
    };
    const auto with_residual = [=](auto product) __attribute__((always_inline)) {
      if (!residual.data) {
        line([=](int64_t c) __attribute__((always_inline)) { return gamma * product(c); });
      } else if (residual.column_stride == 1) {
        line([=](int64_t c) __attribute__((always_inline)) { return gamma * product(c) + widen(x[c]); });
      } else {
        line([=](int64_t c)
                 __attribute__((always_inline)) { return gamma * product(c) + widen(x[c * residual.column_stride]); });
      }
    };
    if (b) {
      with_residual([=](int64_t c) __attribute__((always_inline)) { return a[c] + b[c]; });
    } else {
      with_residual([=](int64_t c) __attribute__((always_inline)) { return a[c]; });
    }
  }
}

}  // namespace
}  // namespace danet
