// What the forward and the backward of channel attention share, once G is there.
#pragma once

#include "gram.h"

namespace danet {
namespace {

constexpr int64_t kRowLanes = 16;  // sums along a row keep so many partial sums, whatever the instruction set

// The layout of a block of the result: products are made in it, so that the last pass runs along contiguous memory.
template <class T, class E>
View<T> product_like(const View<E>& out, T* data) {
  return out.row_stride == 1 && out.column_stride != 1 ? View<T>{data, out.rows, out.columns, 1, out.rows}
                                                       : View<T>{data, out.rows, out.columns, out.columns, 1};
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
