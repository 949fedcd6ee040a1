// The last pass over a tile: normalise, scale, add, round once, write in the layout of the result.
#pragma once

#include "elements.h"

namespace danet {
namespace {

// attn = acc / l and out = gamma * attn + residual, for [C, bm] blocks; attn and residual are optional.
template <class T, class E>
DANET_SIMD void write_attention(const View<const T>& acc, const T* DANET_RESTRICT l, T gamma,
                                const View<const E>& residual, const View<E>& out, const View<T>& attn) {
  if (attn.data)
    transform(acc, attn, [=](int64_t, int64_t i, T x) __attribute__((always_inline)) { return x / l[i]; });
  transform(acc, out, [=](int64_t c, int64_t i, T x) __attribute__((always_inline)) {
    T y = gamma * (x / l[i]);
    if (residual.data) y += widen(residual.data[c * residual.row_stride + i * residual.column_stride]);
    E element;
    narrow(y, element);
    return element;
  });
}

template <class T, class E>
DANET_SIMD void write_scaled(const View<const T>& source, T factor, const View<E>& destination) {
  transform(source, destination, [=](int64_t, int64_t, T x) __attribute__((always_inline)) {
    E element;
    narrow(factor * x, element);
    return element;
  });
}

// The block of matrix b of `gradient` [rows, columns] that begins at column0 = factor * source, rounded.
template <class T>
void write_gradient(const View<const T>& source, double factor, Dtype dtype, const Output& gradient, int64_t b,
                    int64_t rows, int64_t columns, int64_t column0) {
  with_element<T>(dtype, [&](auto element) {
    using E = decltype(element);
    write_scaled<T, E>(source, T(factor),
                       matrix<E>(gradient, b, rows, columns).block(0, column0, source.rows, source.columns));
  });
}

}  // namespace
}  // namespace danet
