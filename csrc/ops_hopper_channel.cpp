// The torch-facing side of channel attention on Hopper, as ops_hopper.cpp for position attention.
#include <optional>
#include <tuple>

#include "ops_channel.h"

namespace danet {
namespace {

void check_dtype(const Tensor& x) {
  const Dtype dtype = dtype_of(x);
  STD_TORCH_CHECK(dtype == Dtype::kFloat16 || dtype == Dtype::kBFloat16, "expected fp16 or bf16, got another dtype");
}

std::tuple<Tensor, Tensor, Tensor> channel_attention_forward(const Tensor& x,  // [B, C, N]
                                                             const std::optional<Tensor> gamma, bool official,
                                                             bool residual) {
  check_dtype(x);
  return channel_forward(x, gamma, official, residual, /*tf32=*/false, channel_attention_forward_hopper,
                         /*may_overlap=*/false);
}

std::tuple<Tensor, Tensor> channel_attention_backward(const Tensor& dout,  // [B, C, N]
                                                      const Tensor& x,     // [B, C, N]
                                                      const std::optional<Tensor> gamma, const Tensor&, const Tensor&,
                                                      bool official, bool residual, bool needs_x, bool needs_gamma) {
  check_dtype(x);
  return channel_backward(dout, x, gamma, official, residual, needs_x, needs_gamma, /*tf32=*/false,
                          channel_attention_backward_hopper, /*may_overlap=*/false);
}

}  // namespace
}  // namespace danet

STABLE_TORCH_LIBRARY_IMPL(danet_kernels, DANET_DISPATCH_KEY, m) {
  m.impl("channel_attention_forward_hopper", TORCH_BOX(&danet::channel_attention_forward));
  m.impl("channel_attention_backward_hopper", TORCH_BOX(&danet::channel_attention_backward));
}
