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

template <class T>
DANET_SIMD void add_rows(const T* from, int64_t from_stride, int64_t rows, int64_t columns, T* to, int64_t to_stride) {
  for (int64_t r = 0; r < rows; ++r) {
    const T* DANET_RESTRICT source = from + r * from_stride;
    T* DANET_RESTRICT destination = to + r * to_stride;
#pragma omp simd
    for (int64_t c = 0; c < columns; ++c) destination[c] += source[c];
  }
}

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

// Copies G's rows row .. row + rows, which are complete up to the diagonal, to the columns above the diagonal.
template <class T>
DANET_SIMD void mirror(T* G, int64_t C, int64_t row, int64_t rows) {
  const View<const T> below{G + row * C, rows, row, C, 1};
  transform(below, View<T>{G + row, rows, row, 1, C}, [](int64_t, int64_t, T x) __attribute__((always_inline)) { return x; });
  for (int64_t r = row; r < row + rows; ++r)
    for (int64_t c = row; c < r; ++c) G[c * C + r] = G[r * C + c];
}

// The matrices G, and H if there is a dout, of the batch elements in flight.
template <class T>
class ChannelSums {
 public:
  ChannelSums(const ChannelPlan& plan, const Tiles<T>& x, const Tiles<T>* dout, int64_t C, int64_t N)
      : plan_(plan), x_(x), dout_(dout), C_(C), N_(N), gram_(plan.batch * plan.splits * C * C),
        cross_(dout ? plan.batch * plan.splits * C * C : 0) {}

  // [C, C] of batch element first + b, complete after compute(first, count).
  T* gram(int64_t b) { return gram_.data() + b * plan_.splits * C_ * C_; }
  T* cross(int64_t b) { return cross_.data() + b * plan_.splits * C_ * C_; }

  void compute(int64_t first, int64_t count) {
    // G is symmetric: its panels of rows end at the diagonal block. Long panels come first, so that the threads end together.
    const int64_t panels = ceil_div(C_, plan_.panel), cross_panels = dout_ ? panels : 0, pieces = count * plan_.splits;
    run_tasks((cross_panels + panels) * pieces, [&](TaskQueue& queue) {
      int64_t task;
      if (!queue.next(task)) return;
      const bool steps = plan_.step < std::min(plan_.split, N_);
      Scratch<T> product(steps ? plan_.panel * C_ : 0), right(x_.scratch(C_, plan_.step));
      Scratch<T> left(dout_ ? dout_->scratch(plan_.panel, plan_.step) : 0);
      do {
        const int64_t kind = task / pieces, b = task % pieces / plan_.splits, split = task % plan_.splits;
        const bool is_cross = kind < cross_panels;
        const int64_t panel = is_cross ? kind : cross_panels + panels - 1 - kind;
        const int64_t row = panel * plan_.panel, rows = std::min(plan_.panel, C_ - row);
        const int64_t columns = is_cross ? C_ : row + rows;
        const View<T> sum{(is_cross ? cross(b) : gram(b)) + (split * C_ + row) * C_, rows, columns, C_, 1};
        const int64_t end = std::min((split + 1) * plan_.split, N_);
        int64_t n = split * plan_.split;
        do {  // once at least: no positions make zeros
          const int64_t width = std::min(plan_.step, end - n);
          const View<const T> x = x_.read(first + b, 0, n, columns, width, right.data());
          const View<const T> a = is_cross ? dout_->read(first + b, row, n, rows, width, left.data())
                                           : x.block(row, 0, rows, width);
          if (n == split * plan_.split) {
            matmul<T>(a, x.transposed(), sum);
          } else {
            matmul<T>(a, x.transposed(), View<T>{product.data(), rows, columns, columns, 1});
            add_rows<T>(product.data(), columns, rows, columns, sum.data, C_);
          }
          n += width;
        } while (n < end);
      } while (queue.next(task));
    });
    for_strips(count, C_, [&](int64_t b, int64_t row, int64_t rows) {
      for (int64_t split = 1; split < plan_.splits; ++split) {
        const int64_t offset = row * C_, partial = split * C_ * C_ + offset;
        add_rows<T>(gram(b) + partial, C_, rows, row + rows, gram(b) + offset, C_);
        if (dout_) add_rows<T>(cross(b) + partial, C_, rows, C_, cross(b) + offset, C_);
      }
      mirror<T>(gram(b), C_, row, rows);
    });
  }

 private:
  const ChannelPlan plan_;
  const Tiles<T>& x_;
  const Tiles<T>* dout_;
  const int64_t C_, N_;
  Scratch<T> gram_, cross_;
};

}  // namespace
}  // namespace danet
