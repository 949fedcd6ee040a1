// As hopper_main.cpp, for channel attention, forward and backward:
//
//     hopper_channel_main DTYPE LAYOUT SEED
//
// DTYPE: bf16 or fp16. Even seeds: two images and three tiles of channels, so that the ring of the last step is filled
// anew, twice in the backward, and a row of tiles is not full. Odd seeds: so many positions that the ring of the first
// step goes round five times, and its sum starts afresh.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/channel_plan.h"
#include "launch.h"
#include "machine.h"
#include "tensor.h"

namespace {

using namespace danet;
using cuda_host::poisoned;
using cuda_host::Tensor;
using Values = std::vector<double>;

constexpr int64_t kMultiprocessors = 1;  // so that no sum over positions is split

struct Sizes { int64_t B, C, N; };

// All elements, [C, N].
Values values(const Tensor& t, int64_t b, const Sizes& size) {
  Values result;
  for (int64_t c = 0; c < size.C; ++c) {
    for (int64_t n = 0; n < size.N; ++n) result.push_back(t(b, c, n));
  }
  return result;
}

// left [R, K] right [K, L], or with `transposed` right [L, K].
Values product(const Values& left, const Values& right, int64_t R, int64_t K, int64_t L, bool transposed) {
  Values result(static_cast<size_t>(R * L), 0.0);
  for (int64_t r = 0; r < R; ++r) {
    for (int64_t k = 0; k < K; ++k) {
      const double factor = left[static_cast<size_t>(r * K + k)];
      for (int64_t l = 0; l < L; ++l) {
        const int64_t other = transposed ? l * K + k : k * L + l;
        result[static_cast<size_t>(r * L + l)] += factor * right[static_cast<size_t>(other)];
      }
    }
  }
  return result;
}

// What forward and backward are to be, [B, C, N] each: out = gamma P x + x; dG = -P (gamma H - gamma r), and
// dx = dout + gamma P^T dout + (dG + dG^T) x.
struct Expected {
  Values out, dx;

  Expected(const Tensor& x, const Tensor& dout, double gamma, const Sizes& size) {
    const int64_t C = size.C, N = size.N;
    for (int64_t b = 0; b < size.B; ++b) {
      const Values own_x = values(x, b, size), own_dout = values(dout, b, size);
      Values p = product(own_x, own_x, C, N, C, true);
      const Values h = product(own_dout, own_x, C, N, C, true);
      Values first(p.size()), second(p.size());  // gamma P^T, dG + dG^T
      const auto at = [C](int64_t c, int64_t d) { return static_cast<size_t>(c * C + d); };
      for (int64_t c = 0; c < C; ++c) {
        double sum = 0, r = 0;
        for (int64_t d = 0; d < C; ++d) sum += p[at(c, d)] = std::exp(-p[at(c, d)]);
        for (int64_t d = 0; d < C; ++d) r += (p[at(c, d)] /= sum) * h[at(c, d)];
        for (int64_t d = 0; d < C; ++d) {
          const double dg = -gamma * p[at(c, d)] * (h[at(c, d)] - r);
          second[at(c, d)] += dg;
          second[at(d, c)] += dg;
          first[at(d, c)] = gamma * p[at(c, d)];
        }
      }
      const Values px = product(p, own_x, C, C, N, false), pd = product(first, own_dout, C, C, N, false),
                   gx = product(second, own_x, C, C, N, false);
      for (size_t i = 0; i < px.size(); ++i) {
        out.push_back(gamma * px[i] + own_x[i]);
        dx.push_back(own_dout[i] + pd[i] + gx[i]);
      }
    }
  }
};

bool run(Dtype dtype, bool channels_last, const Sizes& size, std::mt19937& random) {
  const auto [B, C, N] = size;
  const float gamma = 0.75f;
  Tensor x(B, C, N, dtype, channels_last), dout(B, C, N, dtype, channels_last);
  x.randomize(random, std::sqrt(2.0 / std::sqrt(static_cast<double>(N))));  // so that no probability is near one
  dout.randomize(random, 1.0);
  Tensor out(B, C, N, dtype, channels_last), dx(B, C, N, dtype, channels_last);
  std::vector<float> row_max = poisoned(B * C), row_sum = poisoned(B * C);
  const CudaCall call{&gamma, Dtype::kFloat32, false, kMultiprocessors, nullptr};

  const int64_t row = channel_cuda_blocks(C) * kChannelTile;
  std::vector<float> logits, partial, dweights = poisoned(B * C * row);
  std::vector<float> delta = poisoned(B * C), magnify = poisoned(B * C);
  std::vector<float> new_max = poisoned(B * C), new_sum = poisoned(B * C);
  std::vector<float> dgram_memory = poisoned(B * C * row / 2 + 4);
  const auto workspace = [&](bool backward) {
    ChannelWorkspace w{};
    w.splits = channel_cuda_splits(B, C, N, backward, kMultiprocessors);
    partial = poisoned(B * channel_cuda_tiles(C, backward) * w.splits * kChannelTile * kChannelTile);
    logits = poisoned(B * C * row);
    w.partial = partial.data(), w.logits = logits.data();
    return w;
  };
  ChannelForward forward{B, C, N, dtype, -1.0, 0.0, true, x.input(), out.output(), row_max.data(), row_sum.data()};
  channel_attention_forward_hopper(forward, workspace(false), call);
  ChannelBackward backward{B, C, N, dtype, -1.0, 0.0, true, dout.input(), x.input(), row_max.data(), row_sum.data(),
                           dx.output(), nullptr};
  ChannelWorkspace w = workspace(true);
  w.dweights = dweights.data(), w.dgram = dgram_memory.data(), w.delta = delta.data();
  w.magnify = dtype == Dtype::kFloat16 ? magnify.data() : nullptr;
  w.row_max = new_max.data(), w.row_sum = new_sum.data();
  channel_attention_backward_hopper(backward, w, call);

  const Expected expected(x, dout, gamma, size);
  const auto at = [&](int64_t b, int64_t c, int64_t n) { return static_cast<size_t>((b * size.C + c) * size.N + n); };
  bool right = out.agrees("out", [&](int64_t b, int64_t c, int64_t n) { return expected.out[at(b, c, n)]; });
  right &= dx.agrees("dx", [&](int64_t b, int64_t c, int64_t n) { return expected.dx[at(b, c, n)]; });
  return right;
}

}  // namespace

int main(int count, char** words) {
  if (count != 4) return std::fprintf(stderr, "usage: hopper_channel_main DTYPE LAYOUT SEED\n"), 3;
  const std::string dtype_name = words[1], layout = words[2];
  const Dtype dtype = dtype_name == "bf16" ? Dtype::kBFloat16 : Dtype::kFloat16;
  const auto seed = static_cast<unsigned>(std::strtoul(words[3], nullptr, 10));
  std::mt19937 random(seed + 1);
  cuda_host::set_seed(seed);
  const Sizes size = seed % 2 == 0 ? Sizes{2, 330, 70} : Sizes{1, 70, 2120};
  try {
    return run(dtype, layout == "channels_last", size, random) ? 0 : 1;
  } catch (const std::runtime_error& error) {
    std::printf("%s\n", error.what());
    return 2;
  }
}
