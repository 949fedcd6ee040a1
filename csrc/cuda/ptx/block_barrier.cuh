// The barriers of cluster.cuh where a block uses them alone. What orders the blocks of a cluster costs a fence of all
// of the GPU at an arrival and what is in the L1 cache at a wait; within a block neither is needed.
#pragma once

#include "ptx/cluster.cuh"

namespace danet {

DANET_DEVICE void arrive(Barrier* barrier) {
  asm volatile("mbarrier.arrive.release.cta.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

DANET_DEVICE void wait_for_phase_in_block(Barrier* barrier, int parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}" ::"r"(shared_address(barrier)), "r"(parity)
      : "memory");
}

}  // namespace danet
