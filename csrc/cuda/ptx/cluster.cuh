// Hopper (sm_90): clusters of blocks that reach each other's shared memory, barriers that live in shared memory, and
// what orders threads with the asynchronous units.
#pragma once

#include "ptx/device.cuh"

// Blocks of `blocks` neighbours form a cluster; one block at a time on a multiprocessor.
#define DANET_CLUSTER_KERNEL(threads, blocks) \
  __global__ __cluster_dims__(blocks, 1, 1) __launch_bounds__(threads, 1) void
#define DANET_PARAMETER const __grid_constant__  // of a kernel whose parameter has its address taken

namespace danet {

DANET_DEVICE uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// The first address in `memory` on a boundary that swizzled tiles need.
DANET_DEVICE char* align_shared(char* memory, uint32_t alignment) {
  return memory + (alignment - shared_address(memory) % alignment) % alignment;
}

DANET_DEVICE int cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return static_cast<int>(rank);
}

// All threads of all blocks of the cluster.
DANET_DEVICE void synchronize_cluster() {
  asm volatile("barrier.cluster.arrive.release;\n barrier.cluster.wait.acquire;" ::: "memory");
}

// kThreads threads of the block, which name the same barrier; number 0 is that of synchronize().
template <int kThreads>
DANET_DEVICE void synchronize_some(int number) {
  asm volatile("bar.sync %0, %1;" ::"r"(number), "n"(kThreads) : "memory");
}

DANET_DEVICE bool any_lane(bool condition) { return __any_sync(0xffffffffu, condition); }

// Registers of every thread of a warpgroup from here on; its warps come here together.
template <int kRegisters>
DANET_DEVICE void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
DANET_DEVICE void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// What this thread has written to shared memory is seen by products and copies that begin after a barrier after this.
DANET_DEVICE void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// A barrier in shared memory. Its phases are numbered from 0; one ends when all arrivals have come and all bytes that
// were announced. Who waits for parity p goes on if the current phase has the other parity: p's is over.
struct Barrier { uint64_t state; };

DANET_DEVICE void init_barrier(Barrier* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}

// After init_barrier, before the cluster comes together to use them.
DANET_DEVICE void fence_barrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

DANET_DEVICE void arrive(Barrier* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// Arrive, and announce bytes that copies will bring in this phase.
DANET_DEVICE void arrive_and_expect(Barrier* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}

// Arrive at the barrier in the same place of the block `rank` of the cluster. With the scope that is the default, that of
// the block: what arrives has read a slot by products, which are over, and has written nothing that the other block
// reads. The scope of the cluster costs a fence of all of the GPU (MEMBAR.ALL.GPU) at every arrival.
DANET_DEVICE void arrive_at_rank(Barrier* barrier, int rank) {
  asm volatile(
      "{\n"
      ".reg .b32 address;\n"
      "mapa.shared::cluster.u32 address, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [address];\n"
      "}" ::"r"(shared_address(barrier)), "r"(rank)
      : "memory");
}

// Bytes that a copy has brought are there for who has seen the end of the phase, also where the other block sent them:
// with the scope of the block, and not of the cluster, which empties the L1 cache at every wait (CCTL.IVALL).
DANET_DEVICE void wait_for_phase(Barrier* barrier, int parity) {
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
