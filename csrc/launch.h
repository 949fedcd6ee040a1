// The contract between the torch-facing files (ops_*.cpp) and the kernels: plain structs and launchers, no torch.
// Strides count elements. B batch, C value channels, D query and key channels, M queries, N keys; see docs/math.md.
#pragma once

#include <cstdint>

namespace danet {

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

}  // namespace danet
