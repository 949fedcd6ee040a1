// Operands as the GEMMs want them: in the accumulator dtype, with one stride of 1.
#pragma once

#include "elements.h"
#include "memory.h"

namespace danet {
namespace {

template <class E, class T>
DANET_SIMD void widen_matrix(const View<const E>& source, const View<T>& destination) {
  transform(source, destination, [](int64_t, int64_t, E x) __attribute__((always_inline)) { return T(widen(x)); });
}

// Matrices [rows, columns] of a batch as T: the caller's memory where the dtype is T already, else a widened copy.
template <class T>
class Operand {
 public:
  // `batch` matrices at most are held at a time.
  Operand(const Input& source, Dtype dtype, int64_t rows, int64_t columns, int64_t batch)
      : source_(source),
        dtype_(dtype),
        rows_(rows),
        columns_(columns),
        in_place_(element_size(dtype) == sizeof(T)),
        copy_(in_place_ ? 0 : batch * rows * columns) {}

  // Makes the matrices first .. first + count - 1 ready.
  void load(int64_t first, int64_t count) {
    constexpr int64_t kRows = 64;
    first_ = first;
    if (in_place_) return;
    const int64_t chunks = (rows_ + kRows - 1) / kRows;
    run_tasks(count * chunks, [&](TaskQueue& queue) {
      for (int64_t task; queue.next(task);) {
        const int64_t b = first + task / chunks, row = task % chunks * kRows, height = std::min(kRows, rows_ - row);
        with_element<T>(dtype_, [&](auto element) {
          using E = decltype(element);
          widen_matrix<E, T>(matrix<E>(source_, b, rows_, columns_).block(row, 0, height, columns_),
                             copy_of(b).block(row, 0, height, columns_));
        });
      }
    });
  }

  // Matrix b of the batch, which load has made ready.
  View<const T> operator[](int64_t b) const {
    return in_place_ ? matrix<T>(source_, b, rows_, columns_) : View<const T>(copy_of(b));
  }

 private:
  View<T> copy_of(int64_t b) const {
    T* data = const_cast<T*>(copy_.data()) + (b - first_) * rows_ * columns_;
    return {data, rows_, columns_, columns_, 1};
  }

  const Input source_;
  const Dtype dtype_;
  const int64_t rows_, columns_;
  const bool in_place_;
  int64_t first_ = 0;
  Scratch<T> copy_;
};

}  // namespace
}  // namespace danet
