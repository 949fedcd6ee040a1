// One small problem of an operator through its CUDA launchers, forward and backward, against a plain fp64
// implementation:
//
//     main OP DTYPE LAYOUT SEED
//
// OP: position or channel; DTYPE: fp32, bf16 or fp16; LAYOUT: nchw or channels_last. Exit status 0: right, 1: wrong, 2:
// the machine has stopped the kernel. Sizes are those at which every loop of every kernel takes more than one turn and
// every tile is cut off somewhere.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/channel_plan.h"
#include "cuda/plan.h"
#include "launch.h"
#include "machine.h"
#include "ptx/device.cuh"

namespace {

using namespace danet;
using Values = std::vector<double>;

constexpr int64_t kMultiprocessors = 4;

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

std::vector<float> poisoned(int64_t count) { return std::vector<float>(static_cast<size_t>(count), NAN); }

bool position(Dtype dtype, bool channels_last, unsigned seed, std::mt19937& random) {
  constexpr int64_t B = 1, C = 136, M = 140, N = 133;
  const int64_t D = seed % 2 == 0 ? 40 : 72;  // one step over D, or two
  const double scale = 0.125;
  const float gamma = 0.75f;
  Tensor query(B, D, M, dtype, channels_last), key(B, D, N, dtype, channels_last), value(B, C, N, dtype, channels_last);
  Tensor residual(B, C, M, dtype, channels_last), dout(B, C, M, dtype, channels_last);
  for (Tensor* tensor : {&query, &key, &value, &residual, &dout}) tensor->randomize(random, 1.0);
  Tensor out(B, C, M, dtype, channels_last), attn(B, C, M, Dtype::kFloat32, channels_last);
  Tensor dvalue(B, C, N, dtype, channels_last);
  std::vector<float> lse = poisoned(B * M), delta = poisoned(B * M);
  const CudaCall call{&gamma, Dtype::kFloat32, false, kMultiprocessors, nullptr};

  // 1. The kernels.
  PositionForward forward{B, C, D, M, N, dtype, scale, 0.0, query.input(), key.input(), value.input(), residual.input(),
                          out.output(), attn.output(), lse.data()};
  position_attention_forward_cuda(forward, call);
  PositionBackward backward{};
  backward.B = B, backward.C = C, backward.D = D, backward.M = M, backward.N = N;
  backward.dtype = dtype, backward.scale = scale;
  backward.dout = dout.input(), backward.value = value.input();
  backward.query = query.input(), backward.key = key.input();
  backward.attn = attn.input(), backward.lse = lse.data(), backward.dvalue = dvalue.output();
  position_attention_delta_cuda(backward, delta.data(), call);
  position_attention_dvalue_cuda(backward, call);
  const int64_t key_splits = position_splits(B, N, M, D, dtype, kMultiprocessors);
  const int64_t query_splits = position_splits(B, M, N, D, dtype, kMultiprocessors);
  std::vector<float> dkey = poisoned(key_splits * B * D * N), dquery = poisoned(query_splits * B * D * M);
  std::vector<float> shared_dquery(static_cast<size_t>(B * D * M), 0.0f);
  position_attention_dkey_cuda(backward, delta.data(), nullptr, {dkey.data(), key_splits}, shared_dquery.data(), call);
  position_attention_dquery_cuda(backward, delta.data(), nullptr, {dquery.data(), query_splits}, call);

  // 2. The definition.
  Values p(static_cast<size_t>(B * M * N)), want_attn(static_cast<size_t>(B * C * M)), ds(p.size());
  const auto at_p = [&](int64_t b, int64_t i, int64_t j) { return static_cast<size_t>((b * M + i) * N + j); };
  const auto at_attn = [&](int64_t b, int64_t c, int64_t i) { return static_cast<size_t>((b * C + c) * M + i); };
  for (int64_t b = 0; b < B; ++b) {
    for (int64_t i = 0; i < M; ++i) {
      double sum = 0, r = 0;
      for (int64_t j = 0; j < N; ++j) {
        double s = 0;
        for (int64_t d = 0; d < D; ++d) s += query(b, d, i) * key(b, d, j);
        sum += p[at_p(b, i, j)] = std::exp(scale * s);
      }
      for (int64_t j = 0; j < N; ++j) p[at_p(b, i, j)] /= sum;
      for (int64_t c = 0; c < C; ++c) {
        double a = 0;
        for (int64_t j = 0; j < N; ++j) a += p[at_p(b, i, j)] * value(b, c, j);
        want_attn[at_attn(b, c, i)] = a;
        r += a * dout(b, c, i);
      }
      for (int64_t j = 0; j < N; ++j) {
        double dp = 0;
        for (int64_t c = 0; c < C; ++c) dp += dout(b, c, i) * value(b, c, j);
        ds[at_p(b, i, j)] = gamma * scale * p[at_p(b, i, j)] * (dp - r);
      }
    }
  }
  const auto summed = [](const std::vector<float>& sums, int64_t splits) {
    const size_t count = sums.size() / static_cast<size_t>(splits);
    Values total(count, 0.0);
    for (size_t i = 0; i < sums.size(); ++i) total[i % count] += sums[i];
    return total;
  };
  const auto gradient_agrees = [&](const char* name, const Values& total, int64_t L, const auto& expected) {
    Tensor gradient(B, D, L, Dtype::kFloat32, false);
    for (int64_t i = 0; i < B * D * L; ++i) {
      const float x = static_cast<float>(total[static_cast<size_t>(i)]);
      auto* const lines = static_cast<char*>(gradient.output().data);
      std::memcpy(lines + 4 * (i / L * gradient.input().row_stride + i % L), &x, 4);
    }
    double largest = 0, worst = 0;
    for (int64_t b = 0; b < B; ++b) {
      for (int64_t d = 0; d < D; ++d) {
        for (int64_t l = 0; l < L; ++l) {
          const double error = std::abs(gradient(b, d, l) - expected(b, d, l));
          largest = std::max(largest, std::abs(expected(b, d, l)));
          worst = std::isnan(error) ? INFINITY : std::max(worst, error);
        }
      }
    }
    if (worst <= (dtype == Dtype::kFloat32 ? 2e-5 : dtype == Dtype::kBFloat16 ? 2e-2 : 3e-3) * largest) return true;
    std::printf("%s: error %g, largest %g\n", name, worst, largest);
    return false;
  };
  const auto want_dquery = [&](int64_t b, int64_t d, int64_t i) {
    double sum = 0;
    for (int64_t j = 0; j < N; ++j) sum += ds[at_p(b, i, j)] * key(b, d, j);
    return sum;
  };
  const auto want_dkey = [&](int64_t b, int64_t d, int64_t j) {
    double sum = 0;
    for (int64_t i = 0; i < M; ++i) sum += ds[at_p(b, i, j)] * query(b, d, i);
    return sum;
  };
  bool right = out.agrees("out", [&](int64_t b, int64_t c, int64_t i) {
    return gamma * want_attn[at_attn(b, c, i)] + residual(b, c, i);
  });
  right &= dvalue.agrees("dvalue", [&](int64_t b, int64_t c, int64_t j) {
    double sum = 0;
    for (int64_t i = 0; i < M; ++i) sum += p[at_p(b, i, j)] * dout(b, c, i);
    return gamma * sum;
  });
  right &= gradient_agrees("dkey", summed(dkey, key_splits), N, want_dkey);
  right &= gradient_agrees("dquery", summed(dquery, query_splits), M, want_dquery);
  right &= gradient_agrees("dquery, shared", summed(shared_dquery, 1), M, want_dquery);
  return right;
}

bool channel(Dtype dtype, bool channels_last, unsigned /*seed*/, std::mt19937& random) {
  constexpr int64_t B = 1, C = 260, N = 70;
  const float gamma = 0.75f;
  Tensor x(B, C, N, dtype, channels_last), dout(B, C, N, dtype, channels_last);
  x.randomize(random, 0.15);  // so that no probability is near one
  dout.randomize(random, 1.0);
  Tensor out(B, C, N, dtype, channels_last), dx(B, C, N, dtype, channels_last);
  std::vector<float> row_max = poisoned(B * C), row_sum = poisoned(B * C);
  const CudaCall call{&gamma, Dtype::kFloat32, false, kMultiprocessors, nullptr};

  // 1. The kernels.
  const int64_t row = channel_cuda_blocks(C) * kChannelTile;
  std::vector<float> logits, partial, dweights = poisoned(B * C * row);
  std::vector<float> delta = poisoned(B * C), magnify = poisoned(B * C);
  std::vector<float> new_max = poisoned(B * C), new_sum = poisoned(B * C);
  const auto workspace = [&](bool is_backward) {
    ChannelWorkspace w{};
    w.splits = channel_cuda_splits(B, C, N, is_backward, kMultiprocessors);
    partial = poisoned(B * channel_cuda_tiles(C, is_backward) * w.splits * kChannelTile * kChannelTile);
    logits = poisoned(B * C * row);
    w.partial = partial.data(), w.logits = logits.data();
    return w;
  };
  ChannelForward forward{B, C, N, dtype, -1.0, 0.0, true, x.input(), out.output(), row_max.data(), row_sum.data()};
  channel_attention_forward_cuda(forward, workspace(false), call);
  ChannelBackward backward{B,         C,         N,              dtype,          -1.0,        0.0,    true,
                           dout.input(), x.input(), row_max.data(), row_sum.data(), dx.output(), nullptr};
  ChannelWorkspace w = workspace(true);
  std::vector<float> dgram_memory = poisoned(B * C * row);  // as many bytes as fp32 needs
  w.dweights = dweights.data(), w.dgram = dgram_memory.data(), w.delta = delta.data();
  w.magnify = dtype == Dtype::kFloat16 ? magnify.data() : nullptr;
  w.row_max = new_max.data(), w.row_sum = new_sum.data();
  channel_attention_backward_cuda(backward, w, call);

  // 2. The definition: dG = -P (gamma H - r), with the gradient of G through both of its factors.
  bool right = true;
  Values p(static_cast<size_t>(B * C * C)), dg(p.size());
  const auto at = [&](int64_t b, int64_t c, int64_t d) { return static_cast<size_t>((b * C + c) * C + d); };
  for (int64_t b = 0; b < B; ++b) {
    for (int64_t c = 0; c < C; ++c) {
      double sum = 0, r = 0;
      for (int64_t d = 0; d < C; ++d) {
        double g = 0;
        for (int64_t n = 0; n < N; ++n) g += x(b, c, n) * x(b, d, n);
        sum += p[at(b, c, d)] = std::exp(-g);
      }
      Values h(static_cast<size_t>(C), 0.0);
      for (int64_t d = 0; d < C; ++d) {
        p[at(b, c, d)] /= sum;
        for (int64_t n = 0; n < N; ++n) h[static_cast<size_t>(d)] += dout(b, c, n) * x(b, d, n);
        r += p[at(b, c, d)] * h[static_cast<size_t>(d)];
      }
      for (int64_t d = 0; d < C; ++d) dg[at(b, c, d)] = -gamma * p[at(b, c, d)] * (h[static_cast<size_t>(d)] - r);
    }
  }
  right &= out.agrees("out", [&](int64_t b, int64_t c, int64_t n) {
    double sum = 0;
    for (int64_t d = 0; d < C; ++d) sum += p[at(b, c, d)] * x(b, d, n);
    return gamma * sum + x(b, c, n);
  });
  right &= dx.agrees("dx", [&](int64_t b, int64_t c, int64_t n) {
    double sum = dout(b, c, n);
    for (int64_t d = 0; d < C; ++d) {
      sum += gamma * p[at(b, d, c)] * dout(b, d, n) + (dg[at(b, c, d)] + dg[at(b, d, c)]) * x(b, d, n);
    }
    return sum;
  });
  return right;
}

}  // namespace

int main(int count, char** words) {
  if (count != 5) return std::fprintf(stderr, "usage: main OP DTYPE LAYOUT SEED\n"), 3;
  const std::string op = words[1], dtype_name = words[2], layout = words[3];
  const Dtype dtype = dtype_name == "fp32"   ? Dtype::kFloat32
                      : dtype_name == "bf16" ? Dtype::kBFloat16
                                             : Dtype::kFloat16;
  const auto seed = static_cast<unsigned>(std::strtoul(words[4], nullptr, 10));
  std::mt19937 random(seed + 1);
  cuda_host::set_seed(seed);
  try {
    return (op == "position" ? position : channel)(dtype, layout == "channels_last", seed, random) ? 0 : 1;
  } catch (const std::runtime_error& error) {
    std::printf("%s\n", error.what());
    return 2;
  }
}
