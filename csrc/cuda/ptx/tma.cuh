// Copies of whole tiles from global to shared memory by the TMA unit of Hopper (sm_90, PTX cp.async.bulk.tensor).
#pragma once

#include <cuda.h>

#include "ptx/cluster.cuh"

namespace danet {

// Where a tensor lies in global memory and how large its tiles are; made on the host (tensor_map.cuh).
struct TensorMap { CUtensorMap map; };

// Begin to copy the tile at [batch, line, element] to this place in every block of the cluster whose bit is set in
// `ranks`, and have its bytes counted by the barrier in this place of the same blocks. Outside of the tensor are zeros.
DANET_DEVICE void load_tile(void* shared, const TensorMap& map, int element, int line, int batch, Barrier* barrier,
                            int ranks) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1, {%2, %3, %4}], [%5], %6;" ::"r"(shared_address(shared)),
      "l"(&map), "r"(element), "r"(line), "r"(batch), "r"(shared_address(barrier)), "h"(static_cast<uint16_t>(ranks))
      : "memory");
}

// The same for this block alone.
DANET_DEVICE void load_tile(void* shared, const TensorMap& map, int element, int line, int batch, Barrier* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%2, %3, %4}], [%5];" ::"r"(shared_address(shared)),
      "l"(&map), "r"(element), "r"(line), "r"(batch), "r"(shared_address(barrier))
      : "memory");
}

}  // namespace danet
