// Passes over tiles of transposed scores S [bn keys, bm queries]: the queries run along the lanes, so maxima and sums over
// keys need no horizontal step. Included by the kernels' sources, each of which compiles its own clones.
#pragma once

#include <algorithm>

#include "simd.h"

namespace danet {
namespace {

// Columns i0 .. i0 + count of an online softmax step; see online_softmax. Count is a constant for whole chunks of lanes.
template <class T>
DANET_INLINE void online_softmax_columns(T* DANET_RESTRICT scores, int64_t bn, int64_t stride, int64_t count, T scale,
                                         T* DANET_RESTRICT m, T* DANET_RESTRICT l, T* DANET_RESTRICT correction) {
  T new_max[kLanes], sum[kLanes];
  for (int64_t i = 0; i < count; ++i) {
    new_max[i] = m[i];
    sum[i] = 0;
  }
  for (int64_t j = 0; j < bn; ++j) {
    const T* DANET_RESTRICT row = scores + j * stride;
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
      const T logit = row[i] * scale;
      new_max[i] = logit > new_max[i] ? logit : new_max[i];
    }
  }
  for (int64_t i = 0; i < count; ++i) {
    // Where nothing but -inf has been seen, subtracting the maximum would be (-inf) - (-inf).
    const bool nothing = new_max[i] == -std::numeric_limits<T>::infinity();
    correction[i] = m[i] == new_max[i] ? T(1) : fast_exp(m[i] - new_max[i]);
    m[i] = new_max[i];
    new_max[i] = nothing ? T(0) : new_max[i];
  }
  // Summed in runs, then the runs: one long chain of additions would lose a digit.
  constexpr int64_t kRun = 16;
  for (int64_t j0 = 0; j0 < bn; j0 += kRun) {
    T run[kLanes];
    for (int64_t i = 0; i < count; ++i) run[i] = 0;
    for (int64_t j = j0; j < std::min(j0 + kRun, bn); ++j) {
      T* DANET_RESTRICT row = scores + j * stride;
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) {
        const T p = fast_exp(row[i] * scale - new_max[i]);
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
