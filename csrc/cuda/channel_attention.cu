// Launchers of the channel attention kernels.
#include <algorithm>

#include "launch.h"
#include <ptx/launch.cuh>  // not the one beside this file, if another comes first on the include path
#include "sm80/channel_attention_apply.cuh"
#include "sm80/channel_attention_gram.cuh"
#include "sm80/channel_attention_rows.cuh"

namespace danet {
namespace {

// For either layout.
template <class T>
constexpr int gram_bytes() {
  return std::max(ChannelGramSharedMemory<T, false>::kBytes, ChannelGramSharedMemory<T, true>::kBytes);
}
template <class T>
constexpr int apply_bytes() {
  return std::max(ChannelApplySharedMemory<T, false>::kBytes, ChannelApplySharedMemory<T, true>::kBytes);
}

int64_t row_blocks(int64_t B, int64_t C) { return ceil_div(C, kChannelRows) * B; }

int64_t apply_blocks(int64_t B, int64_t C, int64_t N) {
  return channel_cuda_blocks(C) * ceil_div(N, kChannelPositions) * B;
}

template <class T>
void gram(const Input& x, const Input& dout, int64_t B, int64_t C, int64_t N, const ChannelWorkspace& w,
          const CudaCall& call) {
  const ChannelGramParameters<T> parameters{operand<T>(x, C, N),
                                            operand<T>(dout, C, N),
                                            w.partial,
                                            static_cast<int>(w.splits),
                                            static_cast<int>(channel_cuda_split_positions(N, w.splits)),
                                            is_channels_last(x),
                                            !call.tf32};
  launch(channel_attention_gram_kernel<T>, B * channel_cuda_tiles(C, dout.data != nullptr) * w.splits, kGramThreads,
         gram_bytes<T>(), parameters, call.stream);
}

template <class T>
void forward(const ChannelForward& p, const ChannelWorkspace& w, const CudaCall& call) {
  gram<T>(p.x, {}, p.B, p.C, p.N, w, call);
  channel_attention_softmax_cuda(p, w, call);
  const ChannelForwardParameters<T> apply{operand<T>(p.x, p.C, p.N),
                                          elements<T>(p.residual ? p.x : Input{}),
                                          elements<T>(p.out),
                                          w.logits,
                                          static_cast<const float*>(p.row_max),
                                          static_cast<const float*>(p.row_sum),
                                          {call.gamma, call.gamma_dtype},
                                          is_channels_last(p.x),
                                          !call.tf32};
  launch(channel_attention_forward_kernel<T>, apply_blocks(p.B, p.C, p.N), kApplyThreads,
         apply_bytes<T>(), apply, call.stream);
}

// G is computed again, its sums shared out in another way than in the forward, so its last bits differ: by 0.01 where
// logits are large. Therefore max and sum are taken again too, or rows of P would not sum to one.
template <class T>
void backward(const ChannelBackward& p, const ChannelWorkspace& w, const CudaCall& call) {
  gram<T>(p.x, p.dout, p.B, p.C, p.N, w, call);
  channel_attention_softmax_cuda(p, w, call);
  if (p.dx.data == nullptr) return;
  channel_attention_dgram_cuda(p, w, call);
  const int64_t row_length = channel_cuda_blocks(p.C) * kChannelTile;
  const ChannelBackwardParameters<T> apply{operand<T>(p.x, p.C, p.N),
                                           operand<T>(p.dout, p.C, p.N),
                                           operand<T>({w.dgram, p.C * row_length, row_length, 1}, p.C, p.C),
                                           elements<T>(p.residual ? p.dout : Input{}),
                                           elements<T>(p.dx),
                                           w.logits,
                                           w.row_max,
                                           w.row_sum,
                                           w.delta,
                                           w.magnify,
                                           {call.gamma, call.gamma_dtype},
                                           is_channels_last(p.x),
                                           !call.tf32};
  launch(channel_attention_backward_kernel<T>, apply_blocks(p.B, p.C, p.N), kApplyThreads,
         apply_bytes<T>(), apply, call.stream);
}

}  // namespace

void channel_attention_softmax_cuda(const ChannelForward& p, const ChannelWorkspace& w, const CudaCall& call) {
  const ChannelSoftmaxParameters softmax{w.partial,
                                         w.logits,
                                         static_cast<float*>(p.row_max),
                                         static_cast<float*>(p.row_sum),
                                         nullptr,
                                         nullptr,
                                         static_cast<int>(p.C),
                                         static_cast<int>(w.splits),
                                         p.sign < 0};
  launch(channel_attention_softmax_kernel, row_blocks(p.B, p.C), kChannelRowThreads, RowsSharedMemory::kBytes, softmax,
         call.stream);
}

void channel_attention_softmax_cuda(const ChannelBackward& p, const ChannelWorkspace& w, const CudaCall& call) {
  const ChannelSoftmaxParameters softmax{w.partial,
                                         w.logits,
                                         w.row_max,
                                         w.row_sum,
                                         w.dweights,
                                         w.delta,
                                         static_cast<int>(p.C),
                                         static_cast<int>(w.splits),
                                         p.sign < 0};
  launch(channel_attention_softmax_kernel, row_blocks(p.B, p.C), kChannelRowThreads, RowsSharedMemory::kBytes, softmax,
         call.stream);
}

void channel_attention_dgram_cuda(const ChannelBackward& p, const ChannelWorkspace& w, const CudaCall& call) {
  const ChannelDgramParameters dgram{w.logits,
                                     w.dweights,
                                     w.row_max,
                                     w.row_sum,
                                     w.delta,
                                     {call.gamma, call.gamma_dtype},
                                     w.dgram,
                                     p.dtype,
                                     w.magnify,
                                     static_cast<int>(p.C),
                                     p.sign < 0};
  launch(channel_attention_dgram_kernel, row_blocks(p.B, p.C), kChannelRowThreads, RowsSharedMemory::kBytes, dgram,
         call.stream);
}

void channel_attention_forward_cuda(const ChannelForward& p, const ChannelWorkspace& w, const CudaCall& call) {
  switch (p.dtype) {
    case Dtype::kFloat32: return forward<float>(p, w, call);
    case Dtype::kBFloat16: return forward<BFloat16>(p, w, call);
    default: return forward<Float16>(p, w, call);
  }
}

void channel_attention_backward_cuda(const ChannelBackward& p, const ChannelWorkspace& w, const CudaCall& call) {
  switch (p.dtype) {
    case Dtype::kFloat32: return backward<float>(p, w, call);
    case Dtype::kBFloat16: return backward<BFloat16>(p, w, call);
    default: return backward<Float16>(p, w, call);
  }
}

}  // namespace danet
