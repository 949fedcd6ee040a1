// Channel attention backward in fp32 and fp64 (tiles of fp16 and bf16 are widened to fp32 as they are read).
//
// G = x x^T is computed again, with H = dout x^T. With gamma taken out (docs/math.md):
//   P = exp(sign G - row_max) / row_sum, delta_c = sum_i P_ci H_ci, dG = sign P (H - delta),
//   dx = gamma (P^T dout + (dG + dG^T) x) + dout, dgamma = sum_c delta_c.
// dG + dG^T is symmetric and takes the place of H; P is formed where it is used.
#include "channel_attention.h"

namespace danet {
namespace {

// delta[r] = sum_c P[r, c] H[r, c] for rows of G and H [., C]
template <class T>
DANET_SIMD void row_dots(const View<const T>& G, const View<const T>& H, T sign, const T* row_max, const T* row_sum,
                         T* delta) {
  const int64_t C = G.columns;
  for (int64_t r = 0; r < G.rows; ++r) {
    const T *DANET_RESTRICT g = G.data + r * G.row_stride, *DANET_RESTRICT h = H.data + r * H.row_stride;
    const T max = row_max[r], scale = row_sum[r];
    T lanes[kRowLanes] = {};
    const int64_t whole = C / kRowLanes * kRowLanes;
    for (int64_t c = 0; c < whole; c += kRowLanes)
#pragma omp simd
      for (int64_t i = 0; i < kRowLanes; ++i) lanes[i] += fast_exp(sign * g[c + i] - max) / scale * h[c + i];
    for (int64_t c = whole; c < C; ++c) lanes[c - whole] += fast_exp(sign * g[c] - max) / scale * h[c];
    T sum = 0;
    for (int64_t i = 0; i < kRowLanes; ++i) sum += lanes[i];
    delta[r] = sum;
  }
}

// Statistics [C] of the rows of one batch element.
template <class T>
struct Rows {
  const T *max, *sum, *delta;
};

// H <- dG + dG^T in rows row .. row + rows, columns 0 .. row + rows, and in the mirror image of these. G is symmetric.
template <class T>
DANET_SIMD void symmetric_gradient(const View<const T>& gram, const View<T>& cross, int64_t row, int64_t rows, T sign,
                                   const Rows<T>& s) {
  constexpr int64_t kTile = kStrip;
  const int64_t C = gram.columns;
  const T* G = gram.data;
  T* H = cross.data;
  T mirrored[kTile * kTile];  // mirrored[r, c] = H[c, r]
  for (int64_t c0 = 0; c0 < row + rows; c0 += kTile) {
    const int64_t columns = std::min(kTile, row + rows - c0);
    for (int64_t c = 0; c < columns; ++c)
      for (int64_t r = 0; r < rows; ++r) mirrored[r * kTile + c] = H[(c0 + c) * C + row + r];
    for (int64_t r = 0; r < rows; ++r) {
      const T* DANET_RESTRICT g = G + (row + r) * C + c0;
      const T *DANET_RESTRICT max = s.max + c0, *DANET_RESTRICT sum = s.sum + c0, *DANET_RESTRICT delta = s.delta + c0;
      const T row_max = s.max[row + r], row_sum = s.sum[row + r], row_delta = s.delta[row + r];
      T* DANET_RESTRICT h = H + (row + r) * C + c0;
      T* DANET_RESTRICT m = mirrored + r * kTile;
#pragma omp simd
      for (int64_t c = 0; c < columns; ++c) {
        const T logit = sign * g[c];
        const T here = fast_exp(logit - row_max) / row_sum * (h[c] - row_delta);
        const T there = fast_exp(logit - max[c]) / sum[c] * (m[c] - delta[c]);
        m[c] = h[c] = sign * (here + there);
      }
    }
    for (int64_t c = 0; c < columns && c0 < row; ++c)
      for (int64_t r = 0; r < rows; ++r) H[(c0 + c) * C + row + r] = mirrored[r * kTile + c];
  }
}

template <class T>
void backward(const ChannelBackward& p) {
  const ChannelPlan plan = plan_channel(p.B, p.C, p.N);
  const Tiles<T> x(p.x, p.dtype, p.C, p.N), dout(p.dout, p.dtype, p.C, p.N);
  ChannelSums<T> sums(plan, x, &dout, p.C, p.N);
  Scratch<T> delta(plan.batch * p.C);
  const T sign = T(p.sign);
  const bool by_channel = channels_contiguous(p.dx);
  const int64_t blocks = ceil_div(p.C, plan.rows), chunks = ceil_div(p.N, plan.columns);
  double dgamma = 0;

  for (int64_t b0 = 0; b0 < p.B; b0 += plan.batch) {
    const int64_t batch = std::min(plan.batch, p.B - b0);
    const auto rows_of = [&](int64_t b) {
      return Rows<T>{static_cast<const T*>(p.row_max) + (b0 + b) * p.C,
                     static_cast<const T*>(p.row_sum) + (b0 + b) * p.C, delta.data() + b * p.C};
    };
    // 1. G and H [C, C]
    sums.compute(b0, batch);
    // 2. delta [C], and dgamma
    for_strips(batch, p.C, [&](int64_t b, int64_t row, int64_t rows) {
      const Rows<T> s = rows_of(b);
      row_dots<T>(sums.gram(b).block(row, 0, rows, p.C), sums.cross(b).block(row, 0, rows, p.C), sign, s.max + row,
                  s.sum + row, delta.data() + b * p.C + row);
    });
    for (int64_t i = 0; i < batch * p.C; ++i) dgamma += static_cast<double>(delta.data()[i]);
    if (!p.dx.data) continue;
    // 3. dG + dG^T [C, C] in place of H
    for_strips(batch, p.C, [&](int64_t b, int64_t row, int64_t rows) {
      symmetric_gradient<T>(sums.gram(b), sums.cross(b), row, rows, sign, rows_of(b));
    });
    // 4. Blocks of dx. Consecutive tasks share their rows of P^T.
    run_tasks(batch * blocks * chunks, [&](TaskQueue& queue) {
      int64_t task;
      if (!queue.next(task)) return;
      Scratch<T> map(plan.rows * p.C), first(plan.rows * plan.columns), second(plan.rows * plan.columns);
      Scratch<T> widened(std::max(x.scratch(p.C, plan.columns), dout.scratch(p.C, plan.columns)));
      View<const T> P{};
      int64_t formed = -1;  // block whose rows of P^T are in P
      do {
        const int64_t block = task / chunks, b = block / blocks, n = task % chunks * plan.columns;
        const int64_t row = block % blocks * plan.rows, rows = std::min(plan.rows, p.C - row);
        const int64_t width = std::min(plan.columns, p.N - n);
        const Rows<T> s = rows_of(b);
        if (formed != block)
          P = rows_of_map<T>(sums.gram(b), Map::kTransposed, row, rows, sign, s.max, s.sum, by_channel, map.data());
        formed = block;
        const View<T> coefficients = sums.cross(b);  // symmetric: its rows are its columns
        const View<T> through_values = block_of(first.data(), rows, width, by_channel);
        const View<T> through_map = block_of(second.data(), rows, width, by_channel);
        matmul<T>(P, dout.read(b0 + b, 0, n, p.C, width, widened.data()), through_values);
        matmul<T>(by_channel ? coefficients.block(0, row, p.C, rows).transposed() : coefficients.block(row, 0, rows, p.C),
                  x.read(b0 + b, 0, n, p.C, width, widened.data()), through_map);
        with_element<T>(p.dtype, [&](auto element) {
          using E = decltype(element);
          const View<const E> residual =
              p.residual ? matrix<E>(p.dout, b0 + b, p.C, p.N).block(row, n, rows, width) : View<const E>{};
          blend<T, E>(through_values, through_map.data, T(p.gamma), residual,
                      matrix<E>(p.dx, b0 + b, p.C, p.N).block(row, n, rows, width));
        });
      } while (queue.next(task));
    });
  }
  if (p.dgamma) *p.dgamma = dgamma;
}

}  // namespace

void channel_attention_backward_cpu(const ChannelBackward& p) {
  if (p.B == 0 || p.C == 0) {
    if (p.dgamma) *p.dgamma = 0;
    return;
  }
  if (p.dtype == Dtype::kFloat64) return backward<double>(p);
  backward<float>(p);
}

}  // namespace danet
