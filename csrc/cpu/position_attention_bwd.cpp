// Position attention backward in fp32 and fp64 (fp16 and bf16 operands are widened to fp32 first), in one pass over the pairs.
//
// The keys are cut into groups of tiles, a fixed number whatever the threads. One task takes one group: for each of its key tiles
// it walks over the queries, so dK and dV of the tile are its own; what the tile adds to dQ goes into the group's partial sum.
// The partial sums are added in the order of the groups at the end, so every result is bitwise the same for any thread count.
//
// With r_i = delta_i = dout_i . attn_i and gamma taken out (docs/math.md):
//   P = exp(scale * s - lse), dS = P (dout . v - delta),
//   dq = gamma scale dS k, dk = gamma scale dS^T q, dv = gamma P^T dout, dgamma = sum_i r_i.
#include "../plan.h"
#include "delta.h"
#include "epilogue.h"
#include "prepare.h"

namespace danet {
namespace {

// scores [bn, bm] -> probabilities exp(scale * scores - lse)
template <class T>
DANET_SIMD void probabilities(T* DANET_RESTRICT scores, int64_t bn, int64_t bm, int64_t stride, T scale,
                              const T* DANET_RESTRICT lse) {
  for (int64_t j = 0; j < bn; ++j) {
    T* DANET_RESTRICT row = scores + j * stride;
#pragma omp simd
    for (int64_t i = 0; i < bm; ++i) row[i] = fast_exp(row[i] * scale - lse[i]);
  }
}

// dlogits [bn, bm] holds dout . v on entry and P (dout . v - delta) on return.
template <class T>
DANET_SIMD void logit_gradients(T* DANET_RESTRICT dlogits, const T* DANET_RESTRICT p, int64_t bn, int64_t bm,
                                int64_t stride, const T* DANET_RESTRICT delta) {
  for (int64_t j = 0; j < bn; ++j) {
    T* DANET_RESTRICT row = dlogits + j * stride;
    const T* DANET_RESTRICT p_row = p + j * stride;
#pragma omp simd
    for (int64_t i = 0; i < bm; ++i) row[i] = p_row[i] * (row[i] - delta[i]);
  }
}

// sum += a b, or sum = a b for the first term; scratch has room for one product.
template <class T>
void accumulate(const View<const T>& a, const View<const T>& b, bool first, const View<T>& sum, T* scratch) {
  if (first) return matmul<T>(a, b, sum);
  const View<T> product{scratch, sum.rows, sum.columns, sum.columns, 1};
  matmul<T>(a, b, product);
  add<T>(product, sum);
}

template <class T>
void backward(const PositionBackward& p) {
  const PositionBackwardPlan plan = plan_position_backward(p.B, p.M, p.N);
  const int64_t BM = plan.block_m, BN = plan.block_n, G = plan.groups, blocks = ceil_div(p.M, BM);
  const bool needs_dlogits = p.dquery.data || p.dkey.data, needs_pairs = needs_dlogits || p.dvalue.data;
  Operand<T> dout(p.dout, p.dtype, p.C, p.M, plan.batch);
  Operand<T> query(p.query, p.dtype, p.D, p.M, plan.batch);
  Operand<T> key(p.key, p.dtype, p.D, p.N, plan.batch);
  Operand<T> value(p.value, p.dtype, p.C, p.N, plan.batch);
  Scratch<T> delta(plan.batch * p.M), dquery_partial(p.dquery.data ? plan.batch * G * p.D * p.M : 0);
  double dgamma = 0;

  for (int64_t b0 = 0; b0 < p.B; b0 += plan.batch) {
    const int64_t batch = std::min(plan.batch, p.B - b0);
    dout.load(b0, batch);
    query.load(b0, batch);
    key.load(b0, batch);
    value.load(b0, batch);

    // 1. delta [M] of each batch element, and dgamma
    dgamma += compute_delta<T>(p, b0, batch, BM, p.M, delta.data());
    if (!needs_pairs) continue;

    // 2. All pairs
    run_tasks(batch * G, [&](TaskQueue& queue) {
      int64_t task;
      if (!queue.next(task)) return;
      Scratch<T> probability(BN * BM), dlogit(needs_dlogits ? BN * BM : 0);
      Scratch<T> dvalue_sum(p.dvalue.data ? p.C * BN : 0), dkey_sum(p.dkey.data ? p.D * BN : 0);
      Scratch<T> product(std::max(p.C * BN, p.D * std::max(BN, BM)));
      do {
        const int64_t b = b0 + task / G, group = task % G;
        const int64_t tile_end = std::min((group + 1) * plan.tiles_per_group * BN, p.N);
        T* partial = dquery_partial.data() + ((b - b0) * G + group) * p.D * p.M;
        for (int64_t j0 = group * plan.tiles_per_group * BN; j0 < tile_end; j0 += BN) {
          const int64_t bn = std::min(BN, p.N - j0);
          const View<const T> k = key[b].block(0, j0, p.D, bn);    // [D, bn]
          const View<const T> v = value[b].block(0, j0, p.C, bn);  // [C, bn]
          const View<T> dk{dkey_sum.data(), p.D, bn, bn, 1}, dv{dvalue_sum.data(), p.C, bn, bn, 1};
          for (int64_t i0 = 0; i0 < p.M; i0 += BM) {
            const int64_t bm = std::min(BM, p.M - i0);
            const View<const T> q = query[b].block(0, i0, p.D, bm);  // [D, bm]
            const View<const T> g = dout[b].block(0, i0, p.C, bm);   // [C, bm]
            const View<T> s{probability.data(), bn, bm, bm, 1}, ds{dlogit.data(), bn, bm, bm, 1};
            const bool first_query = i0 == 0, first_tile = j0 == group * plan.tiles_per_group * BN;
            // P [bn, bm] from the scores and lse
            matmul<T>(k.transposed(), q, s);
            probabilities<T>(s.data, bn, bm, bm, T(p.scale), static_cast<const T*>(p.lse) + b * p.M + i0);
            // dV [C, bn] += dout P
            if (p.dvalue.data) accumulate<T>(g, s.transposed(), first_query, dv, product.data());
            if (!needs_dlogits) continue;
            // dS [bn, bm] = P (V^T dout - delta)
            matmul<T>(v.transposed(), g, ds);
            logit_gradients<T>(ds.data, s.data, bn, bm, bm, delta.data() + (b - b0) * p.M + i0);
            // dK [D, bn] += Q dS^T, dQ [D, bm] += K dS
            if (p.dkey.data) accumulate<T>(q, ds.transposed(), first_query, dk, product.data());
            if (p.dquery.data)
              accumulate<T>(k, ds, first_tile, View<T>{partial + i0, p.D, bm, p.M, 1}, product.data());
          }
          if (p.dkey.data) write_gradient<T>(dk, p.gamma * p.scale, p.dtype, p.dkey, b, p.D, p.N, j0);
          if (p.dvalue.data) write_gradient<T>(dv, p.gamma, p.dtype, p.dvalue, b, p.C, p.N, j0);
        }
      } while (queue.next(task));
    });

    // 3. dQ: the groups' partial sums, in order
    if (!p.dquery.data) continue;
    run_tasks(batch * blocks, [&](TaskQueue& queue) {
      for (int64_t task; queue.next(task);) {
        const int64_t b = b0 + task / blocks, i0 = task % blocks * BM, bm = std::min(BM, p.M - i0);
        T* partials = dquery_partial.data() + (b - b0) * G * p.D * p.M + i0;
        const View<T> sum{partials, p.D, bm, p.M, 1};
        for (int64_t group = 1; group < G; ++group)
          add<T>(View<const T>{partials + group * p.D * p.M, p.D, bm, p.M, 1}, sum);
        write_gradient<T>(sum, p.gamma * p.scale, p.dtype, p.dquery, b, p.D, p.M, i0);
      }
    });
  }
  if (p.dgamma) *p.dgamma = dgamma;
}

}  // namespace

void position_attention_backward_cpu(const PositionBackward& p) {
  if (p.dtype == Dtype::kFloat64) return backward<double>(p);
  backward<float>(p);
}

}  // namespace danet
