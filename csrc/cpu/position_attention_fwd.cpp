// Position attention forward in fp32 and fp64 (fp16 and bf16 operands are widened to fp32 first).
//
// One task owns block_m queries and walks over the keys in tiles of block_n: scores (GEMM), online softmax, weighted sum of the
// values (GEMM), rescale. Scores are kept transposed, [keys, queries], so that the softmax runs along contiguous lanes.
#include <cmath>

#include "../plan.h"
#include "epilogue.h"
#include "features.h"
#include "prepare.h"
#include "softmax.h"

namespace danet {
namespace {

// acc[c, i] = acc[c, i] * correction[i] + tile[c, i]
template <class T>
DANET_SIMD void rescale_add(T* DANET_RESTRICT acc, const T* DANET_RESTRICT tile, const T* DANET_RESTRICT correction,
                            int64_t C, int64_t bm, int64_t stride) {
  for (int64_t c = 0; c < C; ++c) {
    T* DANET_RESTRICT to = acc + c * stride;
    const T* DANET_RESTRICT from = tile + c * stride;
#pragma omp simd
    for (int64_t i = 0; i < bm; ++i) to[i] = to[i] * correction[i] + from[i];
  }
}

template <class T>
void forward(const PositionForward& p) {
  const PositionForwardPlan plan = plan_position_forward(p.B, p.C, p.M, p.N);
  const int64_t BM = plan.block_m, BN = plan.block_n, blocks = ceil_div(p.M, BM);
  Operand<T> query(p.query, p.dtype, p.D, p.M, plan.batch);
  Operand<T> key(p.key, p.dtype, p.D, p.N, plan.batch);
  Operand<T> value(p.value, p.dtype, p.C, p.N, plan.batch);

  for (int64_t b0 = 0; b0 < p.B; b0 += plan.batch) {
    const int64_t batch = std::min(plan.batch, p.B - b0);
    query.load(b0, batch);
    key.load(b0, batch);
    value.load(b0, batch);

    run_tasks(batch * blocks, [&](TaskQueue& queue) {
      int64_t task;
      if (!queue.next(task)) return;
      Scratch<T> scores(BN * BM), acc(p.C * BM), tile(p.C * BM), statistics(3 * BM);
      T *m = statistics.data(), *l = m + BM, *correction = l + BM;
      do {
        const int64_t b = b0 + task / blocks, i0 = task % blocks * BM, bm = std::min(BM, p.M - i0);
        const View<const T> q = query[b].block(0, i0, p.D, bm);  // [D, bm]
        const View<T> acc_view{acc.data(), p.C, bm, BM, 1};
        std::fill(m, m + bm, -std::numeric_limits<T>::infinity());
        std::fill(l, l + bm, T(0));

        for (int64_t j0 = 0; j0 < p.N; j0 += BN) {
          const int64_t bn = std::min(BN, p.N - j0);
          const View<T> s{scores.data(), bn, bm, BM, 1};
          // 1. Scores [bn, bm] = K^T Q
          matmul<T>(key[b].block(0, j0, p.D, bn).transposed(), q, s);
          // 2. Online softmax, in place
          online_softmax<T>(s.data, bn, bm, BM, T(p.scale), m, l, correction);
          // 3. acc [C, bm] = acc * correction + V P^T
          const View<const T> v = value[b].block(0, j0, p.C, bn);
          if (j0 == 0) {
            matmul<T>(v, s, acc_view);
          } else {
            matmul<T>(v, s, View<T>{tile.data(), p.C, bm, BM, 1});
            rescale_add<T>(acc.data(), tile.data(), correction, p.C, bm, BM);
          }
        }

        // 4. lse = m + log l; out and attn in their layouts
        T* lse = static_cast<T*>(p.lse) + b * p.M + i0;
        for (int64_t i = 0; i < bm; ++i) lse[i] = m[i] + std::log(l[i]);
        const View<T> attn = p.attn.data ? matrix<T>(p.attn, b, p.C, p.M).block(0, i0, p.C, bm) : View<T>{};
        with_element<T>(p.dtype, [&](auto element) {
          using E = decltype(element);
          const View<const E> residual =
              p.residual.data ? matrix<E>(p.residual, b, p.C, p.M).block(0, i0, p.C, bm) : View<const E>{};
          write_attention<T, E>(acc_view, l, T(p.gamma), residual,
                                matrix<E>(p.out, b, p.C, p.M).block(0, i0, p.C, bm), attn);
        });
      } while (queue.next(task));
    });
  }
}

}  // namespace

void position_attention_forward_cpu(const PositionForward& p) {
  if (p.dtype == Dtype::kFloat64) return forward<double>(p);
  // With a backward to come the sums must be better than that kernel's, which multiplies probabilities rounded to bf16: attn
  // enters the fp32 gradient of gamma and cancels in those of query and key.
  const bool inference = p.attn.data == nullptr;
  if (p.dtype == Dtype::kBFloat16 && inference && cpu_runs_bf16_kernel()) return position_attention_forward_bf16(p);
  forward<float>(p);
}

}  // namespace danet
