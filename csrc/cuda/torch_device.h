// What the torch-facing file asks of the device of its tensors. tests/cuda_host/torch_device.h answers for a CPU.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#define DANET_DISPATCH_KEY CUDA

namespace danet {

// While it lives, the device of `tensor` is the current one, which kernels are launched on.
class TensorDevice {
 public:
  explicit TensorDevice(const torch::stable::Tensor& tensor) : index_(tensor.get_device_index()), guard_(index_) {}

  void* stream() const {
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index_, &stream));
    return stream;
  }

  int64_t multiprocessors() const {
    int count = 0;
    const cudaError_t error = cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, index_);
    STD_TORCH_CHECK(error == cudaSuccess, "number of multiprocessors: ", cudaGetErrorString(error));
    return count;
  }

 private:
  int32_t index_;
  torch::stable::accelerator::DeviceGuard guard_;
};

}  // namespace danet
