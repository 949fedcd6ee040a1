// Tensors of the programs that run kernels on the machine, without torch.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>
#include <random>
#include <string>
#include <vector>

#include "launch.h"
#include "ptx/device.cuh"

namespace danet::cuda_host {

struct Element {
  Dtype dtype;

  size_t size() const { return static_cast<size_t>(element_size(dtype)); }
  double read(const char* at) const {
    switch (dtype) {
      case Dtype::kFloat32: { float x; std::memcpy(&x, at, 4); return x; }
      case Dtype::kBFloat16: { BFloat16 x; std::memcpy(&x, at, 2); return to_float(x); }
      default: { Float16 x; std::memcpy(&x, at, 2); return to_float(x); }
    }
  }
  void write(char* at, double value) const {
    const float x = static_cast<float>(value);
    switch (dtype) {
      case Dtype::kFloat32: std::memcpy(at, &x, 4); break;
      case Dtype::kBFloat16: { const auto y = from_float<BFloat16>(x); std::memcpy(at, &y, 2); break; }
      default: { const auto y = from_float<Float16>(x); std::memcpy(at, &y, 2); break; }
    }
  }
};

// [B, rows, columns] in memory of its own, in lines that begin on 16-byte boundaries and end with NaN.
class Tensor {
 public:
  Tensor(int64_t B, int64_t rows, int64_t columns, Dtype dtype, bool channels_last)
      : B_(B), rows_(rows), columns_(columns), element_{dtype}, channels_last_(channels_last) {
    const int64_t lines = channels_last ? columns : rows, length = channels_last ? rows : columns;
    const int64_t multiple = 16 / element_size(dtype);
    line_ = ceil_div(length, multiple) * multiple + multiple;
    bytes_ = static_cast<size_t>(B * lines * line_) * element_.size();
    void* memory = nullptr;
    if (posix_memalign(&memory, 16, bytes_) != 0) throw std::bad_alloc();
    data_ = static_cast<char*>(memory);
    std::memset(data_, 0xff, bytes_);
    batch_ = lines * line_;
  }
  ~Tensor() { std::free(data_); }
  Tensor(const Tensor&) = delete;
  Tensor& operator=(const Tensor&) = delete;

  Tensor& randomize(std::mt19937& random, double deviation) {
    std::normal_distribution<double> normal(0.0, deviation);
    for (int64_t b = 0; b < B_; ++b) {
      for (int64_t r = 0; r < rows_; ++r) {
        for (int64_t c = 0; c < columns_; ++c) element_.write(at(b, r, c), normal(random));
      }
    }
    return *this;
  }

  double operator()(int64_t b, int64_t r, int64_t c) const { return element_.read(at(b, r, c)); }
  Input input() const { return {data_, batch_, channels_last_ ? 1 : line_, channels_last_ ? line_ : 1}; }
  Output output() { return {data_, batch_, channels_last_ ? 1 : line_, channels_last_ ? line_ : 1}; }
  Dtype dtype() const { return element_.dtype; }

  // Whether every element is near to expected(b, r, c); prints the worst if not.
  template <class Expected>
  bool agrees(const char* name, const Expected& expected) const {
    double worst = 0, largest = 0;
    std::string where;
    for (int64_t b = 0; b < B_; ++b) {
      for (int64_t r = 0; r < rows_; ++r) {
        for (int64_t c = 0; c < columns_; ++c) {
          const double want = expected(b, r, c), got = (*this)(b, r, c), error = std::abs(got - want);
          largest = std::max(largest, std::abs(want));
          if (!(error <= worst)) {
            worst = std::isnan(error) ? INFINITY : error;
            where = "[" + std::to_string(b) + ", " + std::to_string(r) + ", " + std::to_string(c) + "]: expected " +
                    std::to_string(want) + ", got " + std::to_string(got);
          }
        }
      }
    }
    const double allowed = dtype() == Dtype::kFloat32 ? 2e-5 : dtype() == Dtype::kBFloat16 ? 2e-2 : 3e-3;
    if (worst <= allowed * largest) return true;
    std::printf("%s%s\n", name, where.c_str());
    return false;
  }

 private:
  char* at(int64_t b, int64_t r, int64_t c) const {
    const int64_t line = channels_last_ ? c : r, element = channels_last_ ? r : c;
    return data_ + static_cast<size_t>(b * batch_ + line * line_ + element) * element_.size();
  }

  int64_t B_, rows_, columns_;
  Element element_;
  bool channels_last_;
  int64_t line_ = 0, batch_ = 0;
  size_t bytes_ = 0;
  char* data_ = nullptr;
};

inline std::vector<float> poisoned(int64_t count) { return std::vector<float>(static_cast<size_t>(count), NAN); }

}  // namespace danet::cuda_host
