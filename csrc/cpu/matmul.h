// Matrix products of fp32 and fp64 tiles through ATen (BLAS), callable from the worker threads.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <cstdint>
#include <type_traits>

namespace danet {

// A matrix [rows, columns] in memory; strides count elements. BLAS needs one of them to be 1.
template <class T>
struct View {
  T* data;
  int64_t rows, columns;
  int64_t row_stride, column_stride;

  View transposed() const { return {data, columns, rows, column_stride, row_stride}; }
  View block(int64_t row, int64_t column, int64_t row_count, int64_t column_count) const {
    return {data + row * row_stride + column * column_stride, row_count, column_count, row_stride, column_stride};
  }
  operator View<const T>() const { return {data, rows, columns, row_stride, column_stride}; }
};

// The tensors are made here, in the worker: dispatcher calls on a caller's tensors would meet its autograd state, and a
// worker thread has not inherited the caller's inference mode.
template <class T>
torch::stable::Tensor as_tensor(const View<T>& view) {
  using Element = std::remove_const_t<T>;
  constexpr auto dtype = std::is_same_v<Element, double> ? torch::headeronly::ScalarType::Double
                                                         : torch::headeronly::ScalarType::Float;
  const std::array<int64_t, 2> sizes{view.rows, view.columns};
  const std::array<int64_t, 2> strides{view.row_stride, view.column_stride};
  return torch::stable::from_blob(const_cast<Element*>(view.data), {sizes.data(), 2}, {strides.data(), 2},
                                  torch::stable::Device(torch::headeronly::DeviceType::CPU), dtype);
}

// out = a b. Single-threaded inside run_tasks.
template <class T>
void matmul(const View<const T>& a, const View<const T>& b, const View<T>& out) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(as_tensor(a)), torch::stable::detail::from(as_tensor(b)),
                                    torch::stable::detail::from(as_tensor(out))};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
  // The dispatcher hands `out` back; taking it releases its handle.
  torch::stable::detail::to<torch::stable::Tensor>(stack[0]);
}

}  // namespace danet
