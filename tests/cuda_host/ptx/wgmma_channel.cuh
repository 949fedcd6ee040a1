// csrc/cuda/ptx/wgmma_channel.cuh for a CPU.
#pragma once

#include "ptx/wgmma.cuh"

namespace danet {

template <class T, bool kARowLines, bool kBRowLines>
void multiply_64x128x16(float (&acc)[64], uint64_t a, uint64_t b) {
  cuda_host::BeginProduct arguments{cuda_host::warp_of_cluster(), {}, acc, nullptr};
  arguments.product.columns = 128, arguments.product.add = true, arguments.product.a_is_shared = true;
  arguments.product.a_matrix = a, arguments.product.a_row_lines = kARowLines;
  arguments.product.b_matrix = b, arguments.product.b_row_lines = kBRowLines;
  arguments.product.value = cuda_host::element_value<T>;
  cuda_host::Machine::current().collective("multiply_64x128x16", cuda_host::begin_product, &arguments);
}

template <class T, bool kBRowLines>
void multiply_registers_64x256x16(float (&acc)[128], const uint32_t (&a)[4], uint64_t b) {
  cuda_host::BeginProduct arguments{cuda_host::warp_of_cluster(), {}, acc, a};
  arguments.product.columns = 256, arguments.product.add = true, arguments.product.a_is_shared = false;
  arguments.product.b_matrix = b, arguments.product.b_row_lines = kBRowLines;
  arguments.product.value = cuda_host::element_value<T>;
  cuda_host::Machine::current().collective("multiply_registers_64x256x16", cuda_host::begin_product, &arguments);
}

}  // namespace danet
