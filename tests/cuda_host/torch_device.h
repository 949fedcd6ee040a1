// The interface of csrc/cuda/torch_device.h for tensors on the CPU.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>

#define DANET_DISPATCH_KEY CPU

namespace danet {

class TensorDevice {
 public:
  explicit TensorDevice(const torch::stable::Tensor&) {}

  void* stream() const { return nullptr; }
  int64_t multiprocessors() const { return 6; }  // few enough that small problems leave a last round to share
};

}  // namespace danet
