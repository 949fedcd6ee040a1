// The torch-facing side of the Hopper kernels, compiled where the library gets code for 9.0a. The schemas are Python's
// (danet_kernels/backends/hopper.py).
#include <optional>
#include <tuple>

#include "cuda/plan.h"
#include "ops_cuda.h"

namespace danet {
namespace {

constexpr int64_t kHopperLargestD = 64;

template <class Problem>
void check(const Problem& p) {
  const bool is_half = p.dtype == Dtype::kFloat16 || p.dtype == Dtype::kBFloat16;
  STD_TORCH_CHECK(is_half, "expected fp16 or bf16, got another dtype");
  STD_TORCH_CHECK(p.D <= kHopperLargestD, "channels of query: expected at most ", kHopperLargestD, ", got ", p.D);
}

OperandLines lines(const Tensor& t, bool channels_last) { return operand(t, channels_last, /*may_overlap=*/false); }

std::tuple<Tensor, Tensor, Tensor> position_attention_forward(
    const Tensor& query,                   // [B, D, M]
    const Tensor& key,                     // [B, D, N]
    const Tensor& value,                   // [B, C, N]
    const std::optional<Tensor> residual,  // [B, C, M]
    const std::optional<Tensor> gamma, double scale, bool needs_attn) {
  auto p = position_problem<PositionForward>(query, key, value, scale);
  check(p);
  const TensorDevice device(value);
  const bool channels_last = is_channels_last(value);
  const OperandLines q = lines(query, channels_last), k = lines(key, channels_last), v = lines(value, channels_last);
  p.query = q.input, p.key = k.input, p.value = v.input;
  if (residual) {
    DANET_CHECK_SHAPE("residual", *residual, p.C, p.M);
    p.residual = elements(*residual);
  }
  Tensor out = empty_like_layout(value, p.C, p.M, value.scalar_type());
  Tensor attn = needs_attn ? empty_like_layout(value, p.C, p.M, ScalarType::Float) : none(value);
  Tensor lse = floats(value, {p.B, p.M});
  p.out = output(out);
  if (needs_attn) p.attn = output(attn);
  p.lse = lse.mutable_data_ptr();
  const CudaCall call = cuda_call(device, gamma, /*tf32=*/false);
  Tensor parts = floats(value, {hopper_rounds(p.B, p.C, p.M, p.N, call.multiprocessors).parts(), kHopperPart});
  position_attention_forward_hopper(p, data(parts), call);
  return {out, attn, lse};
}

Tensor position_attention_dvalue(const Tensor& dout,   // [B, C, M]
                                 const Tensor& query,  // [B, D, M]
                                 const Tensor& key,    // [B, D, N]
                                 const Tensor& value,  // [B, C, N], whose dtype and layout the result has
                                 const Tensor& lse,    // [B, M]
                                 const std::optional<Tensor> gamma, double scale) {
  auto p = position_problem<PositionBackward>(query, key, value, scale);
  check(p);
  check_dout(dout, p.C, p.M, p.dtype);
  const TensorDevice device(value);
  const bool channels_last = is_channels_last(value);
  const OperandLines g = lines(dout, channels_last), q = lines(query, channels_last), k = lines(key, channels_last);
  const Tensor contiguous_lse = torch::stable::contiguous(lse);
  p.dout = g.input, p.query = q.input, p.key = k.input;
  p.lse = contiguous_lse.const_data_ptr();
  Tensor dvalue = gradient_like(value);
  p.dvalue = output(dvalue);
  const CudaCall call = cuda_call(device, gamma, /*tf32=*/false);
  Tensor parts = floats(value, {hopper_rounds(p.B, p.C, p.N, p.M, call.multiprocessors).parts(), kHopperPart});
  position_attention_dvalue_hopper(p, data(parts), call);
  return dvalue;
}

}  // namespace
}  // namespace danet

STABLE_TORCH_LIBRARY_IMPL(danet_kernels, DANET_DISPATCH_KEY, m) {
  m.impl("position_attention_forward_hopper", TORCH_BOX(&danet::position_attention_forward));
  m.impl("position_attention_dvalue_hopper", TORCH_BOX(&danet::position_attention_dvalue));
}
