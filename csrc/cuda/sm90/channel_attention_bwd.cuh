// The last step of the backward of channel attention on Hopper.
#pragma once

#include "cuda/sm90/channel_attention_apply.cuh"

namespace danet {

// dx = gamma [P^T dout + (dG + dG^T) x] + residual.
// Grid: (C / kChannelTile * N / kChannelPositions * B). Each block owns kChannelTile channels and kChannelPositions
// positions of one batch element, each of its warpgroups that multiply half of the channels; blocks that read the same
// positions run side by side. A block is a cluster of its own.
template <class T>
DANET_CLUSTER_KERNEL(HopperApplyTiles::kThreads, 1)
channel_attention_hopper_backward_kernel(DANET_PARAMETER HopperApplyParameters<T> p) {
  channel_attention_hopper_apply<T, true>(p);
}

}  // namespace danet
