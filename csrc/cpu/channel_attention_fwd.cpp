// Channel attention forward in fp32 and fp64 (tiles of fp16 and bf16 are widened to fp32 as they are read).
//
// G = x x^T from its upper triangle; statistics of the rows of sign * G; then blocks of gamma P x + x, whose rows of P a worker
// forms from G and the statistics when it comes to them. Sums run in an order of their own: bitwise the same for any threads.
#include "channel_attention.h"

namespace danet {
namespace {

// Row maximum and sum of exp(sign * G - maximum) for rows G [., C] of the Gram matrix.
template <class T>
DANET_SIMD void row_statistics(const View<const T>& G, T sign, T* row_max, T* row_sum) {
  constexpr T kInfinity = std::numeric_limits<T>::infinity();
  const int64_t C = G.columns;
  for (int64_t r = 0; r < G.rows; ++r) {
    const T* DANET_RESTRICT row = G.data + r * G.row_stride;
    T lane_max[kRowLanes], lane_min[kRowLanes], lane_sum[kRowLanes];
    for (int64_t i = 0; i < kRowLanes; ++i) {
      lane_max[i] = -kInfinity;
      lane_min[i] = kInfinity;
      lane_sum[i] = 0;
    }
    const int64_t whole = C / kRowLanes * kRowLanes;
    const auto extrema = [&](int64_t i, T logit) __attribute__((always_inline)) {
      lane_max[i] = logit > lane_max[i] || logit != logit ? logit : lane_max[i];  // a NaN stays
      lane_min[i] = logit < lane_min[i] ? logit : lane_min[i];
    };
    for (int64_t c = 0; c < whole; c += kRowLanes)
#pragma omp simd
      for (int64_t i = 0; i < kRowLanes; ++i) extrema(i, sign * row[c + i]);
    for (int64_t c = whole; c < C; ++c) extrema(c - whole, sign * row[c]);
    T max = -kInfinity, min = kInfinity, sum = 0;
    for (int64_t i = 0; i < kRowLanes; ++i) {
      max = lane_max[i] > max || lane_max[i] != lane_max[i] ? lane_max[i] : max;
      min = lane_min[i] < min ? lane_min[i] : min;
    }
    for (int64_t c = 0; c < whole; c += kRowLanes)
#pragma omp simd
      for (int64_t i = 0; i < kRowLanes; ++i) lane_sum[i] += fast_exp(sign * row[c + i] - max);
    for (int64_t c = whole; c < C; ++c) lane_sum[c - whole] += fast_exp(sign * row[c] - max);
    for (int64_t i = 0; i < kRowLanes; ++i) sum += lane_sum[i];
    row_max[r] = max;
    // The official code takes rowmax(G) - G, which is inf - inf where G holds +inf; softmax(-G) alone would hide that.
    row_sum[r] = sign < 0 && min == -kInfinity ? std::numeric_limits<T>::quiet_NaN() : sum;
  }
}

template <class T>
void forward(const ChannelForward& p) {
  const ChannelPlan plan = plan_channel(p.B, p.C, p.N);
  const Tiles<T> x(p.x, p.dtype, p.C, p.N);
  ChannelSums<T> sums(plan, x, nullptr, p.C, p.N);
  const T sign = T(p.sign);
  T *const row_max = static_cast<T*>(p.row_max), *const row_sum = static_cast<T*>(p.row_sum);
  const bool by_channel = channels_contiguous(p.out);
  const int64_t blocks = ceil_div(p.C, plan.rows), chunks = ceil_div(p.N, plan.columns);

  for (int64_t b0 = 0; b0 < p.B; b0 += plan.batch) {
    const int64_t batch = std::min(plan.batch, p.B - b0);
    // 1. G [C, C]
    sums.compute(b0, batch);
    // 2. Statistics of its rows
    for_strips(batch, p.C, [&](int64_t b, int64_t row, int64_t rows) {
      const int64_t at = (b0 + b) * p.C + row;
      row_statistics<T>(sums.gram(b).block(row, 0, rows, p.C), sign, row_max + at, row_sum + at);
    });
    // 3. Blocks of the result. Consecutive tasks share their rows of P.
    run_tasks(batch * blocks * chunks, [&](TaskQueue& queue) {
      int64_t task;
      if (!queue.next(task)) return;
      Scratch<T> map(plan.rows * p.C), product(plan.rows * plan.columns), widened(x.scratch(p.C, plan.columns));
      View<const T> P{};
      int64_t formed = -1;  // block whose rows are in P
      do {
        const int64_t block = task / chunks, b = block / blocks, n = task % chunks * plan.columns;
        const int64_t row = block % blocks * plan.rows, rows = std::min(plan.rows, p.C - row);
        const int64_t width = std::min(plan.columns, p.N - n), at = (b0 + b) * p.C;
        if (formed != block)
          P = rows_of_map<T>(sums.gram(b), Map::kPlain, row, rows, sign, row_max + at, row_sum + at, by_channel, map.data());
        formed = block;
        const View<T> attn = block_of(product.data(), rows, width, by_channel);  // [rows, width]
        matmul<T>(P, x.read(b0 + b, 0, n, p.C, width, widened.data()), attn);
        with_element<T>(p.dtype, [&](auto element) {
          using E = decltype(element);
          const View<const E> residual =
              p.residual ? matrix<E>(p.x, b0 + b, p.C, p.N).block(row, n, rows, width) : View<const E>{};
          blend<T, E>(attn, nullptr, T(p.gamma), residual,
                      matrix<E>(p.out, b0 + b, p.C, p.N).block(row, n, rows, width));
        });
      } while (queue.next(task));
    });
  }
}

}  // namespace

void channel_attention_forward_cpu(const ChannelForward& p) {
  if (p.B == 0 || p.C == 0) return;
  if (p.dtype == Dtype::kFloat64) return forward<double>(p);
  forward<float>(p);
}

}  // namespace danet
