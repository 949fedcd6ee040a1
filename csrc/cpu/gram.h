// Sums over the positions, G = x x^T and H = dout x^T, in partial sums [C, C] whose number does not depend on N or the threads.
#pragma once

#include "../channel_plan.h"
#include "../plan.h"
#include "parallel.h"
#include "prepare.h"

namespace danet {
namespace {

// Matrices [rows, columns] of a batch, read tile by tile as T: never a copy that grows with the columns.
template <class T>
class Tiles {
 public:
  Tiles(const Input& source, Dtype dtype, int64_t rows, int64_t columns)
      : source_(source), dtype_(dtype), rows_(rows), columns_(columns), in_place_(element_size(dtype) == sizeof(T)) {}

  // Elements of scratch that reading a tile of this size takes.
  int64_t scratch(int64_t row_count, int64_t column_count) const { return in_place_ ? 0 : row_count * column_count; }

  // The caller's memory where its dtype is T, else a copy in `scratch`, in the layout of the source.
  View<const T> read(int64_t b, int64_t row, int64_t column, int64_t row_count, int64_t column_count, T* scratch) const {
    if (in_place_) return matrix<T>(source_, b, rows_, columns_).block(row, column, row_count, column_count);
    const bool transposed = source_.row_stride == 1 && source_.column_stride != 1;
    const View<T> copy = transposed ? View<T>{scratch, row_count, column_count, 1, row_count}
                                    : View<T>{scratch, row_count, column_count, column_count, 1};
    with_element<T>(dtype_, [&](auto element) {
      using E = decltype(element);
      const View<const E> tile = matrix<E>(source_, b, rows_, columns_).block(row, column, row_count, column_count);
      if (transposed) {
        widen_matrix<E, T>(tile.transposed(), copy.transposed());
      } else {
        widen_matrix<E, T>(tile, copy);
      }
    });
    return copy;
  }

 private:
  const Input source_;
  const Dtype dtype_;
  const int64_t rows_, columns_;
  const bool in_place_;
};

constexpr int64_t kStrip = 32;  // rows per task of the passes over [C, C]

// Runs body(b, row, rows) for strips of the rows of `count` matrices [C, C]; where that is little work, without waking threads.
template <class Body>
void for_strips(int64_t count, int64_t C, const Body& body) {
  const int64_t strips = ceil_div(C, kStrip), tasks = count * strips;
  const auto run = [&](int64_t task) {
    const int64_t row = task % strips * kStrip;
    body(task / strips, row, std::min(kStrip, C - row));
  };
  if (count * C * C <= 4096) {
    for (int64_t task = 0; task < tasks; ++task) run(task);
    return;
  }
  run_tasks(tasks, [&](TaskQueue& queue) {
    for (int64_t task; queue.next(task);) run(task);
  });
}

// Copies rows row .. row + rows of G, which are complete from the diagonal on, to the columns below the diagonal.
template <class T>
DANET_SIMD void mirror(const View<T>& G, int64_t row, int64_t rows) {
  const int64_t after = row + rows, columns = G.columns - after;
  const View<const T> above = G.block(row, after, rows, columns);
  transform(above.transposed(), G.block(after, row, columns, rows),
            [](int64_t, int64_t, T x) __attribute__((always_inline)) { return x; });
  for (int64_t r = row; r < after; ++r)
    for (int64_t c = r + 1; c < after; ++c) G.data[c * G.row_stride + r] = G.data[r * G.row_stride + c];
}

// The matrices G, and H if there is a dout, of the batch elements in flight.
template <class T>
class ChannelSums {
 public:
  ChannelSums(const ChannelPlan& plan, const Tiles<T>& x, const Tiles<T>* dout, int64_t C, int64_t N)
      : plan_(plan), x_(x), dout_(dout), C_(C), N_(N), gram_(plan.batch * plan.splits * C * C),
        cross_(dout ? plan.batch * plan.splits * C * C : 0) {}

  // [C, C] of batch element first + b, complete after compute(first, count).
  View<T> gram(int64_t b) { return partial(gram_, b, 0); }
  View<T> cross(int64_t b) { return partial(cross_, b, 0); }

  void compute(int64_t first, int64_t count) {
    // G is symmetric: its panels of columns end at the diagonal block. Tall panels come first, so that the threads end together.
    const int64_t panels = ceil_div(C_, plan_.panel), cross_panels = dout_ ? panels : 0, pieces = count * plan_.splits;
    run_tasks((cross_panels + panels) * pieces, [&](TaskQueue& queue) {
      int64_t task;
      if (!queue.next(task)) return;
      const bool steps = plan_.step < std::min(plan_.split, N_);
      Scratch<T> product(steps ? C_ * plan_.panel : 0), left(x_.scratch(C_, plan_.step));
      Scratch<T> right(dout_ ? x_.scratch(plan_.panel, plan_.step) : 0);
      do {
        const int64_t kind = task / pieces, b = task % pieces / plan_.splits, split = task % plan_.splits;
        const bool is_cross = kind < cross_panels;
        const int64_t column = (is_cross ? kind : cross_panels + panels - 1 - kind) * plan_.panel;
        const int64_t columns = std::min(plan_.panel, C_ - column), rows = is_cross ? C_ : column + columns;
        const View<T> sum = partial(is_cross ? cross_ : gram_, b, split).block(0, column, rows, columns);
        const int64_t begin = split * plan_.split, end = std::min(begin + plan_.split, N_);
        int64_t n = begin;
        do {  // once at least: no positions make zeros
          const int64_t width = std::min(plan_.step, end - n);
          const View<const T> all = (is_cross ? *dout_ : x_).read(first + b, 0, n, rows, width, left.data());
          const View<const T> panel = is_cross ? x_.read(first + b, column, n, columns, width, right.data())
                                               : all.block(column, 0, columns, width);
          if (n == begin) {
            matmul<T>(all, panel.transposed(), sum);
          } else {
            const View<T> term{product.data(), rows, columns, columns, 1};
            matmul<T>(all, panel.transposed(), term);
            add<T>(term, sum);
          }
          n += width;
        } while (n < end);
      } while (queue.next(task));
    });
    for_strips(count, C_, [&](int64_t b, int64_t row, int64_t rows) {
      for (int64_t split = 1; split < plan_.splits; ++split) {
        add<T>(partial(gram_, b, split).block(row, row, rows, C_ - row), gram(b).block(row, row, rows, C_ - row));
        if (dout_) add<T>(partial(cross_, b, split).block(row, 0, rows, C_), cross(b).block(row, 0, rows, C_));
      }
      mirror<T>(gram(b), row, rows);
    });
  }

 private:
  View<T> partial(Scratch<T>& sums, int64_t b, int64_t split) {
    return {sums.data() + (b * plan_.splits + split) * C_ * C_, C_, C_, C_, 1};
  }

  const ChannelPlan plan_;
  const Tiles<T>& x_;
  const Tiles<T>* dout_;
  const int64_t C_, N_;
  Scratch<T> gram_, cross_;
};

}  // namespace
}  // namespace danet
