// Launchers of the position attention kernels.
#include <cstdint>

#include "cuda/plan.h"
#include "launch.h"
#include <ptx/launch.cuh>  // not the one beside this file, if another comes first on the include path
#include "sm80/position_attention_delta.cuh"
#include "sm80/position_attention_dlogits.cuh"
#include "sm80/position_attention_dvalue.cuh"
#include "sm80/position_attention_fwd.cuh"

namespace danet {
namespace {

// Calls body(T{}) with the type that `dtype` names.
template <class Body>
void for_dtype(Dtype dtype, const Body& body) {
  switch (dtype) {
    case Dtype::kFloat32: return body(float{});
    case Dtype::kBFloat16: return body(BFloat16{});
    default: return body(Float16{});
  }
}

template <template <class, bool> class Plan, class T>
int shared_bytes(int64_t D, bool channels_last) {
  return channels_last ? Plan<T, true>::bytes(static_cast<int>(D)) : Plan<T, false>::bytes(static_cast<int>(D));
}

Gamma gamma_of(const CudaCall& call) { return {call.gamma, call.gamma_dtype}; }

template <class T>
void dlogits(const PositionBackward& p, bool own_keys, const float* delta, const float* magnify,
             const PositionSums& sums, float* other_sums, const CudaCall& call) {
  using Tiles = PositionTiles<T>;
  const Operand<T> query = operand<T>(p.query, p.D, p.M), key = operand<T>(p.key, p.D, p.N);
  const Operand<T> dout = operand<T>(p.dout, p.C, p.M), value = operand<T>(p.value, p.C, p.N);
  const int64_t L = own_keys ? p.N : p.M, K = own_keys ? p.M : p.N;
  PositionDlogitsParameters<T> parameters{};
  parameters.own = own_keys ? key : query;
  parameters.other = own_keys ? query : key;
  parameters.own_values = own_keys ? value : dout;
  parameters.other_values = own_keys ? dout : value;
  parameters.lse = static_cast<const float*>(p.lse);
  parameters.delta = delta;
  parameters.magnify = magnify;
  parameters.sums = sums.data;
  parameters.other_sums = other_sums;
  parameters.gamma = gamma_of(call);
  parameters.scale = static_cast<float>(p.scale);
  parameters.B = p.B;
  parameters.split_length = static_cast<int>(position_split_length(K, Tiles::kColumns, sums.splits));
  parameters.own_keys = own_keys;
  parameters.precise = !call.tf32;
  parameters.channels_last = is_channels_last(p.value);
  const int bytes = parameters.channels_last ? PositionDlogitsSharedMemory<T, true>::kBytes
                                             : PositionDlogitsSharedMemory<T, false>::kBytes;
  launch(position_attention_dlogits_kernel<T>,
         ceil_div(L, Tiles::kRows) * ceil_div(p.D, kBlockD) * p.B * sums.splits, kThreads, bytes, parameters,
         call.stream);
}

}  // namespace

void position_attention_forward_cuda(const PositionForward& p, const CudaCall& call) {
  for_dtype(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    using Tiles = PositionTiles<T>;
    PositionForwardParameters<T> parameters{};
    parameters.query = operand<T>(p.query, p.D, p.M);
    parameters.key = operand<T>(p.key, p.D, p.N);
    parameters.value = operand<T>(p.value, p.C, p.N);
    parameters.residual = elements<T>(p.residual);
    parameters.out = elements<T>(p.out);
    parameters.attn = elements<float>(p.attn);
    parameters.lse = static_cast<float*>(p.lse);
    parameters.gamma = gamma_of(call);
    parameters.scale = static_cast<float>(p.scale);
    parameters.precise = !call.tf32;
    parameters.channels_last = is_channels_last(p.value);
    launch(position_attention_forward_kernel<T>,
           ceil_div(p.M, Tiles::kRows) * ceil_div(p.C, Tiles::kChannels) * p.B, kThreads,
           shared_bytes<PositionForwardSharedMemory, T>(p.D, parameters.channels_last), parameters, call.stream);
  });
}

void position_attention_delta_cuda(const PositionBackward& p, float* delta, const CudaCall& call) {
  for_dtype(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    const PositionDeltaParameters<T> parameters{elements<T>(p.dout), elements<float>(p.attn), delta,
                                                static_cast<int>(p.C), static_cast<int>(p.M)};
    launch(position_attention_delta_kernel<T>, ceil_div(p.M, kDeltaQueries) * p.B, kThreads,
           kThreads * static_cast<int>(sizeof(float)), parameters, call.stream);
  });
}

void position_attention_dvalue_cuda(const PositionBackward& p, const CudaCall& call) {
  for_dtype(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    using Tiles = PositionTiles<T>;
    PositionDvalueParameters<T> parameters{};
    parameters.query = operand<T>(p.query, p.D, p.M);
    parameters.key = operand<T>(p.key, p.D, p.N);
    parameters.dout = operand<T>(p.dout, p.C, p.M);
    parameters.lse = static_cast<const float*>(p.lse);
    parameters.dvalue = elements<T>(p.dvalue);
    parameters.gamma = gamma_of(call);
    parameters.scale = static_cast<float>(p.scale);
    parameters.precise = !call.tf32;
    parameters.channels_last = is_channels_last(p.value);
    launch(position_attention_dvalue_kernel<T>,
           ceil_div(p.N, Tiles::kRows) * ceil_div(p.C, Tiles::kChannels) * p.B, kThreads,
           shared_bytes<PositionDvalueSharedMemory, T>(p.D, parameters.channels_last), parameters, call.stream);
  });
}

void position_attention_dkey_cuda(const PositionBackward& p, const float* delta, const float* magnify,
                                  const PositionSums& sums, float* dquery_sums, const CudaCall& call) {
  for_dtype(p.dtype, [&](auto zero) {
    dlogits<decltype(zero)>(p, /*own_keys=*/true, delta, magnify, sums, dquery_sums, call);
  });
}

void position_attention_dquery_cuda(const PositionBackward& p, const float* delta, const float* magnify,
                                    const PositionSums& sums, const CudaCall& call) {
  for_dtype(p.dtype, [&](auto zero) {
    dlogits<decltype(zero)>(p, /*own_keys=*/false, delta, magnify, sums, nullptr, call);
  });
}

}  // namespace danet
