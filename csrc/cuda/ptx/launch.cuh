// How a kernel is launched. Every kernel has one parameter, a plain struct.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace danet {

inline void check_cuda(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

// `blocks` blocks of `threads` threads with `shared_bytes` of shared memory each, on `stream` of the current device.
template <class Parameters>
void launch(void (*kernel)(Parameters), int64_t blocks, int threads, int shared_bytes, const Parameters& parameters,
            void* stream) {
  if (blocks == 0) return;
  if (blocks > INT32_MAX) {
    throw std::runtime_error("kernel launch: expected fewer than 2^31 blocks, got " + std::to_string(blocks));
  }
  if (shared_bytes > 48 * 1024) {  // more has to be asked for
    check_cuda(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    shared_bytes),
               "shared memory of a kernel");
  }
  kernel<<<static_cast<unsigned>(blocks), static_cast<unsigned>(threads), static_cast<size_t>(shared_bytes),
           static_cast<cudaStream_t>(stream)>>>(parameters);
  check_cuda(cudaGetLastError(), "kernel launch");
}

// The same for a kernel with clusters of `cluster` blocks, a number that it has itself been compiled with.
template <class Parameters>
void launch_clusters(void (*kernel)(Parameters), int64_t blocks, int /*cluster*/, int threads, int shared_bytes,
                     const Parameters& parameters, void* stream) {
  launch(kernel, blocks, threads, shared_bytes, parameters, stream);
}

}  // namespace danet
