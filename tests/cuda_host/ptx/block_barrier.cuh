// csrc/cuda/ptx/block_barrier.cuh for a CPU.
#pragma once

#include "ptx/cluster.cuh"

namespace danet {

inline void arrive(Barrier* barrier) { cuda_host::hopper().arrive(barrier, 0); }
inline void wait_for_phase_in_block(Barrier* barrier, int parity) { cuda_host::hopper().wait(barrier, parity); }

}  // namespace danet
