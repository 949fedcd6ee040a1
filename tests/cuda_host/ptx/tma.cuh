// csrc/cuda/ptx/tma.cuh for a CPU.
#pragma once

#include "ptx/cluster.cuh"

namespace danet {

struct TensorMap { cuda_host::TensorView view; };

inline void load_tile(void* shared, const TensorMap& map, int element, int line, int batch, Barrier* barrier,
                      int ranks) {
  cuda_host::hopper().load_tile(static_cast<char*>(shared), map.view, element, line, batch, barrier, ranks);
}

inline void load_tile(void* shared, const TensorMap& map, int element, int line, int batch, Barrier* barrier) {
  load_tile(shared, map, element, line, batch, barrier, 1 << cluster_rank());
}

}  // namespace danet
