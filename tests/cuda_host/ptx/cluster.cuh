// csrc/cuda/ptx/cluster.cuh for a CPU.
#pragma once

#include "hopper.h"
#include "ptx/device.cuh"

#define DANET_CLUSTER_KERNEL(threads, blocks) inline void
#define DANET_PARAMETER const

namespace danet {
namespace cuda_host {

inline Hopper& hopper() { return Machine::current().hopper(); }

struct Vote {
  bool condition;
  bool* result;
};

DANET_COLLECTIVE vote(const void* const* lanes) {
  bool any = false;
  for (int lane = 0; lane < kLanes; ++lane) any |= static_cast<const Vote*>(lanes[lane])->condition;
  for (int lane = 0; lane < kLanes; ++lane) *static_cast<const Vote*>(lanes[lane])->result = any;
}

}  // namespace cuda_host

inline uint32_t shared_address(const void* shared) { return cuda_host::hopper().shared_address(shared); }

inline char* align_shared(char* memory, uint32_t alignment) {
  return memory + (alignment - shared_address(memory) % alignment) % alignment;
}

inline int cluster_rank() { return cuda_host::Machine::current().rank(); }
inline void synchronize_cluster() { cuda_host::hopper().meet_cluster(); }

template <int kThreads>
void synchronize_some(int number) {
  cuda_host::hopper().meet(number, kThreads);
}

inline bool any_lane(bool condition) {
  bool result;
  const cuda_host::Vote arguments{condition, &result};
  cuda_host::Machine::current().collective("any_lane", cuda_host::vote, &arguments);
  return result;
}

template <int kRegisters>
void take_registers() {}
template <int kRegisters>
void give_registers() {}

inline void fence_async_proxy() { cuda_host::hopper().fence(); }

struct Barrier { uint64_t state; };

inline void init_barrier(Barrier* barrier, int arrivals) { cuda_host::hopper().init_barrier(barrier, arrivals); }
inline void fence_barrier_init() {}
inline void arrive(Barrier* barrier) { cuda_host::hopper().arrive(barrier, 0); }
inline void arrive_and_expect(Barrier* barrier, int bytes) { cuda_host::hopper().arrive(barrier, bytes); }
inline void arrive_at_rank(Barrier* barrier, int rank) {
  cuda_host::hopper().arrive(cuda_host::hopper().same_place(barrier, rank), 0);
}
inline void wait_for_phase(Barrier* barrier, int parity) { cuda_host::hopper().wait(barrier, parity); }

}  // namespace danet
