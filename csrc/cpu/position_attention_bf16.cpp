#include "position_attention.h"
namespace danet {
bool bf16_kernel_runs(Dtype) { return false; }
void position_attention_forward_bf16(const PositionForward&) {}
void position_attention_backward_bf16(const PositionBackward&) {}
}
