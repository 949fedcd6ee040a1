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
#include "tensor.h"

namespace {

using namespace danet;
using cuda_host::poisoned;
using cuda_host::Tensor;
using Values = std::vector<double>;

constexpr int64_t kMultiprocessors = 4;

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
