// As main.cpp, for the Hopper kernels:
//
//     hopper_main OP DTYPE LAYOUT SEED
//
// OP: forward; DTYPE: bf16 or fp16. Two clusters, five steps, so that every slot is filled anew; by seed, D fills its tile
// or not, and C takes one block or two.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "launch.h"
#include "machine.h"
#include "tensor.h"

namespace {

using namespace danet;
using cuda_host::poisoned;
using cuda_host::Tensor;

bool forward(Dtype dtype, bool channels_last, unsigned seed, std::mt19937& random) {
  constexpr int64_t B = 1, M = 140, N = 300;
  const int64_t D = seed % 2 == 0 ? 40 : 64, C = seed % 4 == 0 ? 520 : 264;
  const double scale = 0.25;
  const float gamma = 0.75f;
  Tensor query(B, D, M, dtype, channels_last), key(B, D, N, dtype, channels_last), value(B, C, N, dtype, channels_last);
  Tensor residual(B, C, M, dtype, channels_last), out(B, C, M, dtype, channels_last);
  Tensor attn(B, C, M, Dtype::kFloat32, channels_last);
  for (Tensor* tensor : {&query, &key, &value, &residual}) tensor->randomize(random, 1.0);
  std::vector<float> lse = poisoned(B * M);

  // 1. The kernel.
  PositionForward p{B, C, D, M, N, dtype, scale, 0.0, query.input(), key.input(), value.input(), residual.input(),
                    out.output(), attn.output(), lse.data()};
  position_attention_forward_hopper(p, {&gamma, Dtype::kFloat32, false, 4, nullptr});

  // 2. The definition.
  std::vector<double> want(static_cast<size_t>(C * M)), weights(static_cast<size_t>(N));
  bool right = true;
  for (int64_t i = 0; i < M; ++i) {
    double sum = 0;
    for (int64_t j = 0; j < N; ++j) {
      double s = 0;
      for (int64_t d = 0; d < D; ++d) s += query(0, d, i) * key(0, d, j);
      sum += weights[static_cast<size_t>(j)] = std::exp(scale * s);
    }
    const double got = lse[static_cast<size_t>(i)];
    if (!(std::abs(got - std::log(sum)) < 1e-4)) {
      right = false;
      std::printf("lse[%d]: expected %f, got %f\n", static_cast<int>(i), std::log(sum), got);
    }
    for (int64_t c = 0; c < C; ++c) {
      double a = 0;
      for (int64_t j = 0; j < N; ++j) a += weights[static_cast<size_t>(j)] * value(0, c, j);
      want[static_cast<size_t>(c * M + i)] = a / sum;
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
  return right;
}

}  // namespace

int main(int count, char** words) {
  if (count != 5) return std::fprintf(stderr, "usage: hopper_main OP DTYPE LAYOUT SEED\n"), 3;
  const std::string dtype_name = words[2], layout = words[3];
  const Dtype dtype = dtype_name == "bf16" ? Dtype::kBFloat16 : Dtype::kFloat16;
  const auto seed = static_cast<unsigned>(std::strtoul(words[4], nullptr, 10));
  std::mt19937 random(seed + 1);
  cuda_host::set_seed(seed);
  try {
    return forward(dtype, layout == "channels_last", seed, random) ? 0 : 1;
  } catch (const std::runtime_error& error) {
    std::printf("%s\n", error.what());
    return 2;
  }
}
