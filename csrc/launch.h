// The contract between the torch-facing files (ops_*.cpp) and the kernels: plain structs and launchers, no torch.
// Strides count elements. B batch, C value channels, D query and key channels, M queries, N keys; see docs/math.md.
#pragma once

#include <cstdint>

namespace danet {

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

enum class Dtype { kFloat32, kFloat64, kBFloat16, kFloat16 };

inline int64_t element_size(Dtype dtype) {
  return dtype == Dtype::kFloat64 ? 8 : dtype == Dtype::kFloat32 ? 4 : 2;
}

// A batch of matrices [B, rows, columns] somewhere in memory. data == nullptr: there is none.
template <class Pointer>
struct Matrices {
  Pointer data = nullptr;
  int64_t batch_stride = 0;
  int64_t row_stride = 0;
  int64_t column_stride = 0;
};
using Input = Matrices<const void*>;
using Output = Matrices<void*>;

struct PositionForward {
  int64_t B, C, D, M, N;
  Dtype dtype;      // of query, key, value, residual and out
  double scale;     // factor on the logits
  double gamma;     // 1 where there is none
  Input query;      // [B, D, M]
  Input key;        // [B, D, N]
  Input value;      // [B, C, N]
  Input residual;   // [B, C, M], optional
  Output out;       // [B, C, M]
  Output attn;      // [B, C, M], accumulator dtype, optional
  void* lse;        // [B, M], accumulator dtype, contiguous
};

struct PositionBackward {
  int64_t B, C, D, M, N;
  Dtype dtype;        // of query, key, value, dout and the gradients
  double scale;
  double gamma;
  Input dout;         // [B, C, M]
  Input query;        // [B, D, M]
  Input key;          // [B, D, N]
  Input value;        // [B, C, N]
  Input attn;         // [B, C, M], accumulator dtype
  const void* lse;    // [B, M], accumulator dtype, contiguous
  Output dquery;      // [B, D, M], optional
  Output dkey;        // [B, D, N], optional
  Output dvalue;      // [B, C, N], optional
  double* dgamma;     // one number, optional
};

struct ChannelForward {
  int64_t B, C, N;
  Dtype dtype;     // of x and out
  double sign;     // -1: softmax(-G), the official variant; +1: softmax(G), the paper's
  double gamma;    // 1 where there is none
  bool residual;   // whether x is added
  Input x;         // [B, C, N]
  Output out;      // [B, C, N]
  void* row_max;   // [B, C] of sign * G, accumulator dtype, contiguous
  void* row_sum;   // [B, C] of exp(sign * G - row_max), accumulator dtype, contiguous
};

struct ChannelBackward {
  int64_t B, C, N;
  Dtype dtype;           // of x, dout and dx
  double sign;
  double gamma;
  bool residual;
  Input dout;            // [B, C, N]
  Input x;               // [B, C, N]
  const void* row_max;   // [B, C], accumulator dtype, contiguous
  const void* row_sum;   // [B, C], accumulator dtype, contiguous
  Output dx;             // [B, C, N], optional
  double* dgamma;        // one number, optional
};

void position_attention_forward_cpu(const PositionForward& p);
void position_attention_forward_bf16(const PositionForward& p);  // where cpu_runs_bf16_kernel(); no attn
void position_attention_backward_cpu(const PositionBackward& p);
void channel_attention_forward_cpu(const ChannelForward& p);
void channel_attention_backward_cpu(const ChannelBackward& p);

// What the CUDA launchers take besides. Their kernels read gamma on the device, so `gamma` of the structs above goes
// unused, and so does `dgamma`: it is the sum of the delta that the backward leaves.
struct CudaCall {
  const void* gamma;      // one number in device memory; nullptr stands for 1
  Dtype gamma_dtype;
  bool tf32;              // whether products of fp32 operands that make no logits may be rounded to TF32
  int64_t multiprocessors;
  void* stream;
};

// Where the sums over positions of one side of the map go: gradients of query or key, one for each split.
struct PositionSums {
  float* data = nullptr;  // [splits, B, D, L] fp32 for L positions, contiguous
  int64_t splits = 1;
};

// Operands other than residual, attn and results lie in lines that begin on 16-byte boundaries (tile.cuh).
void position_attention_forward_cuda(const PositionForward& p, const CudaCall& call);

// On Hopper, for fp16 and bf16, D <= 64. Strides of batches and lines are larger than 0. `parts`: memory for the sums
// of tiles that blocks share, as many fp32 numbers as hopper_rounds() (cuda/plan.h) has parts, times kHopperPart.
void position_attention_forward_hopper(const PositionForward& p, float* parts, const CudaCall& call);
void position_attention_dvalue_hopper(const PositionBackward& p, float* parts, const CudaCall& call);

void position_attention_delta_cuda(const PositionBackward& p, float* delta, const CudaCall& call);  // delta [B, M]
void position_attention_dvalue_cuda(const PositionBackward& p, const CudaCall& call);
// The gradient of key, and with `dquery_sums`, [1, B, D, M] of zeros, what its program adds to that of query in any
// order.
void position_attention_dkey_cuda(const PositionBackward& p, const float* delta, const float* magnify,
                                  const PositionSums& sums, float* dquery_sums, const CudaCall& call);
void position_attention_dquery_cuda(const PositionBackward& p, const float* delta, const float* magnify,
                                    const PositionSums& sums, const CudaCall& call);

// Workspaces of channel attention, all fp32. Rows of matrices [C, C] are `row` long, a multiple of 128.
struct ChannelWorkspace {
  int64_t splits;        // partial sums of each tile of G and H
  float* partial;        // [B, tiles, splits, 128, 128]
  float* logits;         // [B, C, row]: sign G, past C -inf
  float* dweights;       // [B, C, row]: H; backward only
  void* dgram;           // [B, C, row]: dG + dG^T in the dtype of x, past C 0; backward only
  float* magnify;        // [B, C]: powers of two that bring the rows of dgram into the range of fp16; else nullptr
  float* row_max;        // [B, C], taken anew; backward only
  float* row_sum;        // [B, C], likewise
  float* delta;          // [B, C]: r_c = sum_i P_ci H_ci, whose sum is dgamma; backward only
};
void channel_attention_forward_cuda(const ChannelForward& p, const ChannelWorkspace& w, const CudaCall& call);
void channel_attention_backward_cuda(const ChannelBackward& p, const ChannelWorkspace& w, const CudaCall& call);

// What comes between their products, on every GPU: logits and statistics from partial sums; then dG + dG^T.
void channel_attention_softmax_cuda(const ChannelForward& p, const ChannelWorkspace& w, const CudaCall& call);
void channel_attention_softmax_cuda(const ChannelBackward& p, const ChannelWorkspace& w, const CudaCall& call);
void channel_attention_dgram_cuda(const ChannelBackward& p, const ChannelWorkspace& w, const CudaCall& call);

// On Hopper, for fp16 and bf16. Strides of batches and lines are larger than 0.
void channel_attention_forward_hopper(const ChannelForward& p, const ChannelWorkspace& w, const CudaCall& call);
void channel_attention_backward_hopper(const ChannelBackward& p, const ChannelWorkspace& w, const CudaCall& call);

}  // namespace danet
