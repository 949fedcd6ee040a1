// The AVX512-BF16 kernels of position attention, and when they run.
#pragma once

#include "../launch.h"

namespace danet {

// Whether bf16 tensors go to the vdpbf16ps kernels: the CPU has the instruction and the build has the kernels.
bool bf16_kernel_runs(Dtype dtype);

void position_attention_forward_bf16(const PositionForward& p);
void position_attention_backward_bf16(const PositionBackward& p);

}  // namespace danet
