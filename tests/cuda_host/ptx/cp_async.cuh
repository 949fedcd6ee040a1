// csrc/cuda/ptx/cp_async.cuh for a CPU. A copy reads and writes when it lands: at once, at the wait, or in between.
#pragma once

#include "ptx/device.cuh"

namespace danet {
namespace cuda_host {

inline void land(Copy copy) {
  for (int i = 0; i < 16; ++i) copy.to[i] = i < copy.bytes ? copy.from[i] : char{0};
}

}  // namespace cuda_host

inline void cp_async_16(void* shared, const void* global, int bytes) {
  cuda_host::Machine::current().begin_copy(
      {static_cast<char*>(shared), static_cast<const char*>(global), bytes, cuda_host::land});
}

inline void cp_async_commit() { cuda_host::Machine::current().commit_copies(); }

template <int kPending>
void cp_async_wait() {
  cuda_host::Machine::current().wait_for_copies(kPending);
}

}  // namespace danet
