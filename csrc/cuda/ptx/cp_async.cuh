// Copies from global to shared memory that run while the thread goes on (PTX cp.async, from sm_80 on).
#pragma once

#include "ptx/device.cuh"

namespace danet {

// Copy `bytes` <= 16 and fill up to 16 with zeros; both addresses are multiples of 16. With 0 bytes nothing is read.
DANET_DEVICE void cp_async_16(void* shared, const void* global, int bytes) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(global), "r"(bytes) : "memory");
}

// Close a group of copies: all that this thread has begun since the last one.
DANET_DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Wait until at most kPending of this thread's groups are under way. Other threads' copies need a synchronize() after
// it.
template <int kPending>
DANET_DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

}  // namespace danet
