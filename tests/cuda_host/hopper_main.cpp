// As main.cpp, for the Hopper kernels:
//
//     hopper_main DTYPE LAYOUT SEED
//
// DTYPE: bf16 or fp16. Two clusters, five steps, so that every slot is filled anew; by seed, D fills its
// tile or not, and C takes one block or two.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/plan.h"
#include "launch.h"
#include "machine.h"
#include "tensor.h"

namespace {

using namespace danet;
using cuda_host::poisoned;
using cuda_host::Tensor;

bool run(Dtype dtype, bool channels_last, unsigned seed, std::mt19937& random) {
  constexpr int64_t B = 1, M = 140, N = 300;
  const int64_t D = seed % 2 == 0 ? 40 : 64, C = seed % 4 == 0 ? 520 : 264;
  const double scale = 0.25;
  const float gamma = 0.75f;
  Tensor query(B, D, M, dtype, channels_last), key(B, D, N, dtype, channels_last), value(B, C, N, dtype, channels_last);
  Tensor residual(B, C, M, dtype, channels_last), dout(B, C, M, dtype, channels_last);
  for (Tensor* tensor : {&query, &key, &value, &residual, &dout}) tensor->randomize(random, 1.0);
  Tensor out(B, C, M, dtype, channels_last), attn(B, C, M, Dtype::kFloat32, channels_last);
  Tensor dvalue(B, C, N, dtype, channels_last);
  std::vector<float> lse = poisoned(B * M);

  // 1. The kernels.
  constexpr int64_t kMultiprocessors = 14;  // seven clusters at a time: tiles are shared where C takes one block
  const CudaCall call{&gamma, Dtype::kFloat32, false, kMultiprocessors, nullptr};
  const auto parts = [&](int64_t L, int64_t K) {
    return poisoned(hopper_rounds(B, C, L, K, kMultiprocessors).parts() * kHopperPart);
  };
  std::vector<float> forward_parts = parts(M, N), dvalue_parts = parts(N, M);
  PositionForward p{B, C, D, M, N, dtype, scale, 0.0, query.input(), key.input(), value.input(), residual.input(),
                    out.output(), attn.output(), lse.data()};
  position_attention_forward_hopper(p, forward_parts.data(), call);
  PositionBackward backward{};
  backward.B = B, backward.C = C, backward.D = D, backward.M = M, backward.N = N;
  backward.dtype = dtype, backward.scale = scale;
  backward.dout = dout.input(), backward.query = query.input(), backward.key = key.input();
  backward.lse = lse.data(), backward.dvalue = dvalue.output();
  position_attention_dvalue_hopper(backward, dvalue_parts.data(), call);

  // 2. The definition.
  std::vector<double> weights(static_cast<size_t>(M * N)), want(static_cast<size_t>(C * M));
  const auto weight = [&](int64_t i, int64_t j) -> double& { return weights[static_cast<size_t>(i * N + j)]; };
  bool right = true;
  for (int64_t i = 0; i < M; ++i) {
    double sum = 0;
    for (int64_t j = 0; j < N; ++j) {
      double s = 0;
      for (int64_t d = 0; d < D; ++d) s += query(0, d, i) * key(0, d, j);
      sum += weight(i, j) = std::exp(scale * s);
    }
    for (int64_t j = 0; j < N; ++j) weight(i, j) /= sum;
    const double got = lse[static_cast<size_t>(i)];
    if (!(std::abs(got - std::log(sum)) < 1e-4)) {
      right = false;
      std::printf("lse[%d]: expected %f, got %f\n", static_cast<int>(i), std::log(sum), got);
    }
    for (int64_t c = 0; c < C; ++c) {
      double a = 0;
      for (int64_t j = 0; j < N; ++j) a += weight(i, j) * value(0, c, j);
      want[static_cast<size_t>(c * M + i)] = a;
    }
  }
  right &= out.agrees("out", [&](int64_t, int64_t c, int64_t i) {
    return gamma * want[static_cast<size_t>(c * M + i)] + residual(0, c, i);
  });
  // attn is fp32, made from weights that are rounded: what it is off by is seen in `out`, here whether it is the same.
  for (int64_t c = 0; c < C; ++c) {
    for (int64_t i = 0; i < M; ++i) {
      if (std::abs(attn(0, c, i) - want[static_cast<size_t>(c * M + i)]) < 2e-2) continue;
      std::printf("attn[%d, %d]: got %f\n", static_cast<int>(c), static_cast<int>(i), attn(0, c, i));
      return false;
    }
  }
  right &= dvalue.agrees("dvalue", [&](int64_t, int64_t c, int64_t j) {
    double sum = 0;
    for (int64_t i = 0; i < M; ++i) sum += weight(i, j) * dout(0, c, i);
    return gamma * sum;
  });
  return right;
}

}  // namespace

int main(int count, char** words) {
  if (count != 4) return std::fprintf(stderr, "usage: hopper_main DTYPE LAYOUT SEED\n"), 3;
  const std::string dtype_name = words[1], layout = words[2];
  const Dtype dtype = dtype_name == "bf16" ? Dtype::kBFloat16 : Dtype::kFloat16;
  const auto seed = static_cast<unsigned>(std::strtoul(words[3], nullptr, 10));
  std::mt19937 random(seed + 1);
  cuda_host::set_seed(seed);
  try {
    return run(dtype, layout == "channels_last", seed, random) ? 0 : 1;
  } catch (const std::runtime_error& error) {
    std::printf("%s\n", error.what());
    return 2;
  }
}
