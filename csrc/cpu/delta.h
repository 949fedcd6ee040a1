// delta_i = dout_i . attn_i, the first step of the position attention backward.
#pragma once

#include "elements.h"
#include "memory.h"

namespace danet {
namespace {

// delta[i] = sum_c dout[c, i] * attn[c, i] over a block of columns. Summed in fp64, as dgamma is the sum of them all, which is
// returned.
template <class T, class E>
DANET_SIMD double row_dots(const View<const E>& dout, const View<const T>& attn, T* DANET_RESTRICT delta) {
  double total = 0;
  for (int64_t i0 = 0; i0 < dout.columns; i0 += kLanes) {
    const int64_t count = std::min(kLanes, dout.columns - i0);
    double sums[kLanes] = {};
    for (int64_t c = 0; c < dout.rows; ++c) {
      const E* DANET_RESTRICT g = dout.data + c * dout.row_stride + i0 * dout.column_stride;
      const T* DANET_RESTRICT a = attn.data + c * attn.row_stride + i0 * attn.column_stride;
#pragma omp simd
      for (int64_t i = 0; i < count; ++i)
        sums[i] += static_cast<double>(widen(g[i * dout.column_stride])) * static_cast<double>(a[i * attn.column_stride]);
    }
    for (int64_t i = 0; i < count; ++i) {
      delta[i0 + i] = static_cast<T>(sums[i]);
      total += sums[i];
    }
  }
  return total;
}

// delta [count, stride] of `count` batch elements from b0 on, in blocks of BM queries. Returns their sum: the gradient of gamma.
template <class T>
double compute_delta(const PositionBackward& p, int64_t b0, int64_t count, int64_t BM, int64_t stride, T* delta) {
  const int64_t blocks = (p.M + BM - 1) / BM;
  Scratch<double> totals(count * blocks);
  run_tasks(count * blocks, [&](TaskQueue& queue) {
    for (int64_t task; queue.next(task);) {
      const int64_t b = task / blocks, i0 = task % blocks * BM, bm = std::min(BM, p.M - i0);
      const View<const T> attn = matrix<T>(p.attn, b0 + b, p.C, p.M).block(0, i0, p.C, bm);
      with_element<T>(p.dtype, [&](auto element) {
        using E = decltype(element);
        const View<const E> dout = matrix<E>(p.dout, b0 + b, p.C, p.M).block(0, i0, p.C, bm);
        totals.data()[task] = row_dots<T, E>(dout, attn, delta + b * stride + i0);
      });
    }
  });
  double total = 0;
  for (int64_t task = 0; task < count * blocks; ++task) total += totals.data()[task];
  return total;
}

}  // namespace
}  // namespace danet
