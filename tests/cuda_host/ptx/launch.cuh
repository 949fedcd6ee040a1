// csrc/cuda/ptx/launch.cuh for a CPU.
#pragma once

#include "ptx/device.cuh"

namespace danet {

template <class Parameters>
void launch(void (*kernel)(Parameters), int64_t blocks, int threads, int shared_bytes, const Parameters& parameters,
            void* /*stream*/) {
  cuda_host::Machine::current().run(blocks, threads, shared_bytes, [&] { kernel(parameters); });
}

template <class Parameters>
void launch_clusters(void (*kernel)(Parameters), int64_t blocks, int cluster, int threads, int shared_bytes,
                     const Parameters& parameters, void* /*stream*/) {
  cuda_host::Machine::current().run(blocks, threads, shared_bytes, [&] { kernel(parameters); }, cluster);
}

}  // namespace danet
