// Passes over tiles of transposed scores S [bn keys, bm queries]: the queries run along the lanes, so maxima and sums over
// keys need no horizontal step. Included by the kernels' sources, each of which compiles its own clones.
#pragma once

#include <algorithm>

#include "simd.h"

namespace danet {
namespace {

// First half of an online softmax step over `count` columns: the running maximum m of scale * scores is brought up to date.
// correction is what sums over earlier tiles must be multiplied with, shift what to subtract from the logits.
template <class T>
DANET_INLINE void running_maximum(const T* DANET_RESTRICT scores, int64_t bn, int64_t stride, int64_t count, T scale,
                                  T* DANET_RESTRICT m, T* DANET_RESTRICT correction, T* DANET_RESTRICT shift) {
  for (int64_t i = 0; i < count; ++i) shift[i] = m[i];
  for (int64_t j = 0; j < bn; ++j) {
    const T* DANET_RESTRICT row = scores + j * stride;
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
      const T logit = row[i] * scale;
      shift[i] = logit > shift[i] ? logit : shift[i];
    }
  }
  for (int64_t i = 0; i < count; ++i) {
    correction[i] = m[i] == shift[i] ? T(1) : fast_exp(m[i] - shift[i]);
    m[i] = shift[i];
    // Where nothing but -inf has been seen, subtracting the maximum would be (-inf) - (-inf).
    shift[i] = shift[i] == -std::numeric_limits<T>::infinity() ? T(0) : shift[i];
  }
}

// `count` columns of an online softmax step; see online_softmax. Count is a constant for whole chunks of lanes.
template <class T>
DANET_INLINE void online_softmax_columns(T* DANET_RESTRICT scores, int64_t bn, int64_t stride, int64_t count, T scale,
                                         T* DANET_RESTRICT m, T* DANET_RESTRICT l, T* DANET_RESTRICT correction) {
  T shift[kLanes], sum[kLanes];
  running_maximum<T>(scores, bn, stride, count, scale, m, correction, shift);
  for (int64_t i = 0; i < count; ++i) sum[i] = 0;
  // Summed in runs, then the runs: one long chain of additions would lose a digit.
  constexpr int64_t kRun = 16;
  for (int64_t j0 = 0; j0 < bn; j0 += kRun) {
    T run[kLanes];
    for (int64_t i = 0; i < count; ++i) run[i] = 0;
    for (int64_t j = j0; j < std::min(j0 + kRun, bn); ++j) {
      T* DANET_RESTRICT row = scores + j * stride;
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) {
        const T p = fast_exp(row[i] * scale - shift[i]);
        row[i] = p;
        run[i] += p;
      }
    }
    for (int64_t i = 0; i < count; ++i) sum[i] += run[i];
  }
  for (int64_t i = 0; i < count; ++i) l[i] = l[i] * correction[i] + sum[i];
}

// One step of the online softmax: scores become exp(scale * scores - m) with the running maximum m [bm] and sum l [bm] brought
// up to date; correction [bm] is what sums over earlier tiles must be multiplied with.
template <class T>
DANET_SIMD void online_softmax(T* scores, int64_t bn, int64_t bm, int64_t stride, T scale, T* m, T* l, T* correction) {
  int64_t i = 0;
  for (; i + kLanes <= bm; i += kLanes)
    online_softmax_columns<T>(scores + i, bn, stride, kLanes, scale, m + i, l + i, correction + i);
  if (i < bm) online_softmax_columns<T>(scores + i, bn, stride, bm - i, scale, m + i, l + i, correction + i);
}

}  // namespace
}  // namespace danet
