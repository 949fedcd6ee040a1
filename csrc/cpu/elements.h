// The element types of tensors, and copies of matrices between them.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstdint>

#include "../launch.h"
#include "matmul.h"
#include "parallel.h"
#include "simd.h"

namespace danet {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// Element -> accumulator type: widening is exact.
DANET_INLINE double widen(double x) { return x; }
DANET_INLINE float widen(float x) { return x; }
DANET_INLINE float widen(BFloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float y;
  std::memcpy(&y, &bits, sizeof y);
  return y;
}
DANET_INLINE float widen(Float16 x) { return torch::headeronly::detail::fp16_ieee_to_fp32_value(x.bits); }

// Bits of a float rounded to bf16, to nearest and even. NaN stays NaN (the sum would carry into infinity and beyond).
DANET_INLINE uint32_t bfloat16_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return x != x ? 0x7fc0u : rounded;
}

// Accumulator type -> element: rounds once.
DANET_INLINE void narrow(double x, double& y) { y = x; }
DANET_INLINE void narrow(float x, float& y) { y = x; }
DANET_INLINE void narrow(float x, BFloat16& y) { y.bits = static_cast<uint16_t>(bfloat16_bits(x)); }
DANET_INLINE void narrow(float x, Float16& y) { y.bits = torch::headeronly::detail::fp16_ieee_from_fp32_value(x); }

// Calls f with a value of the element type that `dtype` names; T is the accumulator type that goes with it.
template <class T, class F>
void with_element(Dtype dtype, const F& f) {
  if constexpr (std::is_same_v<T, double>) {
    f(double{});
  } else {
    switch (dtype) {
      case Dtype::kBFloat16: return f(BFloat16{});
      case Dtype::kFloat16: return f(Float16{});
      default: return f(float{});
    }
  }
}

// Matrix `b` of a batch, as elements of type E.
template <class E>
View<const E> matrix(const Input& m, int64_t b, int64_t rows, int64_t columns) {
  return {static_cast<const E*>(m.data) + b * m.batch_stride, rows, columns, m.row_stride, m.column_stride};
}
template <class E>
View<E> matrix(const Output& m, int64_t b, int64_t rows, int64_t columns) {
  return {static_cast<E*>(m.data) + b * m.batch_stride, rows, columns, m.row_stride, m.column_stride};
}

// destination[r, c] = f(r, c, source[r, c]), walking so that the writes run along cache lines in either layout.
template <class S, class E, class F>
DANET_INLINE void transform(const View<const S>& source, const View<E>& destination, const F& f) {
  constexpr int64_t kBlock = 16;
  const int64_t rows = destination.rows, columns = destination.columns;
  if (destination.column_stride == 1 && source.column_stride == 1) {
    for (int64_t r = 0; r < rows; ++r) {
      const S* DANET_RESTRICT from = source.data + r * source.row_stride;
      E* DANET_RESTRICT to = destination.data + r * destination.row_stride;
#pragma omp simd
      for (int64_t c = 0; c < columns; ++c) to[c] = f(r, c, from[c]);
    }
    return;
  }
  for (int64_t r0 = 0; r0 < rows; r0 += kBlock) {
    for (int64_t c0 = 0; c0 < columns; c0 += kBlock) {
      const int64_t r1 = std::min(r0 + kBlock, rows), c1 = std::min(c0 + kBlock, columns);
      for (int64_t c = c0; c < c1; ++c)
        for (int64_t r = r0; r < r1; ++r)
          destination.data[r * destination.row_stride + c * destination.column_stride] =
              f(r, c, source.data[r * source.row_stride + c * source.column_stride]);
    }
  }
}

namespace {

// to += from, matrices whose rows are contiguous.
template <class T>
DANET_SIMD void add(const View<const T>& from, const View<T>& to) {
  for (int64_t r = 0; r < to.rows; ++r) {
    const T* DANET_RESTRICT source = from.data + r * from.row_stride;
    T* DANET_RESTRICT destination = to.data + r * to.row_stride;
#pragma omp simd
    for (int64_t c = 0; c < to.columns; ++c) destination[c] += source[c];
  }
}

}  // namespace
}  // namespace danet
