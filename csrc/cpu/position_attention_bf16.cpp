// Position attention forward in bf16 with vdpbf16ps. The shape of the fp32 kernel (position_attention_fwd.cpp) with its own
// GEMM: queries in panels of 64 lanes, probabilities rounded to bf16 and packed as pairs by the softmax, sums in fp32. For
// inference: it does not keep attn.
#include <cmath>

#include "../plan.h"
#include "bf16.h"
#include "epilogue.h"
#include "softmax.h"

namespace danet {

#if DANET_HAS_BF16_KERNEL
namespace {

// One step of the online softmax (softmax.h) over a panel: scores [bn][64] become pairs [bn / 2][64] of exp(scale * s - m).
// The sum l is over the unrounded values.
DANET_SIMD void online_softmax_pairs(const float* DANET_RESTRICT scores, int64_t bn, float scale, float* DANET_RESTRICT m,
                                     float* DANET_RESTRICT l, float* DANET_RESTRICT correction,
                                     uint32_t* DANET_RESTRICT pairs) {
  float shift[kLanes], sum[kLanes] = {};
  running_maximum<float>(scores, bn, kLanes, kLanes, scale, m, correction, shift);
  int64_t j = 0;
  for (; j + 2 <= bn; j += 2) {
    const float* DANET_RESTRICT row = scores + j * kLanes;
    uint32_t* DANET_RESTRICT to = pairs + j / 2 * kLanes;
#pragma omp simd
    for (int i = 0; i < kLanes; ++i) {
      const float p0 = fast_exp(row[i] * scale - shift[i]), p1 = fast_exp(row[kLanes + i] * scale - shift[i]);
      sum[i] += p0 + p1;
      to[i] = bfloat16_bits(p0) | (bfloat16_bits(p1) << 16);
    }
  }
  if (j < bn) {
    for (int i = 0; i < kLanes; ++i) {
      const float p = fast_exp(scores[j * kLanes + i] * scale - shift[i]);
      sum[i] += p;
      pairs[j / 2 * kLanes + i] = bfloat16_bits(p);
    }
  }
  for (int i = 0; i < kLanes; ++i) l[i] = l[i] * correction[i] + sum[i];
}

}  // namespace

void position_attention_forward_bf16(const PositionForward& p) {
  const PositionForwardPlan plan = plan_position_forward(p.B, p.C, p.M, p.N);
  const int64_t BN = plan.block_n, panels_per_task = ceil_div(plan.block_m, kLanes);
  const int64_t blocks = ceil_div(p.M, panels_per_task * kLanes);
  // Rows of V are pairs of keys already, unless N is odd or V is channels_last.
  const bool value_in_place = p.value.column_stride == 1 && p.N % 2 == 0;
  PackedPanels query(p.D, p.M, plan.batch);                          // [D / 2] pairs, lanes are queries
  PackedRows key(p.N, p.D, plan.batch);                              // K^T
  PackedRows value(p.C, value_in_place ? 0 : p.N, plan.batch);

  for (int64_t b0 = 0; b0 < p.B; b0 += plan.batch) {
    const int64_t batch = std::min(plan.batch, p.B - b0);
    query.pack(batch, [&](int64_t b) { return matrix<BFloat16>(p.query, b0 + b, p.D, p.M); });
    key.pack(batch, [&](int64_t b) { return matrix<BFloat16>(p.key, b0 + b, p.D, p.N).transposed(); });
    if (!value_in_place) value.pack(batch, [&](int64_t b) { return matrix<BFloat16>(p.value, b0 + b, p.C, p.N); });

    run_tasks(batch * blocks, [&](TaskQueue& queue) {
      int64_t task;
      if (!queue.next(task)) return;
      Scratch<float> scores(BN * kLanes), acc(panels_per_task * p.C * kLanes), statistics(3 * panels_per_task * kLanes);
      Scratch<uint32_t> probability(ceil_div(BN, 2) * kLanes);
      float *maxima = statistics.data(), *sums = maxima + panels_per_task * kLanes, *correction = sums + panels_per_task * kLanes;
      do {
        const int64_t b = task / blocks, first_panel = task % blocks * panels_per_task;
        const int64_t panels = std::min(panels_per_task, query.panels() - first_panel);
        std::fill(maxima, maxima + panels * kLanes, -std::numeric_limits<float>::infinity());
        std::fill(sums, sums + panels * kLanes, 0.0f);
        for (int64_t j0 = 0; j0 < p.N; j0 += BN) {
          const int64_t bn = std::min(BN, p.N - j0);
          const uint16_t* v = value_in_place
                                  ? static_cast<const uint16_t*>(p.value.data) + (b0 + b) * p.value.batch_stride + j0
                                  : value.at(b, 0, j0);
          const int64_t v_stride = value_in_place ? p.value.row_stride : value.stride();
          for (int64_t panel = 0; panel < panels; ++panel) {
            float *m = maxima + panel * kLanes, *l = sums + panel * kLanes;
            // 1. Scores [bn, 64] = K^T Q; 2. online softmax; 3. acc [C, 64] = acc * correction + V P^T
            multiply(key.at(b, j0), key.stride(), bn, query.at(b, first_panel + panel), query.pairs(), Onto::kNothing, nullptr,
                     scores.data(), kLanes);
            online_softmax_pairs(scores.data(), bn, static_cast<float>(p.scale), m, l, correction, probability.data());
            multiply(v, v_stride, p.C, probability.data(), ceil_div(bn, 2), j0 == 0 ? Onto::kNothing : Onto::kRescaledSum,
                     correction, acc.data() + panel * p.C * kLanes, kLanes);
          }
        }
        // 4. lse = m + log l; out in its layout
        for (int64_t panel = 0; panel < panels; ++panel) {
          const int64_t i0 = (first_panel + panel) * kLanes, bm = std::min(kLanes, p.M - i0);
          float *m = maxima + panel * kLanes, *l = sums + panel * kLanes;
          float* lse = static_cast<float*>(p.lse) + (b0 + b) * p.M + i0;
          for (int64_t i = 0; i < bm; ++i) lse[i] = m[i] + std::log(l[i]);
          const View<const float> block{acc.data() + panel * p.C * kLanes, p.C, bm, kLanes, 1};
          const View<const BFloat16> residual =
              p.residual.data ? matrix<BFloat16>(p.residual, b0 + b, p.C, p.M).block(0, i0, p.C, bm) : View<const BFloat16>{};
          write_attention<float, BFloat16>(block, l, static_cast<float>(p.gamma), residual,
                                           matrix<BFloat16>(p.out, b0 + b, p.C, p.M).block(0, i0, p.C, bm), View<float>{});
        }
      } while (queue.next(task));
    });
  }
}

#else
void position_attention_forward_bf16(const PositionForward&) {}
#endif

}  // namespace danet
