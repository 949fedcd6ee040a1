// csrc/cuda/ptx/wgmma.cuh for a CPU.
#pragma once

#include "ptx/cluster.cuh"
#include "ptx/mma.cuh"

namespace danet {
namespace cuda_host {

inline int warp_of_cluster() { return Machine::current().thread_of_cluster() / kLanes; }

// What one lane gives to a product.
struct BeginProduct {
  int warp;
  Product product;
  float* acc;
  const uint32_t* a;
};

DANET_COLLECTIVE begin_product(const void* const* lanes) {
  auto* const first = static_cast<const BeginProduct*>(lanes[0]);
  Product product = first->product;
  for (size_t lane = 0; lane < kLanes; ++lane) {
    product.acc[lane] = static_cast<const BeginProduct*>(lanes[lane])->acc;
    product.a[lane] = static_cast<const BeginProduct*>(lanes[lane])->a;
  }
  hopper().begin(first->warp, product);
}

template <class T>
float element_value(uint16_t bits) {
  return to_float(T{bits});
}

struct OfProducts {
  int warp;
  size_t pending;
};
DANET_COLLECTIVE begin_products(const void* const* lanes) {
  hopper().begin_products(static_cast<const OfProducts*>(lanes[0])->warp);
}
DANET_COLLECTIVE commit_products(const void* const* lanes) {
  hopper().commit(static_cast<const OfProducts*>(lanes[0])->warp);
}
DANET_COLLECTIVE wait_for_products(const void* const* lanes) {
  const auto* own = static_cast<const OfProducts*>(lanes[0]);
  hopper().wait_for_products(own->warp, own->pending);
}

inline void of_products(const char* name, Collective function, size_t pending) {
  const OfProducts arguments{warp_of_cluster(), pending};
  Machine::current().collective(name, function, &arguments);
}

}  // namespace cuda_host

template <int kLineBytes>
uint64_t shared_matrix(const void* shared, int group_bytes, int block_bytes) {
  return static_cast<uint64_t>((shared_address(shared) & 0x3ffff) >> 4) |
         static_cast<uint64_t>(block_bytes >> 4) << 16 | static_cast<uint64_t>(group_bytes >> 4) << 32 |
         static_cast<uint64_t>(kLineBytes == 128 ? 1 : 2) << 62;
}

inline uint64_t shared_matrix_after(uint64_t matrix, int bytes) { return matrix + static_cast<uint64_t>(bytes >> 4); }

inline void begin_products() { cuda_host::of_products("begin_products", cuda_host::begin_products, 0); }
inline void commit_products() { cuda_host::of_products("commit_products", cuda_host::commit_products, 0); }

template <int kPending>
void wait_for_products() {
  cuda_host::of_products("wait_for_products", cuda_host::wait_for_products, kPending);
}

// Every lane stores the rows whose addresses it gives.
inline void stmatrix_x4(void* row, const uint32_t (&registers)[4]) {
  struct Store {
    const uint32_t* registers;
    const uint32_t** all;  // a result: [kLanes]
  };
  constexpr auto kExchange = [](const void* const* lanes) {
    for (int lane = 0; lane < cuda_host::kLanes; ++lane) {
      for (int other = 0; other < cuda_host::kLanes; ++other) {
        static_cast<const Store*>(lanes[lane])->all[other] = static_cast<const Store*>(lanes[other])->registers;
      }
    }
  };
  cuda_host::Machine& machine = cuda_host::Machine::current();
  machine.check_aligned("stmatrix", row, 16);
  const uint32_t* all[cuda_host::kLanes];
  const Store arguments{registers, all};
  machine.collective("stmatrix", kExchange, &arguments);
  const int lane = machine.thread() % cuda_host::kLanes;
  uint32_t line[4];
  for (int q = 0; q < 4; ++q) line[q] = all[lane % 8 * 4 + q][lane / 8];
  cuda_host::hopper().store_16(static_cast<char*>(row), line);
  machine.collective("stmatrix", kExchange, &arguments);  // registers stay what they are until all have stored
}

template <class T, bool kRowLines>
void multiply_64x32x16(float (&acc)[16], const uint32_t (&a)[4], uint64_t b, bool add) {
  cuda_host::BeginProduct arguments{cuda_host::warp_of_cluster(), {}, acc, a};
  arguments.product.columns = 32, arguments.product.add = add, arguments.product.a_is_shared = false;
  arguments.product.b_matrix = b, arguments.product.b_row_lines = kRowLines;
  arguments.product.value = cuda_host::element_value<T>;
  cuda_host::Machine::current().collective("multiply_64x32x16", cuda_host::begin_product, &arguments);
}

template <class T, bool kRowLines>
void multiply_64x256x16(float (&acc)[128], uint64_t a, uint64_t b) {
  cuda_host::BeginProduct arguments{cuda_host::warp_of_cluster(), {}, acc, nullptr};
  arguments.product.columns = 256, arguments.product.add = true, arguments.product.a_is_shared = true;
  arguments.product.a_matrix = a, arguments.product.b_matrix = b, arguments.product.b_row_lines = kRowLines;
  arguments.product.value = cuda_host::element_value<T>;
  cuda_host::Machine::current().collective("multiply_64x256x16", cuda_host::begin_product, &arguments);
}

}  // namespace danet
